"""The loop on a tiny random model: no limit changes a result, and results are those of naive recomputation."""

import dataclasses

import numpy as np
import pytest
from engine_runs import MAX_LEN, REQUESTS, SEED, StoppingFrontend, lead, make_replica, run_engine, run_mesh
from stages import run_replica

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.config import EngineOptions, SamplingParams
from hpcinfer.data.detokenizer import decode
from hpcinfer.engine.frontend import ListFrontend
from hpcinfer.engine.leader import Leader
from hpcinfer.engine.logits import changes_for, uniform
from hpcinfer.engine.options import ReplicaOptions, resolve_max_model_len
from hpcinfer.engine.outputs import Outputs
from hpcinfer.engine.replica import build_replica
from hpcinfer.engine.request import Request
from hpcinfer.engine.sequence import Sequence
from hpcinfer.errors import ConfigError, MeshError
from hpcinfer.kernels import create_kernels
from hpcinfer.kernels.protocol import Draw
from hpcinfer.kernels.sampling import change_row, sample
from hpcinfer.partition.mesh import Mesh

SETTINGS = [  # limits, and what must happen under them
    (1, 4, 16, None, "chunks reused_tokens"),
    (3, 32, 1, None, "chunks mixed_batches reused_tokens"),
    (64, 512, 8, None, "steps"),
    (64, 32, 16, 5, "chunks mixed_batches preemptions reused_tokens"),
    (3, 512, 8, 10, "mixed_batches preemptions"),
    (64, 4, 1, 80, "chunks mixed_batches preemptions reused_tokens"),
    (64, 512, 1, 120, "mixed_batches preemptions reused_tokens"),
]


@pytest.mark.parametrize(("seqs", "tokens", "block_size", "num_blocks", "events"), SETTINGS)
def test_no_limit_changes_a_result(tiny_store, tokenizer, expected, seqs, tokens, block_size, num_blocks, events):
    run = run_engine(tiny_store, tokenizer, max_num_seqs=seqs, max_num_batched_tokens=tokens, block_size=block_size,
                     num_blocks=num_blocks)  # fmt: skip
    assert run.finished == expected
    assert run.peaks["batch_tokens"] <= tokens and run.peaks["batch_sequences"] <= seqs
    assert all(run.counts[event] for event in events.split()), run.counts


def naive_choice(store, request, choice):
    """Tokens of one choice, the whole sequence computed anew for each."""
    sequence, params = Sequence(0, request, choice), request.sampling
    seed, logits = SEED if params.seed is None else params.seed, np.empty(0)
    while sequence.num_output < params.max_tokens:
        [logits] = run_replica(store, [np.array(sequence.token_ids)], block_size=128)
        u = uniform(seed, request.row, choice, len(sequence.token_ids))
        ids, num_output = range(store.config.vocab_size), sequence.num_output
        changes = changes_for(sequence, num_output, store.config.eos_token_ids, ids)
        draw = Draw(params.temperature, params.top_k, params.top_p, params.min_p, u)
        sequence.token_ids.append(sample(change_row(logits[-1].copy(), changes), draw, create_kernels("reference")))
        if sequence.token_ids[-1] in store.config.eos_token_ids:
            break
    return sequence, logits


@pytest.mark.parametrize("row", [0, 1, 2, 3, 5])
def test_tokens_and_logprobs_are_those_of_naive_recomputation(tiny_store, expected, row):
    request = REQUESTS[row]
    for choice in expected[row]:
        sequence, logits = naive_choice(tiny_store, request, choice.index)
        assert choice.token_ids == tuple(sequence.output_ids)
        logprobs = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
        scored = [*(choice.prompt_logprobs or ())[1:], *(choice.logprobs or ())]
        first = 0 if choice.prompt_logprobs else sequence.num_prompt - 1
        for position, entry in enumerate(scored, first):
            assert entry.token_id == sequence.token_ids[position + 1]
            assert entry.logprob == pytest.approx(logprobs[position, entry.token_id], abs=1e-6)


