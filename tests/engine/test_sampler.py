import numpy as np
import pytest
from thread_group import run_ranks

from hpcinfer.comm.operations import Operations
from hpcinfer.config import SamplingParams
from hpcinfer.engine.batch import LogitRow
from hpcinfer.engine.logits import TokenScore, changes_for, uniform
from hpcinfer.engine.request import Request
from hpcinfer.engine.sampler import RowResult, Sampler, decode_results, encode_results
from hpcinfer.engine.sequence import Sequence
from hpcinfer.kernels import create_kernels
from hpcinfer.kernels.protocol import Draw
from hpcinfer.kernels.sampling import change_row, compact, sample
from hpcinfer.partition.grains import grain_ranges, grain_runs

GRAINS, VOCAB, SEED = 8, 101, 5
EOS = (1,)
REQUESTS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0, logprobs=2),
    SamplingParams(temperature=0, repetition_penalty=1.5, min_tokens=3, max_tokens=5),
    SamplingParams(temperature=0, logit_bias=((60, 50.0), (61, 50.0))),
    SamplingParams(),
    SamplingParams(seed=99, top_k=7, top_p=0.9, logprobs=0),
    SamplingParams(frequency_penalty=1.0, min_p=0.05, stop_token_ids=(50,), min_tokens=2, max_tokens=4, logprobs=20),
    SamplingParams(echo=True, logprobs=3),
]


def logit_rows(params=REQUESTS):
    """A row for each request after two output tokens; prompts are scored at position 1."""
    rows = []
    for i, each in enumerate(params):
        sequence = Sequence(i, Request(10 + i, (3, 90 + i, 60), each), i % 3)
        sequence.token_ids += [7, 60]
        rows.append(LogitRow(sequence, 1 if each.echo else 4, not each.echo))
    return rows


def pad(values):
    """[R, V] as [R, G, U]; columns beyond the true size of a grain hold what would win."""
    ranges = grain_ranges(values.shape[1], GRAINS)
    logits = np.full((len(values), GRAINS, 64), 1e9, np.float32)
    for grain, ids in enumerate(ranges):
        logits[:, grain, : len(ids)] = values[:, ids.start : ids.stop]
    return logits


def sample_on(tp, values, rows):
    """Results of all tp ranks."""
    logits, runs = pad(values), grain_runs(GRAINS, tp)

    def rank_main(group):
        run = runs[group.rank]
        local = np.ascontiguousarray(logits[:, run.start : run.stop])
        sampler = Sampler(create_kernels("reference"), Operations(group), values.shape[1], GRAINS, SEED)
        return sampler.start(local, rows, EOS).finish()

    results = run_ranks(tp, rank_main)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def random_values(num_rows, vocab=VOCAB, seed=0):
    return np.random.default_rng(seed).standard_normal((num_rows, vocab)).astype(np.float32) * 3


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
def test_root_samples_the_same_for_every_tp(tp):
    rows, values = logit_rows(), random_values(len(REQUESTS))
    [root, *others] = sample_on(tp, values, rows)
    assert others == [[]] * (tp - 1)
    for found, row, row_values in zip(root, rows, values, strict=True):
        params, request = row.sequence.request.sampling, row.sequence.request
        u = uniform(SEED if params.seed is None else params.seed, request.row, row.sequence.choice, row.position + 1)
        draw = Draw(params.temperature, params.top_k, params.top_p, params.min_p, u)
        changed = change_row(row_values.copy(), changes_for(row.sequence, row.num_output, EOS, range(VOCAB)))
        chosen = sample(changed, draw, create_kernels("reference"))
        assert found.token_id == (chosen if row.samples else request.prompt_ids[2])
        assert (found.score is not None) == (params.logprobs is not None)
    assert root == sample_on(1, values, rows)[0]


def test_scores_are_of_the_raw_logits():
    rows, values = logit_rows(), random_values(len(REQUESTS))
    results = sample_on(3, values, rows)[0]
    logprobs = values - np.log(np.exp(values.astype(np.float64)).sum(1, keepdims=True))
    for i, found in enumerate(results):
        if found.score is not None:
            assert found.score.token_id == found.token_id
            assert found.score.logprob == pytest.approx(logprobs[i, found.token_id], abs=1e-6)
            best = np.argsort(-values[i], kind="stable")[: rows[i].sequence.request.sampling.logprobs]
            assert [token_id for token_id, _ in found.score.top] == best.tolist()


