"""Batches that compute tokens which the host does not know yet: when they begin, and that nothing else changes."""

import dataclasses

import numpy as np
import pytest
from engine_runs import REQUESTS, StoppingFrontend, lead, make_replica, run_engine, run_mesh
from late_kernels import AheadKernels

from hpcinfer.config import SamplingParams
from hpcinfer.data.detokenizer import decode
from hpcinfer.engine.frontend import ListFrontend
from hpcinfer.engine.leader import Leader
from hpcinfer.engine.outputs import Outputs
from hpcinfer.engine.request import Request
from hpcinfer.kernels import create_kernels

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def run_ahead(store, tokenizer, requests=REQUESTS, **limits):
    """A run, and the kernels that it was on."""
    kernels = AheadKernels()
    limits = {"max_num_batched_tokens": 512, "micro_batches": 2, **limits}
    return run_engine(store, tokenizer, requests, kernels=kernels, **limits), kernels


def begun_ahead(kernels):
    """How many batches behind it had begun when each was waited for."""
    begun, ahead = 0, []
    for event, number in kernels.events:
        begun += event == "begin"
        if event == "wait":
            ahead.append(begun - number - 1)
    return ahead


@pytest.mark.parametrize("params", [
    GREEDY, dataclasses.replace(GREEDY, temperature=1.0), dataclasses.replace(GREEDY, min_tokens=5, stop=("never!",)),
    dataclasses.replace(GREEDY, logit_bias=((7, 3.0),), logprobs=1),
])  # fmt: skip
def test_the_same_sequences_are_enqueued_again_before_their_last_batch_is_waited_for(tiny_store, tokenizer, params):
    requests = [Request(row, (5 + row, 6), params) for row in range(3)]
    run, kernels = run_ahead(tiny_store, tokenizer, requests)
    assert kernels.batches == [(6, 0), *[(3, 3)] * 7]
    assert begun_ahead(kernels) == [1] * 7 + [0] and run.counts["wasted_tokens"] == 0
    assert run.finished == run_engine(tiny_store, tokenizer, requests, max_num_seqs=1).finished


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_a_token_that_penalties_need_is_waited_for(tiny_store, tokenizer, penalty):
    requests = [Request(row, (5 + row, 6), GREEDY) for row in range(3)]
    requests[1] = dataclasses.replace(requests[1], sampling=dataclasses.replace(GREEDY, **{penalty: 1.5}))
    run, kernels = run_ahead(tiny_store, tokenizer, requests)
    assert kernels.batches[:4] == [(6, 0), (2, 2), (3, 2), (2, 2)]
    assert run.finished == run_engine(tiny_store, tokenizer, requests, max_num_seqs=1).finished


@pytest.mark.parametrize("way", ["stop_token_ids", "stop"])
@pytest.mark.parametrize("place", range(4))
def test_what_is_begun_behind_an_end_comes_to_nothing(tiny_store, tokenizer, way, place):
    whole = [Request(row, (7 + row, 9, 11), dataclasses.replace(GREEDY, temperature=1.0)) for row in range(4)]
    ids = [choices[0].token_ids for _, choices in sorted(run_engine(tiny_store, tokenizer, whole).finished.items())]
    requests = []
    for request, output in zip(whole, ids, strict=True):
        ends = {"stop_token_ids": (output[place],), "stop": (decode(tokenizer, output[: place + 1])[-2:],)}
        params = dataclasses.replace(request.sampling, **{way: ends[way]})
        requests.append(dataclasses.replace(request, sampling=params))
    run, _ = run_ahead(tiny_store, tokenizer, requests, max_num_seqs=3, block_size=1)
    assert run.finished == run_engine(tiny_store, tokenizer, requests, max_num_seqs=1).finished
    ended = [choices[0] for choices in run.finished.values() if choices[0].finish_reason == "stop"]
    assert run.counts["wasted_tokens"] == sum(len(choice.token_ids) < GREEDY.max_tokens for choice in ended) > 0


SETTINGS = [  # limits, and what must happen under them
    (3, 32, 1, None, "chunks mixed_batches reused_tokens"),
    (64, 512, 8, None, "mixed_batches"),
    (64, 32, 16, 5, "chunks mixed_batches preemptions reused_tokens"),
    (3, 512, 8, 10, "mixed_batches preemptions"),
    (64, 4, 1, 80, "chunks mixed_batches preemptions reused_tokens"),
    (1, 4, 16, None, "chunks reused_tokens"),
]


@pytest.mark.parametrize(("seqs", "tokens", "block_size", "num_blocks", "events"), SETTINGS)
def test_no_limit_changes_a_result(tiny_store, tokenizer, expected, seqs, tokens, block_size, num_blocks, events):
    run, kernels = run_ahead(tiny_store, tokenizer, max_num_seqs=seqs, max_num_batched_tokens=tokens,
                             block_size=block_size, num_blocks=num_blocks)  # fmt: skip
    assert run.finished == expected
    assert run.peaks["batch_tokens"] <= tokens and run.peaks["batch_sequences"] <= seqs
    assert all(run.counts[event] for event in events.split()), run.counts
    assert sum(num_kept for _, num_kept in kernels.batches) > 5


