"""The supervisor's loop among fakes: what is started, started again, given up, and how it ends."""

import pytest
from fake_steps import Scene
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcinfer.errors import EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE, EXIT_USAGE
from hpcinfer.supervision.base import Outcome
from hpcinfer.supervision.nodes import Node

MANY = 10_000  # seconds


def nodes(names, slots=1):
    return [Node(name, slots) for name in names]


def test_each_replica_is_a_step_of_its_own():
    scene = Scene().turn()
    assert [(step.name, step.nodes) for step in scene.steps] == [("s.0-1", ["a"]), ("s.1-1", ["b"])]


def test_first_step_goes_ahead_until_the_index_is_there():
    scene = Scene(is_open=False).turn(50)
    assert len(scene.steps) == 1
    scene.watch.open = True
    assert len(scene.turn().steps) == 2


def test_complete_job_starts_one_step_that_says_so():
    scene = Scene(num_replicas=2)
    scene.watch.complete = True
    scene.turn(50)
    assert len(scene.steps) == 1
    scene.die(scene.steps[0], EXIT_DONE, seconds=1)
    assert scene.is_over and scene.outcome is Outcome.COMPLETE and len(scene.steps) == 1


def test_complete_job_that_refuses_its_options_is_not_complete():
    scene = Scene()
    scene.supervisor._is_led = False
    scene.watch.complete = True
    scene.turn(5).die(scene.steps[0], EXIT_USAGE, seconds=5)
    assert scene.outcome is not Outcome.COMPLETE
    scene.die(scene.running[0], EXIT_USAGE, seconds=5)
    assert scene.is_over and scene.outcome is Outcome.REFUSED


def test_dead_step_is_buried_and_starts_again():
    scene = Scene().turn()
    scene.die(scene.steps[0])
    assert scene.steps[0].calls == ["bury"]
    assert scene.watch.buried == [("s.0-1", 137, False)]
    assert [(step.name, step.nodes) for step in scene.running] == [("s.1-1", ["b"]), ("s.0-2", ["a"])]


def test_pauses_double_and_have_a_limit():
    scene = Scene(num_replicas=1, restarts=9).turn()
    pauses = []
    for _ in range(9):
        scene.die(scene.running[0], seconds=0)
        begin = scene.now
        while not scene.running:
            scene.turn(1)
        pauses.append(scene.now - begin)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_step_that_always_dies_is_given_up():
    scene = Scene(num_replicas=1, restarts=3).turn()
    while scene.running:
        scene.die(scene.running[0])
    assert len(scene.steps) == 4
    assert scene.is_over and scene.outcome is Outcome.FAILED


def test_finished_rows_give_new_courage():
    scene = Scene(num_replicas=1, restarts=2).turn()
    for _ in range(20):
        scene.die(scene.running[0], finished=1)
    assert len(scene.steps) == 21 and not scene.is_over


def test_others_go_on_when_one_is_given_up():
    scene = Scene(restarts=0).turn()
    scene.die(scene.steps[0])
    assert [step.name for step in scene.running] == ["s.1-1"] and scene.outcome is None
    scene.watch.complete = True
    scene.die(scene.running[0], EXIT_DONE, seconds=1)
    assert scene.is_over and scene.outcome is Outcome.COMPLETE


def test_good_end_of_an_incomplete_job_is_a_death():
    """As of an mpiexec whose host was lost: it returns 0."""
    scene = Scene(num_replicas=1).turn()
    scene.die(scene.steps[0], EXIT_DONE)
    assert scene.outcome is None and len(scene.running) == 1


def test_last_row_counts_even_if_its_step_dies():
    scene = Scene(num_replicas=1).turn()
    scene.watch.complete = True
    scene.die(scene.steps[0], 139, seconds=1)
    assert scene.is_over and scene.outcome is Outcome.COMPLETE


def test_steps_that_do_not_see_the_end_are_ended():
    scene = Scene().turn()
    scene.watch.complete = True
    scene.die(scene.steps[0], EXIT_DONE, seconds=60)
    assert scene.steps[1].calls[:2] == ["end", "end"] and not scene.is_over
    scene.die(scene.steps[1], 137, seconds=1)
    assert scene.is_over and scene.outcome is Outcome.COMPLETE


def test_end_is_seen_though_no_launcher_returns():
    scene = Scene().turn()
    scene.watch.complete = True
    scene.turn(120)
    assert scene.outcome is Outcome.COMPLETE and all(step.calls[0] == "end" for step in scene.steps)


def test_stopped_step_stops_all():
    scene = Scene().turn()
    scene.die(scene.steps[0], EXIT_RESUMABLE, seconds=1)
    assert scene.steps[1].calls == ["stop"] and not scene.is_over
    scene.die(scene.steps[1], EXIT_RESUMABLE, seconds=1)
    assert scene.is_over and scene.outcome is Outcome.STOPPED and len(scene.steps) == 2


