import dataclasses
import os
import subprocess
import sys
from collections import Counter, deque
from pathlib import Path

import pytest
import scheduling
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import Setting, Simulation, busy_simulation, output_length, random_simulation

from hpcinfer.config import SamplingParams
from hpcinfer.engine.block_manager import BlockManager
from hpcinfer.engine.request import Request
from hpcinfer.engine.scheduler import Limits, Scheduler
from hpcinfer.engine.sequence import Finish
from hpcinfer.report.metrics import Metrics


def request(row, length, max_tokens=8, **params):
    return Request(row, tuple(1000 * row + i for i in range(length)), SamplingParams(max_tokens=max_tokens, **params))


def make_scheduler(max_num_seqs=4, tokens=64, micro_batches=1, num_blocks=64, block_size=4, *, reuse=True):
    blocks = BlockManager(num_blocks, block_size, reuse=reuse)
    return Scheduler(Limits(max_num_seqs, tokens, micro_batches), blocks, Metrics())


def spans(works):
    return [(work.sequence.request.row, work.start, work.stop) for work in works]


def commit(scheduler, works, token_id=7):
    for work in works:
        scheduler.commit(work, token_id if work.samples else None, Finish.NONE)


def test_batches_are_filled_before_sequences_are_shared_out_where_there_is_one_stage():
    for num_shares, sizes in ((0, [3, 3]), (1, [4, 2])):
        blocks = BlockManager(64, 4, reuse=True)
        scheduler = Scheduler(Limits(4, 64, 2, num_shares), blocks, Metrics())
        for row in range(6):
            scheduler.add(request(row, 3))
        assert [len(scheduler.schedule()) for _ in sizes] == sizes


sizes = st.integers(1, 6), st.sampled_from([1, 2, 5, 16, 100])
settings_of = st.builds(
    Setting,
    st.builds(Limits, *sizes, st.integers(1, 3), st.integers(0, 3))
    | st.builds(Limits, *sizes, st.just(2), st.integers(0, 2), st.just(value=True)),
    num_blocks=st.integers(2, 40),
    block_size=st.sampled_from([1, 2, 4, 16]),
)


@settings(max_examples=150)
@given(setting=settings_of, seed=st.integers(0, 10**6), count=st.integers(1, 16))
def test_every_promise_is_kept_at_every_step(setting, seed, count):
    simulation = random_simulation(seed, setting, count)
    simulation.run()
    requests = [request for burst in simulation.arrivals for request in burst]
    assert set(simulation.finished) == {(r.row, choice) for r in requests for choice in range(r.sampling.n)}
    for (row, choice), sequence in simulation.finished.items():
        num_prompt, num_output = sequence.num_prompt, output_length(sequence)
        scored = {key: count for key, count in simulation.scored.items() if key[:2] == (row, choice)}
        wanted = range(num_prompt - 1) if sequence.request.sampling.scores_prompt and choice == 0 else ()
        assert scored == {(row, choice, position): 1 for position in wanted}
        sampled = {key: count for key, count in simulation.sampled.items() if key[:2] == (row, choice)}
        assert sampled == {(row, choice, num_prompt - 1 + i): 1 for i in range(num_output)}


def test_simulation_covers_what_can_happen():
    simulation = busy_simulation()
    simulation.run()
    counts = simulation.metrics.counts
    names = ("preemptions", "chunks", "mixed_batches", "reused_tokens", "prefix_waits")
    assert all(counts[name] > 5 for name in names), counts
    assert simulation.metrics.peaks["batch_sequences"] == 4 and simulation.metrics.peaks["batch_tokens"] == 16


def test_decisions_do_not_depend_on_the_hash_seed():
    expected = busy_simulation().run()
    code = "import scheduling; print(scheduling.busy_simulation().run())"
    folder = str(Path(scheduling.__file__).parent)
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": folder}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd="/", timeout=60)
        assert run.stdout.strip() == expected, run.stderr