def test_choices_differ_and_greedy_ones_do_not(tiny_store, tokenizer, expected):
    first, second = expected[1]
    assert (first.index, second.index) == (0, 1) and first.token_ids != second.token_ids
    greedy = Request(0, REQUESTS[0].prompt_ids, SamplingParams(temperature=0, n=3, max_tokens=5))
    choices = run_engine(tiny_store, tokenizer, [greedy]).finished[0]
    assert len({choice.token_ids for choice in choices}) == 1


def test_scoring_gives_the_prompt_s_logprobs_and_no_token(tiny_store, expected):
    request, [choice] = REQUESTS[4], expected[4]
    assert choice.token_ids == () == choice.logprobs and choice.finish_reason == "length"
    assert [entry.token_id for entry in choice.prompt_logprobs] == list(request.prompt_ids)
    [logits] = run_replica(tiny_store, [np.array(request.prompt_ids)], block_size=128)
    logprobs = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    for position, entry in enumerate(choice.prompt_logprobs[1:]):
        assert entry.logprob == pytest.approx(logprobs[position, entry.token_id], abs=1e-6)
        assert [i for i, _ in entry.top] == [logits[position].argmax()]


def test_stop_string_ends_the_text_before_it(tiny_store, tokenizer, expected):
    [whole] = expected[0]
    text = decode(tokenizer, whole.token_ids)
    stop = next(text[i : i + 2] for i in range(2, len(text) - 1) if "\ufffd" not in text[i : i + 2])
    params = dataclasses.replace(REQUESTS[0].sampling, stop=("never!", stop))
    request = dataclasses.replace(REQUESTS[0], sampling=params)
    [choice] = run_engine(tiny_store, tokenizer, [request]).finished[0]
    assert choice.text == text[: text.index(stop)] and choice.finish_reason == "stop"
    assert choice.token_ids == whole.token_ids[: len(choice.token_ids)]


def test_stop_token_is_kept_away_until_min_tokens(tiny_store, tokenizer, expected):
    [whole] = expected[0]
    stop = whole.token_ids[0]
    params = SamplingParams(temperature=0, max_tokens=9, stop_token_ids=(stop,))
    [choice] = run_engine(tiny_store, tokenizer, [dataclasses.replace(REQUESTS[0], sampling=params)]).finished[0]
    assert choice.token_ids == (stop,) and choice.finish_reason == "stop"
    later = dataclasses.replace(params, min_tokens=4)
    [choice] = run_engine(tiny_store, tokenizer, [dataclasses.replace(REQUESTS[0], sampling=later)]).finished[0]
    assert stop not in choice.token_ids[:4] and len(choice.token_ids) >= 4


def test_prompt_as_long_as_the_model_allows_is_served(tiny_store, tokenizer):
    prompt = tuple(range(4, 4 + MAX_LEN - 1))
    requests = [Request(0, prompt, SamplingParams(temperature=0, max_tokens=1)),
                Request(1, (*prompt, 9), SamplingParams(temperature=0, max_tokens=0, echo=True, logprobs=0)),
                Request(2, (5,), SamplingParams(temperature=0, max_tokens=MAX_LEN - 1, ignore_eos=True))]  # fmt: skip
    finished = run_engine(tiny_store, tokenizer, requests, num_blocks=5, block_size=16).finished
    assert [len(finished[row][0].token_ids) for row in range(3)] == [1, 0, MAX_LEN - 1]


def test_rows_with_the_same_prompt_reuse_its_blocks(tiny_store, tokenizer):
    prompt = tuple(range(10, 58))
    requests = [Request(row, prompt, SamplingParams(temperature=0, max_tokens=3)) for row in range(4)]
    run = run_engine(tiny_store, tokenizer, requests, max_num_seqs=1)
    assert run.counts["reused_tokens"] == 3 * 32  # the last of three blocks is left to compute
    assert len({choices[0].token_ids for choices in run.finished.values()}) == 1