@pytest.mark.parametrize("code", [EXIT_RESUMABLE, EXIT_DONE, 138, EXIT_FAILED])
def test_signal_is_passed_on_and_ends_resumable(code):
    scene = Scene().turn()
    scene.reason = "SIGTERM"
    scene.turn()
    assert [step.calls for step in scene.steps] == [["stop"], ["stop"]]
    for step in scene.steps:
        scene.die(step, code, seconds=1)
    assert scene.is_over and scene.outcome is Outcome.STOPPED and len(scene.steps) == 2


def test_steps_that_do_not_stop_in_time_are_ended():
    scene = Scene(num_replicas=1).turn()
    scene.reason = "SIGTERM"
    scene.turn(5)
    assert scene.steps[0].calls == ["stop"]
    scene.turn(20)
    assert scene.steps[0].calls[:3] == ["stop", "end", "end"]


def test_signal_while_nothing_runs_ends_at_once():
    scene = Scene(num_replicas=1).turn()
    scene.die(scene.steps[0], seconds=0)
    scene.reason = "SIGTERM"
    assert scene.turn().is_over and scene.outcome is Outcome.STOPPED


def test_wrong_job_is_refused_once():
    scene = Scene(num_replicas=2, is_open=False).turn()
    scene.die(scene.steps[0], EXIT_USAGE)
    scene.die(scene.running[0], EXIT_USAGE)
    assert scene.is_over and scene.outcome is Outcome.REFUSED and len(scene.steps) == 2


def test_node_that_refuses_the_job_is_left_out_and_the_others_go_on():
    scene = Scene().turn()
    scene.die(scene.steps[0], EXIT_USAGE, seconds=MANY)
    assert [step.nodes for step in scene.running] == [["b"]]
    scene.watch.complete = True
    scene.die(scene.running[0], EXIT_DONE, seconds=1)
    assert scene.outcome is Outcome.COMPLETE


def test_launcher_that_cannot_start_is_a_death():
    scene = Scene(num_replicas=1, restarts=3)
    scene.broken_launchers = 2
    assert len(scene.turn(20).running) == 1
    scene = Scene(num_replicas=1, restarts=3)
    scene.broken_launchers = 99
    assert scene.turn(100).is_over and scene.outcome is Outcome.FAILED


# Nodes


def test_replica_moves_off_a_node_that_is_down():
    scene = Scene(nodes=nodes("abc")).turn()
    scene.cluster.dead = {"a"}
    scene.die(scene.steps[0])
    assert scene.watch.buried == [("s.0-1", 137, True)]
    assert [step.nodes for step in scene.running] == [["b"], ["c"]]


def test_replica_waits_for_room_when_a_node_is_down():
    scene = Scene().turn()
    scene.cluster.dead = {"a"}
    scene.die(scene.steps[0])
    assert [step.nodes for step in scene.running] == [["b"]]
    scene.cluster.dead = set()
    scene.turn(60)
    assert sorted(step.nodes for step in scene.running) == [["a"], ["b"]]


def test_step_on_a_lost_node_is_ended_though_its_launcher_waits():
    scene = Scene(nodes=nodes("abc")).turn()
    scene.cluster.dead = {"b"}
    scene.turn(35)
    assert scene.steps[1].calls == []  # perhaps it is only busy
    scene.turn(60)
    assert scene.steps[0].calls == [] and scene.steps[1].calls[0] == "end"


def test_job_fails_when_no_node_has_room():
    scene = Scene(num_replicas=1, nodes=nodes("ab"), ranks=2).turn()
    scene.cluster.dead = {"b"}
    scene.die(scene.steps[0])
    assert scene.is_over and scene.outcome is Outcome.FAILED and len(scene.steps) == 1


def test_node_on_which_steps_die_again_and_again_is_left_out():
    scene = Scene(num_replicas=2, nodes=nodes("abc"), restarts=9).turn()
    for _ in range(20):
        for step in scene.running:
            if step.nodes == ["a"]:
                scene.die(step)
    assert scene.supervisor._roster.left_out == ["a"]
    assert sorted(step.nodes for step in scene.running) == [["b"], ["c"]]


def test_only_node_is_never_left_out():
    scene = Scene(num_replicas=2, nodes=nodes("a", 2), restarts=9).turn()
    for _ in range(18):
        scene.die(scene.running[0])
        assert len(scene.running) == 2


def test_node_is_not_suspected_for_a_row():
    scene = Scene(num_replicas=1, nodes=nodes("ab"), restarts=9).turn()
    for _ in range(9):
        scene.watch.by_rows.add(scene.running[0].name)
        scene.die(scene.running[0], 139)
    assert scene.supervisor._roster.left_out == []


def test_scheduler_is_asked_seldom_and_after_each_death():
    scene = Scene().turn(300)
    assert scene.cluster.num_questions <= 300 / 30 + 1
    before = scene.turn(2).cluster.num_questions
    scene.die(scene.steps[0], seconds=0)
    assert scene.cluster.num_questions == before + 1


