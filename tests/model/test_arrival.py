"""Parts of a stage that arrive one by one: each is waited for, what fails is told, and the memory is foreseen."""

import threading
import time
from queue import Queue

import numpy as np
import pytest
from models import make_tiny_model
from stages import native_was_built

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.errors import RankFailedError, StoreError
from hpcinfer.kernels import create_kernels
from hpcinfer.model.arrival import ArrivingStage, prepared_bytes
from hpcinfer.model.shard import shard_plan
from hpcinfer.model.weights_of import LoadOptions, load_stage
from hpcinfer.partition.mesh import Coord, Mesh
from hpcinfer.report.metrics import WEIGHTS, Metrics
from hpcinfer.weights.conversion import Recipe, convert
from hpcinfer.weights.reader import Store

NUM_LAYERS = 3


class Feed:
    """Gives parts when it is told to."""

    def __init__(self):
        self.parts, self.metrics = Queue(), Metrics()
        self.stage = ArrivingStage(self._take, NUM_LAYERS, 500, self.metrics, time.monotonic())
        self.stage.start()

    def _take(self):
        for _ in range(NUM_LAYERS + 2):
            part = self.parts.get(timeout=20)
            if isinstance(part, Exception):
                raise part
            yield part

    def give(self, *parts):
        for part in parts:
            self.parts.put(part)


def test_a_layer_can_be_used_before_the_next_one_is_there():
    feed, seen = Feed(), Queue()
    user = threading.Thread(target=lambda: [seen.put(layer) for layer in feed.stage.layers])
    user.start()
    feed.give("embed")
    assert feed.stage.embed == "embed" and seen.empty()
    for layer in ("a", "b", "c"):
        feed.give(layer)
        assert seen.get(timeout=20) == layer and seen.empty()
    user.join()
    assert not feed.stage.is_complete
    feed.give("head")
    assert feed.stage.head == "head"
    feed.stage.wait()
    assert feed.stage.is_complete and feed.stage.layers == ("a", "b", "c")
    assert feed.metrics.seconds[WEIGHTS] > 0 and feed.metrics.moves >= 3
    first, last = feed.stage.seconds().values()
    assert 0 < first <= last


def test_layers_are_counted_and_found_by_place_though_they_are_not_there():
    feed = Feed()
    assert len(feed.stage.layers) == NUM_LAYERS
    feed.give("embed", "a", "b", "c", "head")
    assert (feed.stage.layers[0], feed.stage.layers[-1], list(feed.stage.layers[1:])) == ("a", "c", ["b", "c"])


def test_what_fails_is_told_to_whom_it_concerns():
    feed = Feed()
    feed.give("embed", "a", StoreError("flipped"))
    assert feed.stage.layers[0] == "a"
    for _ in range(2):
        with pytest.raises(StoreError, match="flipped"):
            list(feed.stage.layers)
    with pytest.raises(StoreError, match="flipped"):
        feed.stage.head  # noqa: B018
    feed.stage.wait()
    assert feed.stage.embed == "embed" and not feed.stage.is_complete


def test_an_error_of_a_layer_is_never_taken_for_the_last_one():
    feed = Feed()
    feed.give("embed", "a", IndexError("in preparing it"))
    with pytest.raises(IndexError, match="preparing"):
        list(feed.stage.layers)


def test_who_waits_for_all_is_seen_to_move_with_each_part():
    feed = Feed()
    waiting = threading.Thread(target=feed.stage.wait)
    waiting.start()
    for count, part in enumerate(("embed", "a", "b", "c", "head"), 1):
        while feed.metrics.moves < count:
            time.sleep(0.001)
        feed.give(part)
    waiting.join(20)
    assert not waiting.is_alive() and feed.metrics.moves == 5 and feed.stage.error is None


def test_who_waits_is_told_of_a_death():
    feed, looks = Feed(), iter(range(2))
    feed.give("embed", "a")

    def look():
        if next(looks, None) is None:
            raise RankFailedError("rank 1 has died")

    feed.stage.while_waiting = look
    with pytest.raises(RankFailedError):
        list(feed.stage.layers)
    feed.stage.while_waiting = lambda: None
    feed.give("b", "c", "head")
    assert list(feed.stage.layers) == ["a", "b", "c"]


def test_memory_to_come_shrinks_with_what_is_there():
    feed, sizes = Feed(), []
    for part in ("embed", "a", "b", "c", "head"):
        sizes.append(feed.stage.bytes_to_come)
        feed.give(part)
        while feed.stage.bytes_to_come == sizes[-1]:
            time.sleep(0.001)
    assert sizes == [500, 400, 300, 200, 100] and feed.stage.bytes_to_come == 0


def _bytes_of(prepared):
    """Memory of the numpy arrays and packed weights of a prepared part."""
    return sum(each.values.nbytes for each in prepared)


@pytest.mark.skipif(not native_was_built(), reason="the native kernels were not built")
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_memory_is_foreseen(tmp_path, is_tied, quantize):
    model = make_tiny_model(tmp_path / "model", "qwen2", dtype="bfloat16", hidden_size=128, intermediate_size=512,
                            tie_word_embeddings=is_tied)  # fmt: skip
    convert(model, tmp_path / "store", SerialGroup(), Recipe(quantization=quantize))
    with Store.open(tmp_path / "store") as store:
        plan = shard_plan(store.config, store.grains, Mesh(1, 1, 1), Coord(0, 0, 0))
        kernels = create_kernels("native")
        stage = load_stage(store, kernels, plan, LoadOptions(max_len=8))
        weights = [kernels.give_back(stage.head, "lm_head", plan.run)]
        for layer in stage.layers:
            weights += [kernels.give_back(layer.attention, name, range(store.spec(f"layers.0.{name}.weight").shape[0]))
                        for name in ("q_proj", "k_proj", "v_proj", "o_proj")]  # fmt: skip
            weights += [kernels.give_back(layer.mlp, name, plan.run) for name in ("gate_proj", "up_proj", "down_proj")]
        table = store.read("embed_tokens.weight").values
        held = table.nbytes + _bytes_of(weights)
        assert np.isclose(prepared_bytes(store, store.config, plan), held, rtol=0.1)