@pytest.mark.parametrize("reuses", [True, False])
def test_what_many_begin_with_is_computed_once_and_changes_nothing(tiny_store, tokenizer, reuses):
    """Choices of one prompt and prompts with one beginning, all there from the start."""
    stem = tuple(range(10, 60))
    requests = [Request(0, stem, SamplingParams(max_tokens=5, n=4)),
                *(Request(row, (*stem, row), SamplingParams(temperature=0, max_tokens=5)) for row in range(1, 6)),
                Request(6, (*stem, 1), SamplingParams(temperature=0, max_tokens=5, echo=True, logprobs=1))]  # fmt: skip
    run = run_engine(tiny_store, tokenizer, requests, prefix_reuse=reuses)
    assert run.counts["reused_tokens"] == (8 * 48 if reuses else 0)
    alone = [run_engine(tiny_store, tokenizer, [each], max_num_seqs=1, prefix_reuse=False) for each in requests]
    assert run.finished == {row: choices for each in alone for row, choices in each.finished.items()}


@pytest.mark.parametrize("num_looks", [0, 1, 5, 9, 14])
def test_stopped_sequences_go_on_elsewhere_as_if_nothing_had_happened(tiny_store, tokenizer, expected, num_looks):
    first = StoppingFrontend(REQUESTS, num_looks)
    replica = make_replica(tiny_store, max_num_seqs=4)
    lead(replica, tokenizer, first)
    rest = replica.scheduler.unfinished()
    assert not any(request.resumed for request in rest if request.sampling.logprobs is not None)
    assert num_looks < 5 or any(any(request.resumed) for request in rest)
    second, other = ListFrontend(first.take(100)), make_replica(tiny_store, max_num_seqs=3, max_num_batched_tokens=16)
    leader = Leader(other.scheduler, Outputs(tokenizer, other.runner.eos_ids), second, other.runner)
    leader.resume([Request.from_bytes(request.to_bytes()) for request in rest])
    other.engine.run(leader)
    assert first.finished.keys().isdisjoint(second.finished) and first.finished | second.finished == expected


@pytest.mark.parametrize(
    ("tp", "pp", "in_flight"), [(3, 1, None), (1, 2, None), (2, 2, None), (1, 2, 3), (1, 2, 1)]
)
def test_every_mesh_gives_the_same_results_and_lockstep_holds(tiny_store, tokenizer, expected, tp, pp, in_flight):
    ranks = run_mesh(tiny_store, tokenizer, tp, pp, in_flight)
    assert ranks[0].finished == expected
    assert all(run.counts == ranks[0].counts for run in ranks) and ranks[0].peaks["micro_batches"] == (in_flight or pp)


def test_too_little_cache_for_one_sequence_is_refused_with_what_is_needed(tiny_store, tokenizer):
    with pytest.raises(ConfigError, match="4 blocks of 16 tokens") as caught:
        run_engine(tiny_store, tokenizer, num_blocks=4)
    assert f"5 blocks for one sequence of max_model_len={MAX_LEN}" in caught.value.expected


def test_wrong_cache_size_is_refused(tiny_store):
    options = ReplicaOptions(EngineOptions(kv_cache_memory="lots"), "float32", MAX_LEN, SEED)
    with pytest.raises(ConfigError, match="'lots'"):
        build_replica(SerialGroup(), Mesh(1, 1, 1), tiny_store, create_kernels("reference"), options)


@pytest.mark.parametrize("mesh", [Mesh(1, 3, 1), Mesh(1, 1, 9)])
def test_impossible_mesh_is_refused(tiny_store, mesh):
    options = ReplicaOptions(EngineOptions(), "float32", 8, 0)
    with pytest.raises(MeshError):
        build_replica(SerialGroup(), mesh, tiny_store, create_kernels("reference"), options)


def test_max_model_len_is_the_model_s_own_at_most(tiny_store):
    config = tiny_store.config
    assert resolve_max_model_len(config, None) == 256 and resolve_max_model_len(config, 7) == 7
    for wrong in (0, -1, 257):
        with pytest.raises(ConfigError, match=f"--max-model-len {wrong}"):
            resolve_max_model_len(config, wrong)
