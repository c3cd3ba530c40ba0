import os
import subprocess
import sys
from collections import Counter
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


def make_scheduler(max_num_seqs=4, tokens=64, micro_batches=1, num_blocks=64, block_size=4):
    return Scheduler(Limits(max_num_seqs, tokens, micro_batches), BlockManager(num_blocks, block_size), Metrics())


def spans(works):
    return [(work.sequence.request.row, work.start, work.stop) for work in works]


def commit(scheduler, works, token_id=7):
    for work in works:
        scheduler.commit(work, token_id if work.samples else None, Finish.NONE)


settings_of = st.builds(
    Setting,
    st.builds(Limits, st.integers(1, 6), st.sampled_from([1, 2, 5, 16, 100]), st.integers(1, 3)),
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
        wanted = range(num_prompt - 1) if sequence.request.sampling.scores_prompt else ()
        assert scored == {(row, choice, position): 1 for position in wanted}
        sampled = {key: count for key, count in simulation.sampled.items() if key[:2] == (row, choice)}
        assert sampled == {(row, choice, num_prompt - 1 + i): 1 for i in range(num_output)}


def test_simulation_covers_what_can_happen():
    simulation = busy_simulation()
    simulation.run()
    counts = simulation.metrics.counts
    assert all(counts[name] > 5 for name in ("preemptions", "chunks", "mixed_batches", "reused_tokens")), counts
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
