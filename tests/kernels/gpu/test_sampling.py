"""Sampling on a GPU: ids are those of CPUs, whatever the company of a row and the way they are found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hpcinfer.kernels import create_kernels
from hpcinfer.kernels.protocol import Changes, Draw

REFERENCE, SIZES, WIDTH = create_kernels("reference"), (40, 0, 33, 27), 48
NUM_IDS = sum(SIZES)
TIED = np.repeat(np.float32([2, 2.5, 3, 1]), 25)
DRAWS = [
    Draw(0.0), Draw(1.0), Draw(0.7), Draw(1.0, top_k=1), Draw(1.3, top_k=7), Draw(1.0, top_p=0.87),
    Draw(2.0, top_p=1e-6), Draw(0.9, top_k=11, top_p=0.61), Draw(1.0, min_p=0.0731), Draw(1.0, 5, 0.77, 0.0331),
    Draw(1e-30), Draw(3.0, top_k=90), Draw(1.0, top_k=1000, top_p=0.999), Draw(0.0, known_id=17),
]  # fmt: skip


def padded(rows):
    """Rows [R, V] as [R, G, U]; columns beyond the true size of a grain hold what would win."""
    logits, first = np.full((len(rows), len(SIZES), WIDTH), 1e9, np.float32), 0
    for grain, size in enumerate(SIZES):
        logits[:, grain, :size] = rows[:, first : first + size]
        first += size
    return logits


def random_rows(num_rows, seed=0, spread=2.5):
    return np.random.default_rng(seed).standard_normal((num_rows, NUM_IDS)).astype(np.float32) * np.float32(spread)


@pytest.fixture(scope="module")
def kernels(make):
    return make()


def drawn(kernels, rows, draws):
    return kernels.host(kernels.draw(kernels.device(padded(rows)), SIZES, draws)).tolist()


def expected(rows, draws):
    return REFERENCE.draw(padded(rows), SIZES, draws).tolist()


def at_random(draws, seed):
    us = np.random.default_rng(seed).random(len(draws))
    return [draw._replace(u=float(u)) for draw, u in zip(draws, us, strict=True)]


@pytest.mark.parametrize("block", [64, 16])
@pytest.mark.parametrize("seed", range(2))
def test_ids_are_those_of_cpus(kernels, monkeypatch, seed, block):
    from hpcinfer.kernels.gpu import sampling

    monkeypatch.setattr(sampling, "_blocks", lambda width: {"BLOCK": block, "num_warps": 1})
    draws = at_random(DRAWS, seed)
    rows = random_rows(len(draws), seed)
    assert drawn(kernels, rows, draws) == expected(rows, draws)


@pytest.mark.parametrize("limit", [1, 16])
def test_what_few_candidates_cannot_tell_is_searched_for(kernels, monkeypatch, limit):
    from hpcinfer.kernels.gpu import sampling

    monkeypatch.setattr(sampling, "_CANDIDATES", limit)
    draws = at_random(DRAWS[3:10], limit)
    for rows in (random_rows(len(draws), limit), np.tile(TIED, (len(draws), 1)), random_rows(len(draws), 9, 0.01)):
        assert drawn(kernels, rows, draws) == expected(rows, draws)


@pytest.mark.parametrize("draw", [Draw(1.0), Draw(1.0, top_k=30), Draw(1.0, top_p=0.9), Draw(1.0, 60, 0.7)], ids=str)
def test_equal_logits_are_ordered_by_id(kernels, draw):
    draws = [draw._replace(u=float(u)) for u in np.linspace(0.003, 0.997, 12)]
    rows = np.tile(TIED, (len(draws), 1))
    assert drawn(kernels, rows, draws) == expected(rows, draws)


def test_no_id_depends_on_the_company_of_its_row(kernels):
    draws = at_random(DRAWS, 7)
    rows = random_rows(len(draws), 7)
    together = drawn(kernels, rows, draws)
    assert [drawn(kernels, rows[i : i + 1], draws[i : i + 1])[0] for i in range(len(draws))] == together
    order = np.random.default_rng(0).permutation(len(draws)).tolist()
    assert drawn(kernels, rows[order], [draws[i] for i in order]) == [together[i] for i in order]
    assert drawn(kernels, rows[:0], []) == []


@pytest.mark.parametrize(("values", "token_id"), [
    ({}, 0), ({77: -1e30}, 77), ({5: np.nan, 50: 3.0, 60: 3.0}, 50), ({8: np.nan}, 0), ({3: 1.0, 40: np.inf}, 40),
    ({9: -0.0, 3: -1.0, 80: 0.0}, 9),
])  # fmt: skip
def test_broken_and_forbidden_rows_give_the_best_id(kernels, values, token_id):
    rows = np.full((4, NUM_IDS), -np.inf, np.float32)
    rows[:, list(values)] = list(values.values())
    draws = [Draw(0.0), Draw(1e-3, u=0.1), Draw(1e-3, 3, u=0.1), Draw(1e-3, 0, 0.9, u=0.1)]
    assert drawn(kernels, rows, draws) == [token_id] * 4 == expected(rows, draws)
    best = kernels.argmax(kernels.device(padded(rows)), SIZES)
    found = REFERENCE.argmax(padded(rows), SIZES)
    assert kernels.host(best.places).tolist() == [token_id] * 4 == found.places.tolist()
    assert kernels.host(best.values).tolist() == found.values.tolist()


def test_the_best_is_that_of_cpus_with_changes_and_without(kernels):
    logits = padded(np.round(random_rows(6)))  # many ties
    numbers = np.float32([[-np.inf, 9, 0], [1, 1, 2], [0, 0, 1]]), np.float32([[0, 30], [3, 1], [0, 1]])
    changes = {1: Changes(np.array([3, 41, 99]), *numbers[0]), 4: Changes(np.array([0, 72]), *numbers[1])}
    there = kernels.device(logits)
    for each in ({}, changes):
        best, found = kernels.argmax(there, SIZES, each), REFERENCE.argmax(logits, SIZES, each)
        assert [kernels.host(part).tolist() for part in best] == [part.tolist() for part in found]
    draws = [Draw(1.0, 5, u=0.3, changes=changes.get(i)) for i in range(6)]
    assert kernels.host(kernels.draw(there, SIZES, draws)).tolist() == REFERENCE.draw(logits, SIZES, draws).tolist()
    assert kernels.host(there).tobytes() == logits.tobytes()
    none = kernels.argmax(there[:, :1].contiguous(), (0,))
    assert kernels.host(none.values).tolist() == [-np.inf] * 6 and kernels.host(none.places).tolist() == [0] * 6


def test_scores_are_those_of_cpus(kernels):
    logits, ids = padded(np.round(random_rows(5) * 4) / 4), np.array([0, 39, 40, 72, 99])
    logits[2, 0, 7] = -np.inf
    there = kernels.device(logits), SIZES, torch.from_numpy(ids).to(kernels.device(logits).device)
    for num_top in (0, 7, 200):
        found, wanted = kernels.score(*there, num_top), REFERENCE.score(logits, SIZES, ids, num_top)
        for name in ("values", "top_ids", "top_values"):
            assert kernels.host(getattr(found, name)).tolist() == getattr(wanted, name).tolist()
        np.testing.assert_allclose(kernels.host(found.log_sums), wanted.log_sums, rtol=1e-6)
    alone = kernels.score(there[0][3:4], SIZES, there[2][3:4], 0)
    assert kernels.host(alone.log_sums)[0] == kernels.host(found.log_sums)[3]
    stats, expected = kernels.grain_stats(there[0], SIZES), REFERENCE.grain_stats(logits, SIZES)
    assert kernels.host(stats.maxima).tolist() == expected.maxima.tolist()
    np.testing.assert_allclose(kernels.host(stats.exp_sums), expected.exp_sums, rtol=1e-6)


@pytest.mark.parametrize("draw", [Draw(0.8, top_k=7, top_p=0.9), Draw(1.0, min_p=0.1)], ids=str)
def test_draws_follow_the_distribution(kernels, draw):
    row, num_draws = np.float32([0.3, 1, 2.2, -1, 1, 0.6, 1.7, 0.2]), 150
    logits = kernels.device(np.tile(row.reshape(2, 4), (num_draws, 1, 1)))
    draws = [draw._replace(u=float(u)) for u in np.random.default_rng(11).random(num_draws)]
    counts = np.bincount(kernels.host(kernels.draw(logits, (4, 4), draws)), minlength=8)
    weights = np.exp((row.astype(np.float64) - row.max()) / draw.temperature)
    weights[weights < draw.min_p] = 0
    order = np.lexsort((np.arange(8), -row))[: draw.top_k or 8]
    kept = order[: np.searchsorted(np.cumsum(weights[order]), draw.top_p * weights[order].sum() - 1e-9) + 1]
    expected = np.zeros(8)
    expected[kept] = weights[kept] / weights[kept].sum() * num_draws
    assert 3 < np.count_nonzero(expected) < 8 and not counts[expected == 0].any()
    is_kept = expected > 0
    chi_square = ((counts - expected)[is_kept] ** 2 / expected[is_kept]).sum()
    assert chi_square < 22.5  # the 0.999 quantile for 6 degrees of freedom


def test_kernels_compile_for_hopper(device, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_sampling.py")
    done = subprocess.run([sys.executable, script], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    launches = json.loads(done.stdout)
    names = {f"{name}_kernel" for name in ("draw", "narrow", "choose", "search", "_top", "_stats")}
    assert {each["kernel"] for each in launches} == names
    assert not any(each["contracted"] or each["imprecise"] for each in launches)


class Event:
    """An event of a device that is reached after some looks."""

    def __init__(self, num_looks):
        self.num_looks = num_looks

    def query(self):
        self.num_looks -= 1
        return self.num_looks < 0


def test_a_rank_that_waits_for_its_device_looks_after_the_others(make, monkeypatch):
    from hpcinfer.kernels.gpu.arrays import GpuArrays

    kernels, looks = make(), []
    assert kernels.fetch([kernels.empty((1,))]).is_late
    monkeypatch.setattr(GpuArrays, "mark", lambda self: Event(3))
    fetch = kernels.fetch([kernels.device(np.float32([1, 2])), kernels.device(np.arange(3))])
    kernels.while_waiting = lambda: looks.append(1)
    assert [each.tolist() for each in fetch.wait()] == [[1, 2], [0, 1, 2]] and len(looks) == 3
    kernels.while_waiting = None
    assert kernels.host(kernels.take(kernels.device(np.float32([5, 6, 7])), [2, 0])).tolist() == [7, 5]

    def die():
        raise RuntimeError("a rank has died")

    kernels.while_waiting = die
    with pytest.raises(RuntimeError, match="has died"):
        kernels.fetch([kernels.empty((1,))]).wait()
