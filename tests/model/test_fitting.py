"""Batches that do not fit into memory are computed in pieces, on any rank, and no bit changes."""

import logging

import numpy as np
import pytest
import stages
from models import make_tiny_model
from stages import MemoryStore, run_replica

from hpcinfer.errors import ConfigError
from hpcinfer.kernels import create_kernels

LENGTHS = (1, 40, 9, 2)


class Scarce:
    """Kernels that have no memory for more than so many tokens, or rows of logits."""

    can_join = True

    def __init__(self, most):
        self._kernels, self._most, self.refused = create_kernels("reference"), most, []

    def __getattr__(self, name):
        return getattr(self._kernels, name)

    def attention(self, x, layer, step, cache, spans, out=None):
        assert len(x) == len(step.positions)
        return self._if_it_fits(len(x)) or self._kernels.attention(x, layer, step, cache, spans, out)

    def mlp(self, x, layer, spans, out=None):
        return self._if_it_fits(len(x)) or self._kernels.mlp(x, layer, spans, out)

    def logits(self, x, rows, head):
        return self._if_it_fits(len(rows)) or self._kernels.logits(x, rows, head)

    def join(self, parts):
        if not self.can_join:
            raise MemoryError
        return self._kernels.join(parts)

    def _if_it_fits(self, count):
        if count > self._most:
            self.refused.append(count)
            raise MemoryError


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return MemoryStore(make_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", num_hidden_layers=2))


@pytest.fixture(scope="module")
def token_ids(store):
    return [np.random.default_rng(0).integers(0, store.config.vocab_size, length) for length in LENGTHS]


def run_scarce(monkeypatch, store, token_ids, most, **options):
    """Logits, and what was refused on each rank: ranks have so much memory each."""
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(stages, "create_kernels", lambda *a, **k: made.append(Scarce(most[len(made)])) or made[-1])
        found = run_replica(store, token_ids, tp=len(most), **options)
    return found, [kernels.refused for kernels in made]


@pytest.mark.parametrize("most, options", [
    ([5], {}), ([1], {}), ([3, 1000], {}), ([1000, 7], {"overlap": "always"}), ([6], {"chunk": 20, "block_size": 5}),
], ids=str)  # fmt: skip
def test_no_bit_changes_where_memory_is_scarce(monkeypatch, store, token_ids, most, options):
    expected = run_replica(store, token_ids)
    found, refused = run_scarce(monkeypatch, store, token_ids, most, **options)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(found, expected, strict=True))
    assert [bool(each) for each in refused] == [each < 1000 for each in most]


def test_what_did_not_fit_is_not_tried_again_in_the_same_batch(monkeypatch, store, token_ids):
    _, [refused] = run_scarce(monkeypatch, store, token_ids, [30])
    assert refused == [52, 52]  # of 52 tokens: half a layer, and all logits


def test_layers_that_do_not_fit_as_a_whole_are_run_half_by_half(monkeypatch, store, token_ids):
    refused = []

    class Scant(Scarce):
        def whole_layers(self, layers, caches):
            def run(x, step):
                refused.append(len(x))
                raise MemoryError

            return run

    monkeypatch.setattr(stages, "create_kernels", lambda *a, **k: Scant(5))
    found = run_replica(store, token_ids)
    monkeypatch.undo()
    expected = run_replica(store, token_ids)
    assert refused == [52] and all(a.tobytes() == b.tobytes() for a, b in zip(found, expected, strict=True))


def test_it_is_said_once(monkeypatch, store, token_ids, caplog):
    with caplog.at_level(logging.WARNING, "hpcinfer.model.fitting"):
        run_scarce(monkeypatch, store, token_ids, [2])
    assert [record.getMessage() for record in caplog.records] == [
        "no memory for 52 tokens at once: they are computed in pieces, more slowly"
    ]


def test_a_token_that_does_not_fit_is_an_error(monkeypatch, store, token_ids):
    with pytest.raises(ConfigError, match="one token"):
        run_scarce(monkeypatch, store, token_ids, [0])


def test_what_finds_no_memory_as_a_whole_is_an_error_that_says_what_helps(monkeypatch, store, token_ids):
    monkeypatch.setattr(Scarce, "can_join", False)
    with pytest.raises(ConfigError, match="no memory for what 2 tokens") as caught:
        run_scarce(monkeypatch, store, token_ids[:1] * 2, [1])
    assert "--max-num-batched-tokens" in caught.value.hint
