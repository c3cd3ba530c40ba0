"""Decode batches from recordings have the bits of those without, write nothing else, and know no number by heart."""

import contextlib
import gc
import logging
import weakref
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import make_tiny_model
from recordings import Again
from stages import MemoryStore
from steps import Chunk, block_tables, packed_step

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.comm.tree import TreeReducer
from hpcinfer.engine import groups
from hpcinfer.errors import HpcInferError
from hpcinfer.model.decoder import CacheShape, Stage, allocate_cache
from hpcinfer.model.shard import shard_plan
from hpcinfer.model.weights_of import LoadOptions, load_stage
from hpcinfer.partition.mesh import Coord, Mesh

LENGTHS = [253, 70, 1, 30, 5]  # tokens that are in the cache before
# at the fourth the first sequence gets a second split: three recordings are made, and launched five times
BATCHES = [[0, 1, 2], [2, 0, 3], [1, 2, 0], [0, 3, 4], [4, 1, 0], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [3, 4, 0], [1]]


class Broken(Again):
    """Records nothing."""

    def record(self, run):
        self.num_recorded += 1
        raise torch.OutOfMemoryError("nothing left")


class Outcome(NamedTuple):
    """What a generation came to."""

    logits: list[bytes]
    cache: bytes


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = make_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", num_hidden_layers=2, head_dim=4, **sizes)
    return MemoryStore(model, grains=2)


@pytest.fixture
def make_kernels(make, device, monkeypatch):
    """Makes kernels whose decode batches are recorded by something."""
    from hpcinfer.kernels.gpu import gpu

    def with_graphs(graphs, **options):
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "graphs_of", lambda device: lambda: graphs)
            return make(dtype="float16", **options)

    return with_graphs


def make_stages(kernels, store, pp=1):
    tables, num_blocks = block_tables([length + len(BATCHES) for length in LENGTHS], 16)
    stages = []
    for coord in (Coord(0, place, 0) for place in range(pp)):
        plan = shard_plan(store.config, store.grains, Mesh(1, pp, 1), coord)
        weights = load_stage(store, kernels, plan, LoadOptions("float16", max_len=1100))
        cache = allocate_cache(kernels, store.config, plan, CacheShape(num_blocks, 16, "float16"))
        for number, layer in enumerate(cache):
            random = np.random.default_rng([*plan.layers][number])
            for part in layer[:2]:
                part.copy_(torch.from_numpy(random.standard_normal(tuple(part.shape), np.float32)))
        reducer = TreeReducer(SerialGroup(), store.grains, kernels.empty)
        stages.append(Stage(store.config, plan, weights, kernels, reducer, cache=cache))
    return stages, tables


def generate(kernels, store, pp=1, batches=BATCHES):
    """Decode greedily, in these batches."""
    stages, tables = make_stages(kernels, store, pp)
    lengths, logits = list(LENGTHS), []
    ids = [np.full(length + len(BATCHES), 7 + s) for s, length in enumerate(lengths)]
    for batch in batches:
        chunks = [Chunk(s, lengths[s], lengths[s] + 1) for s in batch]
        step, hidden = packed_step(chunks, ids, tables, 16), None
        for stage in stages:
            hidden = stage.forward(step, hidden)
        rows = hidden.cpu().numpy().reshape(len(batch), -1)
        logits.append(rows.tobytes())
        for s, row in zip(batch, rows, strict=True):
            lengths[s] += 1
            ids[s][lengths[s]] = row.argmax() % 97
    cache = [part.cpu().numpy().tobytes() for stage in stages for layer in stage.cache for part in layer[:2]]
    return Outcome(logits, b"".join(cache))


@pytest.fixture(scope="module")
def expected(make, store):
    return generate(make(dtype="float16", graphs=False), store)


def test_no_bit_depends_on_recordings(make_kernels, store, expected):
    again = Again()
    found = generate(make_kernels(again), store)
    assert found.logits == expected.logits
    assert len(found.cache) == len(expected.cache) and found.cache == expected.cache
    assert again.num_recorded == 3 and again.num_launched == 5


def test_each_of_two_stages_has_recordings(make_kernels, store, expected):
    again = Again()
    assert generate(make_kernels(again), store, pp=2, batches=BATCHES[:3]).logits == expected.logits[:3]
    assert again.num_recorded == 2 and again.num_launched == 4


def test_no_bit_depends_on_graphs_of_a_gpu(make, device, store, expected):
    if device.type != "cuda":
        pytest.skip("no GPU here")
    assert generate(make(dtype="float16"), store) == expected == generate(make(dtype="float16"), store, pp=2)


