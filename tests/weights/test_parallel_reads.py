import errno
import os
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcinfer.errors import StoreError
from hpcinfer.weights import parallel_reads, requests
from hpcinfer.weights.parallel_reads import IN_FLIGHT
from hpcinfer.weights.reader import Store, UnitRead

Q = "layers.1.q_proj.weight"


@pytest.fixture
def small_requests(monkeypatch):
    """Requests as many and as small as those of a large store."""
    monkeypatch.setattr(requests, "REQUEST_BYTES", 4096)
    monkeypatch.setattr(requests, "MAX_PIECES", 7)


@pytest.fixture(scope="module")
def plain(tiny_store):
    """Every unit, as read alone."""
    with Store.open(tiny_store) as store:
        return {
            (name, unit): store.read(name, range(unit, unit + 1)).values[0].copy()
            for name, param in store.parameters.items()
            for unit in range(len(param.checksums))
        }


def reads_of(store, keys):
    return [UnitRead(name, unit, store.empty(name, 1)[0]) for name, unit in keys]


@pytest.mark.usefixtures("small_requests")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=st.data(), direct=st.booleans())
def test_any_units_in_any_order_are_those_that_were_stored(tiny_store, plain, data, direct):
    keys = data.draw(st.lists(st.sampled_from(sorted(plain)), max_size=60))
    with Store.open(tiny_store) as store:
        store.direct = direct
        wanted = reads_of(store, keys)
        store.read_into(wanted)
        for name, unit, out in wanted:
            np.testing.assert_array_equal(out, plain[name, unit])
        assert store.bytes_read >= sum(plain[key].nbytes for key in set(keys))


@pytest.mark.usefixtures("small_requests")
def test_memory_needs_no_alignment(tiny_store, plain):
    with Store.open(tiny_store) as store:
        store.direct = True
        room = np.empty(sum(each.nbytes for each in plain.values()) + 1, np.uint8)[1:]
        ends = np.cumsum([each.nbytes for each in plain.values()])
        outs = [room[end - each.nbytes : end] for end, each in zip(ends, plain.values(), strict=True)]
        store.read_into([UnitRead(*key, out) for key, out in zip(plain, outs, strict=True)])
        assert room.tobytes() == b"".join(each.tobytes() for each in plain.values())


def test_what_is_no_unit_is_refused(tiny_store):
    with Store.open(tiny_store) as store:
        out = store.empty(Q, 1)[0]
        for unit in (-1, 8):
            with pytest.raises(IndexError, match="there are 8"):
                store.read_into([UnitRead(Q, unit, out)])
        with pytest.raises(ValueError, match="bytes for a unit of"):
            store.read_into([UnitRead(Q, 0, out[:-1])])


def test_bytes_that_are_asked_for_are_counted_with_gaps(tiny_store, monkeypatch):
    with Store.open(tiny_store) as store:
        store.read_into(reads_of(store, [(Q, 0), (Q, 2)]))
        assert store.bytes_read == 2 * store.empty(Q, 1).nbytes
    monkeypatch.setattr(requests, "GAP_SHARE", 1)
    with Store.open(tiny_store) as store:
        store.read_into(reads_of(store, [(Q, 0), (Q, 2)]))
        assert store.bytes_read == 3 * store.empty(Q, 1).nbytes


def test_requests_are_in_flight_together(tiny_store, monkeypatch, small_requests):
    preadv, lock, now, reached = os.preadv, threading.Lock(), [0, 0], threading.Event()

    def slow(*arguments):
        with lock:
            now[:] = now[0] + 1, max(now[1], now[0] + 1)
        if now[1] >= IN_FLIGHT:
            reached.set()
        reached.wait(timeout=20)
        with lock:
            now[0] -= 1
        return preadv(*arguments)

    with Store.open(tiny_store) as store:
        name = "layers.0.gate_proj.weight"
        wanted = reads_of(store, [(name, unit) for unit in range(IN_FLIGHT)])
        wanted += reads_of(store, [("layers.1.gate_proj.weight", unit) for unit in range(IN_FLIGHT)])
        store.read_into(wanted[:1])
        monkeypatch.setattr(parallel_reads.os, "preadv", slow)
        store.read_into(wanted)
    assert now[1] == IN_FLIGHT