def test_results_do_not_depend_on_limits():
    """The tokens of every sequence are those of the simulation that runs them one by one."""
    def outputs(limits, num_blocks):
        setting = Setting(limits, num_blocks, 4)
        simulation = Simulation(setting, [[r for burst in busy_simulation().arrivals for r in burst]])
        simulation.run()
        return {key: sequence.output_ids for key, sequence in simulation.finished.items()}

    expected = outputs(Limits(1, 1000), 100)
    assert outputs(Limits(8, 7, 3), 24) == outputs(Limits(64, 512, 2), 1000) == expected
    assert outputs(Limits(8, 7, 2, 1, True), 24) == outputs(Limits(64, 512, 2, 1, True), 1000) == expected  # noqa: FBT003


def test_long_prompt_is_chunked_and_samples_once():
    scheduler = make_scheduler(tokens=10)
    scheduler.add(request(0, 25))
    for expected in ((0, 0, 10), (0, 10, 20), (0, 20, 25)):
        works = scheduler.schedule()
        assert spans(works) == [expected] and works[0].samples == (expected[2] == 25)
        commit(scheduler, works)
    assert spans(scheduler.schedule()) == [(0, 25, 26)]


def test_decodes_go_before_new_prompts():
    scheduler = make_scheduler(tokens=8)
    scheduler.add(request(0, 5))
    commit(scheduler, scheduler.schedule())
    scheduler.add(request(1, 20))
    assert spans(scheduler.schedule()) == [(0, 5, 6), (1, 0, 7)]


def test_sequences_in_flight_are_left_alone():
    scheduler = make_scheduler(micro_batches=2)
    for row in range(4):
        scheduler.add(request(row, 4))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert [row for row, *_ in spans(first)] == [0, 1] and [row for row, *_ in spans(second)] == [2, 3]
    assert scheduler.schedule() == []
    commit(scheduler, first)
    assert spans(scheduler.schedule()) == [(0, 4, 5), (1, 4, 5)]


def make_ahead(num_blocks=64, block_size=4, tokens=64):
    return Scheduler(Limits(4, tokens, 2, 1, goes_ahead=True), BlockManager(num_blocks, block_size), Metrics())


def test_sequences_of_the_last_batch_go_ahead_with_the_token_that_it_samples():
    scheduler = make_ahead(tokens=8)
    for row, length in ((0, 3), (1, 20)):
        scheduler.add(request(row, length, max_tokens=4))
    first = scheduler.schedule()
    assert spans(first) == [(0, 0, 3), (1, 0, 5)]
    second = scheduler.schedule()
    assert spans(second) == [(0, 3, 4)] and scheduler.running[0].token_ids == [0, 1, 2]  # the chunk is left alone
    commit(scheduler, first)
    third = scheduler.schedule()
    assert spans(third) == [(0, 4, 5), (1, 5, 12)] and scheduler.running[0].num_computed == 3
    commit(scheduler, second)
    fourth = scheduler.schedule()
    assert spans(fourth) == [(0, 5, 6)]  # samples the last of four tokens
    commit(scheduler, third)
    assert spans(scheduler.schedule()) == [(1, 12, 20)]


def test_what_comes_of_a_token_behind_the_end_is_thrown_away():
    scheduler = make_ahead(num_blocks=2)
    scheduler.add(request(0, 4))
    [first], [second] = scheduler.schedule(), scheduler.schedule()
    scheduler.commit(first, 7, Finish.STOP)
    assert scheduler.blocks.num_free == 2 and scheduler.num_live == 0 and scheduler.schedule() == []
    scheduler.add(request(1, 8))
    [other] = scheduler.schedule()
    scheduler.commit(second, None, Finish.NONE)
    assert first.sequence.output_ids == [7] and not first.sequence.blocks and len(other.sequence.blocks) == 2
    assert scheduler.blocks.num_free == 0 and scheduler._metrics.counts["wasted_tokens"] == 1


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_none_goes_ahead_while_one_before_it_lacks_a_block(penalty):
    """The latest one is to be preempted, which waits until it is in no batch."""
    scheduler = make_ahead(num_blocks=2, block_size=8)
    scheduler.add(request(0, 7, presence_penalty=penalty))
    scheduler.add(request(1, 1))
    batches = deque([scheduler.schedule(), scheduler.schedule()])
    while len(scheduler.running) == 2:
        last = spans(batches[-1])
        commit(scheduler, batches.popleft())
        batches.append(scheduler.schedule())
        assert last or batches[-1]
    assert last == [] and spans(batches[-1]) == [(0, 8, 9)]
    assert scheduler.waiting[0].num_output == (4 if penalty else 2)