def random_requests(rng, stem):
    """Prompts with common beginnings; ends, filters, penalties, scores and choices in any mix."""
    requests = []
    for row in range(8):
        own = tuple(int(i) for i in rng.integers(4, 390, rng.integers(1, 12)))
        max_tokens = int(rng.integers(1, 16))
        requests.append(Request(row, stem[: 8 * int(rng.integers(0, 4))] + own, SamplingParams(
            temperature=float(rng.choice([0.0, 0.0, 1.0, 2.0])), top_k=int(rng.choice([0, 5])), max_tokens=max_tokens,
            n=int(rng.choice([1, 1, 3])), min_tokens=int(rng.integers(0, max_tokens + 1)) * int(rng.integers(0, 2)),
            stop_token_ids=tuple(int(i) for i in rng.integers(0, 390, 60)), stop=("a",) * int(rng.integers(0, 2)),
            frequency_penalty=float(rng.choice([0.0, 0.0, 1.0])), echo=bool(rng.integers(0, 2)),
            logprobs=[None, None, 2][rng.integers(0, 3)],
        )))  # fmt: skip
    return requests


@pytest.mark.parametrize("seed", range(6))
def test_random_requests_have_the_results_that_they_have_alone(tiny_store, tokenizer, seed):
    rng = np.random.default_rng(seed)
    requests = random_requests(rng, tuple(int(i) for i in rng.integers(4, 390, 30)))
    limits = {"max_num_seqs": int(rng.integers(2, 9)), "max_num_batched_tokens": int(rng.integers(4, 60)),
              "block_size": int(rng.choice([1, 4, 8])), "num_blocks": None}  # fmt: skip
    limits["num_blocks"] = -(-int(rng.integers(80, 200)) // limits["block_size"])
    run, kernels = run_ahead(tiny_store, tokenizer, requests, **limits)
    assert run.finished == run_engine(tiny_store, tokenizer, requests, max_num_seqs=1).finished
    assert run.counts["wasted_tokens"] > 0 < sum(num_kept for _, num_kept in kernels.batches)


@pytest.mark.parametrize("num_looks", [1, 4, 5, 6, 9])
def test_stopped_sequences_go_on_elsewhere(tiny_store, tokenizer, expected, num_looks):
    first = StoppingFrontend(REQUESTS, num_looks)
    replica = make_replica(tiny_store, kernels=AheadKernels(), micro_batches=2, max_num_batched_tokens=512)
    lead(replica, tokenizer, first)
    rest = replica.scheduler.unfinished()
    assert num_looks < 5 or any(any(request.resumed) for request in rest)
    second = ListFrontend(first.take(100))
    other = make_replica(tiny_store, kernels=AheadKernels(), micro_batches=2, max_num_batched_tokens=16, max_num_seqs=3)
    leader = Leader(other.scheduler, Outputs(tokenizer, other.runner.eos_ids), second, other.runner)
    leader.resume(rest)
    other.engine.run(leader)
    assert first.finished.keys().isdisjoint(second.finished) and first.finished | second.finished == expected


def test_what_a_dead_leader_would_hand_on_holds_known_tokens_only(tiny_store, tokenizer):
    """At every step, with batches in flight."""
    replica, seen = make_replica(tiny_store, kernels=AheadKernels(), micro_batches=2, max_num_batched_tokens=64), []
    requests = [Request(row, (5 + row, 6), GREEDY) for row in range(2)]
    frontend = ListFrontend(requests)
    leader = Leader(replica.scheduler, Outputs(tokenizer, ()), frontend, replica.runner)
    replica.engine.run(leader, lambda: seen.append([each.resumed for each in replica.scheduler.unfinished()]))
    whole = [frontend.finished[row][0].token_ids for row in range(2)]
    steps = [[(ids[:count],) for ids in whole] for count in (0, 0, *range(1, 8))]
    assert seen == [*steps, []]


@pytest.mark.parametrize(("tp", "pp", "in_flight"), [(2, 1, 2), (1, 2, 2), (1, 1, 3), (1, 1, 1)])
def test_others_leave_sequences_in_flight_alone(tiny_store, tokenizer, expected, tp, pp, in_flight):
    made = []

    def make():
        made.append(AheadKernels())
        return made[-1]

    assert run_mesh(tiny_store, tokenizer, tp, pp, in_flight, make)[0].finished == expected
    assert len(made) == tp * pp and not any(num_kept for each in made for _, num_kept in each.batches)


def test_batches_that_may_have_more_rows_than_are_kept_leave_sequences_alone(tiny_store, tokenizer):
    limits = {"max_num_batched_tokens": AheadKernels.num_kept_ids + 1}
    run, kernels = run_ahead(tiny_store, tokenizer, REQUESTS[:2], **limits)
    assert run.finished and not any(num_kept for _, num_kept in kernels.batches)


def test_kernels_of_cpus_keep_nothing():
    assert create_kernels("reference").num_kept_ids == 0