def test_a_row_s_result_does_not_depend_on_its_company():
    rows, values = logit_rows(), random_values(len(REQUESTS))
    expected = sample_on(2, values, rows)[0]
    order = [5, 2, 7, 0, 6, 1, 4, 3]
    assert sample_on(2, values[order], [rows[i] for i in order])[0] == [expected[i] for i in order]
    assert [sample_on(2, values[i : i + 1], rows[i : i + 1])[0][0] for i in range(len(rows))] == expected


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
def test_of_equal_logits_the_lowest_id_wins_across_shards(tp):
    greedy = [SamplingParams(temperature=0), SamplingParams(temperature=0, logprobs=3)]
    for tied in ((12, 13), (20, 70), (0, 100), (55, 56, 99)):
        values = np.full((2, VOCAB), -1.0, np.float32)
        values[:, list(tied)] = 4.0
        found = sample_on(tp, values, logit_rows(greedy))[0]
        assert [result.token_id for result in found] == [tied[0]] * 2
        assert [i for i, _ in found[1].score.top][: len(tied)] == list(tied)


@pytest.mark.parametrize("tp", [1, 3, 8])
@pytest.mark.filterwarnings("error")
def test_forbidden_and_broken_rows_give_one_token_on_every_mesh(tp):
    values = np.full((4, VOCAB), -np.inf, np.float32)
    values[1, 77] = -1e30
    values[2, 30:] = np.nan
    values[3, 40] = np.inf
    for params in (SamplingParams(temperature=0), SamplingParams(), SamplingParams(temperature=0, logprobs=1)):
        found = sample_on(tp, values, logit_rows([params] * 4))[0]
        assert [result.token_id for result in found] == [0, 77, 0, 40]


@pytest.mark.parametrize("tp", [1, 4, 8])
def test_fewer_ids_than_grains_leave_ranks_without_any(tp):
    params = [SamplingParams(temperature=0), SamplingParams(), SamplingParams(temperature=0, logprobs=5)]
    rows, values = logit_rows(params), random_values(3, vocab=5)
    found = sample_on(tp, values, rows)[0]
    assert found[0].token_id == values[0].argmax() and len(found[2].score.top) == 5
    assert found == sample_on(1, values, rows)[0]


def test_end_of_sequence_is_kept_away_on_the_rank_that_has_it():
    params = [SamplingParams(temperature=0, min_tokens=3, max_tokens=9), SamplingParams(temperature=0)]
    values = np.zeros((2, VOCAB), np.float32)
    values[:, 1], values[:, 80] = 9, 8
    assert [result.token_id for result in sample_on(4, values, logit_rows(params))[0]] == [80, 1]


class Counting:
    """A group that counts the elements which it gathers."""

    def __init__(self, group):
        self._group, self.rank, self.size, self.num_gathered = group, group.rank, group.size, 0

    def gather(self, send, receive, counts):
        self.num_gathered += sum(counts)
        self._group.gather(send, receive, counts)


def test_whole_rows_travel_where_arrays_do_and_pairs_where_bytes_do():
    rows, values = logit_rows(), random_values(len(REQUESTS))

    def rank_main(group):
        host, arrays = Counting(Operations(group)), Counting(Operations(group))
        local = np.ascontiguousarray(pad(values)[:, 4 * group.rank : 4 * group.rank + 4])
        sampler = Sampler(create_kernels("reference"), host, VOCAB, GRAINS, SEED, arrays)
        return sampler.start(local, rows, EOS).finish(), host.num_gathered, arrays.num_gathered

    num_short = 3
    root, other = run_ranks(2, rank_main)
    assert root == (sample_on(1, values, rows)[0], 2 * 2 * num_short, (len(rows) - num_short) * GRAINS * 64)
    assert other == ([], *root[1:])


def test_compact_drops_padding():
    values = random_values(3)
    sizes = tuple(map(len, grain_ranges(VOCAB, GRAINS)))
    assert np.array_equal(compact(pad(values), sizes), values)


SCORE = TokenScore(2**31 - 1, -0.1, ((2**31 - 1, -0.1), (0, -float("inf"))))


@pytest.mark.parametrize("results", [
    [], [RowResult(5, None)], [RowResult(0, None), RowResult(2**31 - 1, SCORE), RowResult(7, None)],
    [RowResult(1, TokenScore(1, 0.1 + 0.2, ()))] * 3,
])  # fmt: skip
def test_results_survive_their_bytes(results):
    decoded = decode_results(encode_results(results), len(results))
    assert decoded == results
    assert all(result.score is None or type(result.score) is TokenScore for result in decoded)


def test_tokens_alone_travel_as_four_bytes_each():
    assert len(encode_results([RowResult(5, None)] * 64)) == 256