def test_where_nothing_can_be_recorded_it_is_said_once(make_kernels, store, expected, caplog):
    broken = Broken()
    with caplog.at_level(logging.WARNING, "hpcinfer.kernels.gpu.graphs"):
        assert generate(make_kernels(broken), store, batches=BATCHES[:3]).logits == expected.logits[:3]
    assert [record.getMessage() for record in caplog.records] == [
        "decode steps are not recorded, and wait for their launches: nothing left"
    ]
    assert broken.num_recorded == 1


def decode_step(context_lens, block_size=16):
    tables, _ = block_tables(list(context_lens), block_size)
    chunks = [Chunk(s, length - 1, length) for s, length in enumerate(context_lens)]
    return packed_step(chunks, [np.arange(length) for length in context_lens], tables, block_size)


@pytest.fixture(scope="module")
def modules(device):
    """Those that are tested."""
    from hpcinfer.kernels.gpu import graphs, memory, plan, step

    return {"graphs": graphs, "memory": memory, "plan": plan, "step": step}


contexts = st.lists(st.integers(1, 300) | st.integers(1000, 9000), min_size=1, max_size=70)


@given(contexts, st.integers(1, 16), st.sampled_from([0, 1, 700, 2000]), st.sampled_from([16, 64]))
def test_there_is_room_for_all_batches_of_a_shape(modules, context_lens, group_size, window, rows):
    graphs, key = modules["graphs"], modules["plan"].PlanKey(group_size, window, rows)
    step = decode_step(context_lens)
    shape = graphs.shape_of(step)
    batch, memory = graphs.padded(step, shape.size), torch.zeros(200_000, dtype=torch.int32)
    keys = [modules["plan"].PlanKey(3, 64, 64), key]
    fixed = modules["step"].FixedStep(decode_step([1] * shape.size), keys, shape.num_items, memory)
    memory.fill_(-7)
    fixed.take(batch)
    assert fixed.token_ids.tolist() == batch.token_ids.tolist()
    assert fixed.places.positions.tolist() == batch.positions.tolist()
    assert fixed.places.slots.tolist() == batch.slots.tolist()
    assert fixed.places.block_tables[: len(batch.block_tables)].tolist() == batch.block_tables.tolist()
    for each in keys:
        found, plan = modules["plan"].plan_items(batch, each), fixed.plan(each)
        assert found.num_partial <= plan.num_partial
        for there, wanted in ((plan.items, found.items), (plan.merged, found.merged)):
            assert there[: len(wanted)].tolist() == wanted.tolist() and not there[len(wanted) :].any()


@given(contexts)
def test_padding_repeats_the_last_token_up_to_the_next_size(modules, context_lens):
    step = decode_step(context_lens)
    size = modules["graphs"].shape_of(step).size
    assert min(s for s in modules["graphs"].SIZES if s >= len(context_lens)) == size
    batch, count = modules["graphs"].padded(step, size), len(context_lens)
    for name in ("token_ids", "positions", "slots"):
        assert getattr(batch, name)[:count].tolist() == getattr(step, name).tolist()
        assert set(getattr(batch, name)[count:]) <= {getattr(step, name)[-1]}
    assert batch.query_starts.tolist() == [*range(count), size] and step.query_starts[-1] == count


def test_what_is_no_decoding_or_too_large_is_not_recorded(modules):
    shape_of, sizes = modules["graphs"].shape_of, modules["graphs"].SIZES
    assert all(size % 8 == 0 for size in sizes if size > 4) and list(sizes) == sorted(sizes) and 64 in sizes
    tables, _ = block_tables([5, 3], 16)
    mixed = packed_step([Chunk(0, 4, 5), Chunk(1, 0, 3)], [np.arange(5)] * 2, tables, 16)
    assert shape_of(mixed) is None
    assert shape_of(decode_step([1] * 512)).size == 512 and shape_of(decode_step([1] * 513)) is None
    assert shape_of(decode_step([500_000] * 8)) is not None and shape_of(decode_step([500_000] * 9)) is None


def make_recorder(modules, graphs):
    steps = modules["step"].Steps(lambda step: modules["step"].DeviceStep(step, torch.device("cpu")))
    return steps, modules["graphs"].Recorders(lambda: graphs, steps, torch.device("cpu"))


class Owner:
    """Whose layers are recorded."""


def test_a_rank_that_is_not_alone_must_record(modules):
    _, recorders = make_recorder(modules, Broken())
    owner, step = Owner(), decode_step([3])
    recorders.run(step, None, lambda batch, x: torch.ones(1, 4), owner, is_alone=False)
    with pytest.raises(HpcInferError, match="could not be recorded: nothing left"):
        recorders.run(step, None, lambda batch, x: torch.ones(1, 4), owner, is_alone=False)