def refuse(monkeypatch, function, code, is_refused):
    """Have a function of `os` fail for some arguments."""
    real = getattr(os, function)

    def maybe(*arguments):
        if is_refused(*arguments):
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    monkeypatch.setattr(parallel_reads.os, function, maybe)


@pytest.mark.parametrize("function", ["open", "preadv"])
def test_file_system_that_wants_its_page_cache_gets_it(tiny_store, plain, monkeypatch, function):
    direct = set()

    def is_direct(first, flags, *_):
        if function == "open":
            return flags & os.O_DIRECT
        direct.add(first)
        return len(direct) == 1

    with Store.open(tiny_store) as store:
        store.direct = True
        wanted = reads_of(store, [("embed_tokens.weight", 0)])
        monkeypatch.setattr(requests, "is_page_aligned", lambda *_: True)
        refuse(monkeypatch, function, errno.EINVAL, is_direct)
        store.read_into(wanted)
        np.testing.assert_array_equal(wanted[0].out, plain["embed_tokens.weight", 0])


def test_failing_disk_is_named_with_file_dataset_and_chunk(tiny_store, monkeypatch):
    with Store.open(tiny_store) as store:
        store.read(Q)
        refuse(monkeypatch, "preadv", errno.EIO, lambda *_: True)
        where = r"layer-0001\.h5 cannot be read: .*\n.*\n.*layer-0001\.h5, dataset q_proj\.weight, chunk 0"
        with pytest.raises(StoreError, match=where):
            store.read(Q)


@pytest.mark.usefixtures("small_requests")
def test_of_several_damages_the_first_in_the_file_is_named(store_copy):
    path = store_copy / "layer-0001.h5"
    with Store.open(store_copy) as store:
        places = store.places(path.name)
        data = bytearray(path.read_bytes())
        for name, unit in (("layers.1.down_proj.weight", 1), (Q, 6), (Q, 3)):
            data[places[name][unit] + 5] ^= 4
        path.write_bytes(data)
        keys = [(name, unit) for name in ("layers.1.down_proj.weight", Q) for unit in reversed(range(8))]
        for _ in range(5):
            with pytest.raises(StoreError, match=r"dataset q_proj\.weight, chunk 3"):
                store.read_into(reads_of(store, keys))


@pytest.mark.usefixtures("small_requests")
@pytest.mark.parametrize("direct", [False, True])
def test_file_that_ends_inside_a_unit_says_where(store_copy, direct):
    path = store_copy / "layer-0001.h5"
    with Store.open(store_copy) as store:
        store.direct = direct
        name = "layers.1.gate_proj.weight"
        start, size = store.places(path.name)[name][6], store.empty(name, 1).nbytes
        os.truncate(path, start + size // 2 + 1)
        found = rf"ends after {size // 2 + 1} of {size} bytes of a chunk"
        with pytest.raises(StoreError, match=rf"{found}\n(.*\n)*.*dataset gate_proj\.weight, chunk 6"):
            store.read(name)


@pytest.mark.usefixtures("small_requests")
def test_several_threads_read_at_once(tiny_store, plain):
    wrong = []

    def read_all(names):
        for name in names:
            values = store.read(name).values
            wrong.extend(name for unit, each in enumerate(values) if not np.array_equal(each, plain[name, unit]))

    with Store.open(tiny_store) as store:
        names = list(store.parameters)
        threads = [threading.Thread(target=read_all, args=(order,)) for order in (names, names[::-1], names[5:])]
        for thread in threads:
            thread.start()
        time.sleep(0.01)
        store.close()  # files are opened again, or go on while they are read
        for thread in threads:
            thread.join()
        read = sum(each.nbytes for name in (*names, *names, *names[5:]) for each in [store.empty(name, 1)]
                   for _ in range(store.spec(name).shape[0]))  # fmt: skip
        assert not wrong and store.bytes_read >= read


def test_few_files_stay_open(tiny_store, monkeypatch):
    monkeypatch.setattr(parallel_reads, "_OPEN_FILES", 1)
    before = os.listdir("/proc/self/fd")
    with Store.open(tiny_store) as store:
        for name in (Q, "norm.weight", "layers.0.q_proj.weight"):
            store.read(name)
            assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    assert len(os.listdir("/proc/self/fd")) == len(before)