def test_latest_sequence_is_preempted_and_comes_back_first():
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    for row in range(3):
        scheduler.add(request(row, 4))
    commit(scheduler, scheduler.schedule())
    works = scheduler.schedule()  # each of three wants a second block, one is free
    assert spans(works) == [(0, 4, 5), (1, 4, 5)]
    assert [s.request.row for s in scheduler.waiting] == [2] and not scheduler.waiting[0].blocks
    scheduler.add(request(3, 1))
    assert [s.request.row for s in scheduler.waiting] == [2, 3]
    for work in works:
        scheduler.commit(work, 7, Finish.STOP)
    [again, new] = scheduler.schedule()
    assert again.sequence.request.row == 2 and again.stop == 5 and again.samples and new.sequence.request.row == 3


def test_prompt_that_is_being_scored_reuses_no_prefix_before_it_is_scored():
    scheduler = make_scheduler(num_blocks=32)
    prompt = tuple(range(12))
    scheduler.add(Request(0, prompt, SamplingParams(max_tokens=4)))
    commit(scheduler, scheduler.schedule())
    scheduler.add(Request(1, prompt, SamplingParams(max_tokens=0, echo=True, logprobs=0)))
    scheduler.add(Request(2, prompt, SamplingParams(max_tokens=4)))
    _, scoring, plain = scheduler.schedule()
    assert scoring.scored == range(11) and not scoring.samples and scoring.start == 0
    assert plain.start == 8 and not plain.scored and plain.samples


def test_choices_share_the_prompt_s_blocks_once_it_is_computed():
    scheduler = make_scheduler(tokens=9, block_size=4)
    scheduler.add(request(0, 9, n=3))
    commit(scheduler, scheduler.schedule())
    works = scheduler.schedule()
    assert [(work.start, work.stop) for work in works] == [(9, 10), (8, 9), (8, 9)]
    tables = [work.sequence.blocks for work in works]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2] and len({table[2] for table in tables}) == 3


def test_choices_that_come_together_compute_their_prompt_once():
    scheduler = make_scheduler(block_size=4)
    scheduler.add(request(0, 9, n=3))
    assert spans(first := scheduler.schedule()) == [(0, 0, 9)]
    commit(scheduler, first)
    assert spans(scheduler.schedule()) == [(0, 9, 10), (0, 8, 9), (0, 8, 9)]


def test_equal_prompts_share_all_blocks_but_the_last():
    for length, shared in ((12, 8), (13, 12), (16, 12), (3, 0)):
        scheduler = make_scheduler(block_size=4)
        for row in range(2):
            scheduler.add(Request(row, tuple(range(length)), SamplingParams(max_tokens=4)))
        commit(scheduler, scheduler.schedule())
        if shared:
            assert spans(scheduler.schedule())[1] == (1, shared, length)
        else:
            assert len(scheduler.running) == 2


def test_those_with_another_prefix_pass_and_order_is_kept():
    scheduler = make_scheduler(block_size=4, max_num_seqs=8)
    stem = tuple(range(8))
    for row, prompt in enumerate([(*stem, 20), (*stem, 21), (30, 31), (*stem, 22), (*stem[:4], 99, 98)]):
        scheduler.add(Request(row, prompt, SamplingParams(max_tokens=4)))
    assert spans(first := scheduler.schedule()) == [(0, 0, 9), (2, 0, 2)]
    assert [sequence.request.row for sequence in scheduler.waiting] == [1, 3, 4]
    commit(scheduler, first)
    assert spans(scheduler.schedule()) == [(0, 9, 10), (2, 2, 3), (1, 8, 9), (3, 8, 9), (4, 4, 6)]
    assert [sequence.seq_id for sequence in scheduler.running] == [0, 1, 2, 3, 4]