def test_only_the_recorded_batch_is_known_meanwhile(modules):
    steps, recorders = make_recorder(modules, Again())
    owner, other = Owner(), decode_step([4])

    def work(batch, x):
        steps.find(other)
        return torch.ones(1, 4)

    recorders.run(decode_step([3]), None, work, owner, is_alone=True)
    with pytest.raises(RuntimeError, match="not the one"):
        recorders.run(decode_step([3]), None, work, owner, is_alone=True)
    steps.find(other)


def test_recordings_end_with_their_owner(modules):
    class Forgetful(Again):
        def record(self, run):
            return lambda: None

    _, recorders = make_recorder(modules, Forgetful())
    owner = Owner()
    for _ in range(2):
        recorders.run(decode_step([3]), None, lambda batch, x: torch.ones(1, 4), owner, is_alone=True)
    recorder = weakref.ref(recorders._recorders[owner])
    assert recorder() is not None
    del owner
    gc.collect()
    assert recorder() is None


def test_a_result_outlives_the_next_one(modules):
    _, recorders = make_recorder(modules, Again())
    owner, inputs = Owner(), [torch.full((3, 2), float(number)) for number in range(4)]
    found = [recorders.run(decode_step([3] * 3), x, lambda batch, x: x.add_(1), owner, is_alone=True) for x in inputs]
    assert [out.tolist() for out in found] == [[[number + 1.0] * 2] * 3 for number in range(4)]


class Stream:
    """A stream that notes what waits for what."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class Graph:
    """A graph whose recording fails at its end, if it has failed before."""

    def __init__(self, log):
        self.log, self.is_broken = log, False

    def capture_begin(self, pool, capture_error_mode):
        self.log.append(f"begin in {pool}")

    def capture_end(self):
        self.log.append("end")
        if "failure" in self.log:
            raise RuntimeError("invalidated")

    def replay(self):
        self.log.append("replay")


@pytest.fixture
def torch_graphs(modules, monkeypatch):
    log = []
    current = Stream("current", log)

    @contextlib.contextmanager
    def stream(side):
        log.append("on side")
        yield
        log.append("off side")

    fakes = {"Stream": lambda device: Stream("side", log), "graph_pool_handle": lambda: "pool",
             "current_stream": lambda: current, "stream": stream, "CUDAGraph": lambda: Graph(log)}  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return modules["graphs"].TorchGraphs(torch.device("cuda")), log


def test_streams_wait_for_each_other_around_the_first_run(torch_graphs):
    graphs, log = torch_graphs
    assert graphs.warm_up(lambda: log.append("run") or 5) == 5
    assert log == ["side waits for current", "on side", "run", "off side", "current waits for side"]


def test_graphs_share_a_pool_and_replay_what_was_captured(torch_graphs):
    graphs, log = torch_graphs
    graphs.record(lambda: log.append("run"))()
    assert log == ["on side", "begin in pool", "run", "end", "off side", "replay"]


def test_a_capture_that_fails_is_ended_and_its_first_error_told(torch_graphs):
    graphs, log = torch_graphs

    def fail():
        log.append("failure")
        raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        graphs.record(fail)
    assert log[-2:] == ["failure", "end"]


def test_a_batch_that_does_not_fit_into_a_gpu_comes_in_pieces(make, store, monkeypatch):
    from hpcinfer.kernels.gpu import rows

    kernels, found, refused = make(dtype="float16"), [], []
    rotate = rows.rotate_and_store

    def rotate_few(qkv, *args):
        if len(qkv) > 3:
            refused.append(len(qkv))
            raise torch.OutOfMemoryError("no room")
        return rotate(qkv, *args)

    for function in (rotate, rotate_few):
        monkeypatch.setattr(rows, "rotate_and_store", function)
        [stage], tables = make_stages(kernels, store)
        step = packed_step([Chunk(3, 0, 7), Chunk(4, 2, 5)], [np.arange(50)] * 5, tables, 16)
        found.append(stage.forward(step).cpu().numpy().tobytes())
    assert found[0] == found[1] and refused == [10, 4]


@pytest.mark.parametrize("is_capturing", [False, True])
def test_no_memory_is_an_error_of_python_except_in_a_recording(modules, monkeypatch, is_capturing):
    freed = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))

    @modules["memory"].answers_memory
    def fail():
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError if is_capturing else MemoryError, match="no room"):
        fail()
    assert freed == [] if is_capturing else [True]


def test_a_recorded_batch_has_few_more_tokens(modules):
    assert np.diff(modules["graphs"].SIZES).max() <= groups._PADDING  # what sums between ranks have room for