# Signs of life


def test_silent_step_is_ended():
    scene = Scene().turn()
    scene.watch.silent = {"s.0-1"}
    scene.turn(20)
    assert scene.steps[0].calls == []  # its survivors may be at it
    scene.turn(40)
    assert scene.steps[0].calls[0] == "end" and scene.steps[1].calls == []


def test_short_silence_is_forgiven():
    scene = Scene().turn()
    for _ in range(20):
        scene.watch.silent = {"s.0-1"}
        scene.turn(20)
        scene.watch.silent = set()
        scene.turn(20)
    assert scene.steps[0].calls == []


# Towards the end


def tail(**more):
    scene = Scene(gives_back=True, kept_node="b", **more).turn()
    scene.watch.in_flight = {"s.0-1": 0, "s.1-1": 3}
    return scene.turn(60)


def test_replica_without_work_is_sent_home_and_its_node_given_back():
    scene = tail()
    assert scene.steps[0].calls == ["stop"] and scene.steps[1].calls == []
    scene.die(scene.steps[0], EXIT_RESUMABLE)
    assert scene.cluster.kept == ["b"] and scene.outcome is None
    assert [step.name for step in scene.running] == ["s.1-1"]


@pytest.mark.parametrize(("num_refusals", "kept"), [(4, ["b"]), (99, None)])
def test_busy_slurm_is_asked_again_but_not_for_ever(num_refusals, kept):
    scene = tail()
    scene.cluster.num_refusals = num_refusals
    scene.die(scene.steps[0], EXIT_RESUMABLE)
    assert scene.cluster.kept == kept and scene.cluster.num_refusals in (-1, 94)


def test_nodes_are_given_back_only_when_asked():
    scene = Scene(kept_node="b").turn()
    scene.watch.in_flight = {"s.0-1": 0, "s.1-1": 3}
    assert scene.turn(MANY).steps[0].calls == []


def test_own_node_and_shared_nodes_are_kept():
    scene = Scene(gives_back=True, kept_node="a").turn()
    scene.watch.in_flight = {"s.0-1": 0, "s.1-1": 3}
    scene.turn(60).die(scene.steps[0], EXIT_RESUMABLE)
    assert scene.cluster.kept is None
    scene = Scene(gives_back=True, nodes=nodes("a", 2), kept_node="b").turn()
    scene.watch.in_flight = {"s.0-1": 0, "s.1-1": 3}
    scene.turn(60).die(scene.steps[0], EXIT_RESUMABLE)
    assert scene.cluster.kept is None


def test_all_idle_is_not_the_tail():
    scene = Scene(gives_back=True).turn()
    scene.watch.in_flight = {"s.0-1": 0, "s.1-1": 0}
    assert not scene.turn(600).steps[0].calls


# Retries of errors


def test_one_step_opens_the_retry_and_the_others_join():
    scene = Scene(retries_errors=True)
    scene.watch.complete = True  # as it looks before the retry is open
    scene.turn(50)
    assert [step.opens_retry for step in scene.steps] == [True]
    scene.die(scene.steps[0], 137, seconds=5)  # before it had opened the retry
    assert [step.opens_retry for step in scene.steps] == [True, True] and scene.outcome is None
    scene.watch.complete = False
    scene.watch.in_flight = {scene.steps[1].name: 4}
    scene.turn(5)
    assert [step.opens_retry for step in scene.steps] == [True, True, False]
    scene.die(scene.steps[1])
    assert scene.steps[-1].opens_retry is False


# Anything


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_fate_ends_and_leaves_nothing(data):
    """Whatever happens to steps and nodes: no node is overbooked, restarts are bounded, and it ends."""
    replicas, ranks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    scene = Scene(replicas, nodes("abcd", data.draw(st.integers(1, 3))), ranks, restarts=data.draw(st.integers(0, 3)))
    scene.turn()
    for _ in range(60):
        if scene.is_over:
            break
        scene.cluster.dead = set(data.draw(st.sets(st.sampled_from("abcd"), max_size=3)))
        if scene.running:
            code = data.draw(st.sampled_from([0, 1, 2, 75, 137, 139]))
            scene.die(data.draw(st.sampled_from(scene.running)), code, seconds=data.draw(st.sampled_from([0, 5, 99])))
        else:
            scene.turn(60)
        roster = scene.supervisor._roster
        assert all(0 <= roster._taken[name] <= roster._slots[name] for name in roster.names)
        assert len(scene.running) <= replicas
        if scene.outcome is not None:
            num_steps = len(scene.steps)
            for step in scene.running:
                scene.die(step, 137, seconds=1)
            assert len(scene.steps) == num_steps
    assert len(scene.watch.buried) >= len(scene.steps) - len(scene.running)
    assert scene.is_over or scene.running or scene.supervisor._roster.has_room(ranks)