def test_prefix_that_comes_in_chunks_is_awaited_to_its_end():
    scheduler = make_scheduler(block_size=4, tokens=10)
    for row in range(2):
        scheduler.add(Request(row, (*range(16), 50 + row), SamplingParams(max_tokens=4)))
    for expected in ([(0, 0, 10)], [(0, 10, 17)], [(0, 17, 18), (1, 16, 17)]):
        assert spans(works := scheduler.schedule()) == expected
        commit(scheduler, works)


def test_prefix_in_another_micro_batch_is_awaited():
    scheduler = make_scheduler(block_size=4, micro_batches=2)
    scheduler.add(request(0, 9, n=2))
    first = scheduler.schedule()
    assert spans(first) == [(0, 0, 9)] and scheduler.schedule() == []
    commit(scheduler, first)
    assert [(work.start, work.stop) for work in scheduler.schedule()] == [(9, 10)]
    assert [(work.start, work.stop) for work in scheduler.schedule()] == [(8, 9)]


def computed_tokens(*, reuse, rows, micro_batches=1):
    """Tokens that are computed until all rows have two output tokens, of a queue that is kept full."""
    scheduler = make_scheduler(64, 512, micro_batches, 8000, 16, reuse=reuse)
    in_flight, total, arrivals = deque([[]] * micro_batches), 0, deque(rows)
    while arrivals or scheduler.num_live:
        for work in in_flight.popleft():
            finish = Finish.LENGTH if work.sequence.num_output + work.samples == 2 else Finish.NONE
            scheduler.commit(work, 7 if work.samples else None, finish)
        while arrivals and scheduler.num_live < 72:
            scheduler.add(arrivals.popleft())
        in_flight.append(scheduler.schedule())
        total += sum(work.stop - work.start for work in in_flight[-1])
    return total


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_prefix_of_many_prompts_is_computed_once(micro_batches):
    stem = tuple(range(1000))
    params = SamplingParams(max_tokens=2)
    rows = [Request(row, (*stem, *range(2000 + 40 * row, 2040 + 40 * row)), params) for row in range(200)]
    without = computed_tokens(reuse=False, rows=rows, micro_batches=micro_batches)
    assert without == 200 * (1040 + 1)
    found = computed_tokens(reuse=True, rows=rows, micro_batches=micro_batches)
    assert found == without - 199 * 992 and found <= without / 5


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_choices_of_one_prompt_compute_it_once(micro_batches):
    rows = [Request(0, tuple(range(1000)), SamplingParams(max_tokens=2, n=128))]
    assert computed_tokens(reuse=True, rows=rows, micro_batches=micro_batches) == 1000 + 127 * 8 + 128


@settings(max_examples=100, deadline=None)
@given(setting=settings_of, seed=st.integers(0, 10**6))
def test_with_memory_enough_no_block_of_a_prompt_is_computed_twice(setting, seed):
    """The last block of a prompt excepted, since nobody can share it; and prompts that are scored."""
    simulation = random_simulation(seed, dataclasses.replace(setting, num_blocks=2000), 16)
    for burst in simulation.arrivals:
        burst[:] = [request for request in burst if not request.sampling.scores_prompt]
    computed, size, compute = Counter(), setting.block_size, simulation._compute

    def count(work):
        num_full = min(work.stop, work.sequence.num_prompt - 1) // size
        computed.update(tuple(work.sequence.token_ids[: (i + 1) * size]) for i in range(work.start // size, num_full))
        compute(work)

    simulation._compute = count
    simulation.run()
    assert not [prefix for prefix, times in computed.items() if times > 1]


def test_digest_tells_states_apart():
    digests = Counter()
    for length in (3, 5):
        scheduler = make_scheduler()
        digests[scheduler.digest()] += 1
        scheduler.add(request(0, length))
        digests[scheduler.digest()] += 1
        works = scheduler.schedule()
        digests[scheduler.digest()] += 1
        commit(scheduler, works)
        digests[scheduler.digest()] += 1
    assert sorted(digests.values()) == [1] * 6 + [2]  # only the empty state is common


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_batches_in_flight_are_of_one_size(micro_batches):
    scheduler = make_scheduler(max_num_seqs=64, tokens=512, micro_batches=micro_batches)
    for row in range(12):
        scheduler.add(request(row, 2))
    assert [len(scheduler.schedule()) for _ in range(micro_batches)] == [12 // micro_batches] * micro_batches
