"""The bindings of NCCL, against modules with their signatures: none of them need be installed."""

import sys
from types import ModuleType, SimpleNamespace

from hpcinfer.comm.device.communicator import find_binding


class Recorder:
    """Remembers calls."""

    def __init__(self):
        self.calls = []

    def note(self, name):
        return lambda *args: self.calls.append((name, *args))


def cupy_of(recorder):
    class NcclCommunicator:
        def __init__(self, ndev, commId, rank):  # noqa: N803  # as cupy has it
            assert isinstance(commId, tuple) and len(commId) == 128 and min(commId) < 0
            recorder.calls.append(("init", ndev, commId, rank))

        def allReduce(self, sendbuf, recvbuf, count, datatype, op, stream):  # noqa: N802
            recorder.calls.append(("allReduce", sendbuf, recvbuf, count, datatype, op, stream))

        def allGather(self, sendbuf, recvbuf, count, datatype, stream):  # noqa: N802
            recorder.calls.append(("allGather", sendbuf, recvbuf, count, datatype, stream))

        def broadcast(self, sendbuff, recvbuff, count, datatype, root, stream):
            recorder.calls.append(("broadcast", sendbuff, recvbuff, count, datatype, root, stream))

        def send(self, sendbuf, count, datatype, peer, stream):
            recorder.calls.append(("send", sendbuf, count, datatype, peer, stream))

        def recv(self, recvbuf, count, datatype, peer, stream):
            recorder.calls.append(("recv", recvbuf, count, datatype, peer, stream))

        def check_async_error(self):
            if recorder.calls[-1] == ("abort",):
                raise RuntimeError("NCCL_ERROR_SYSTEM_ERROR: unhandled system error")

        def abort(self):
            recorder.calls.append(("abort",))

    module = ModuleType("cupy.cuda.nccl")
    module.__dict__.update(
        NcclCommunicator=NcclCommunicator, get_version=lambda: 22703, groupStart=recorder.note("groupStart"),
        groupEnd=recorder.note("groupEnd"), get_unique_id=lambda: (-128, 127, *range(126)), NCCL_INT8=0,
        NCCL_FLOAT32=7, NCCL_SUM=0,
    )
    return {"cupy.cuda.nccl": module, "cupy": ModuleType("cupy"), "cupy.cuda": ModuleType("cupy.cuda")}


def nccl4py_of(recorder):
    class Communicator:
        ptr = 77

        @classmethod
        def init(cls, nranks, rank, unique_id, config=None):
            recorder.calls.append(("init", nranks, rank, unique_id.data))
            return cls()

        def get_async_error(self):
            return 6 if recorder.calls[-1] == ("abort",) else 0

        def abort(self):
            recorder.calls.append(("abort",))

    class UniqueId:
        def __init__(self, data):
            self.data = self.as_bytes = data

        from_bytes = classmethod(lambda cls, data: cls(data))

    core, calls = ModuleType("nccl.core"), ModuleType("nccl.bindings.nccl")
    core.__dict__.update(Communicator=Communicator, UniqueId=UniqueId, get_unique_id=lambda: UniqueId(b"i" * 128))
    names = ("all_reduce", "all_gather", "broadcast", "send", "recv", "group_start", "group_end")
    calls.__dict__.update({name: recorder.note(name) for name in names})
    calls.__dict__.update(
        get_version=lambda: 23004, DataType=SimpleNamespace(Int8=0, Float32=7), RedOp=SimpleNamespace(Sum=0),
        Result=SimpleNamespace(Success=0), get_error_string=lambda result: {6: "remote error"}[result],
    )
    packages = {name: ModuleType(name) for name in ("nccl", "nccl.bindings")}
    return {**packages, "nccl.core": core, "nccl.bindings.nccl": calls}


def use(communicator):
    communicator.group_start()
    communicator.send(100, 8, 1, 5)
    communicator.receive(200, 8, 1, 5)
    communicator.group_end()
    communicator.all_reduce(100, 200, 2, 5)
    communicator.all_gather(100, 200, 8, 5)
    communicator.broadcast(100, 8, 2, 5)
    assert communicator.async_error() == ""
    communicator.abort()
    assert "error" in communicator.async_error()


def test_cupy_is_called_as_it_wants_to_be(monkeypatch):
    recorder = Recorder()
    for name, module in cupy_of(recorder).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "nccl", None)
    binding = find_binding()
    assert binding.name == "cupy"
    use(binding.join(4, 3, binding.new_id()))
    assert recorder.calls == [
        ("init", 4, (-128, 127, *range(126)), 3), ("groupStart",), ("send", 100, 8, 0, 1, 5),
        ("recv", 200, 8, 0, 1, 5), ("groupEnd",), ("allReduce", 100, 200, 2, 7, 0, 5),
        ("allGather", 100, 200, 8, 0, 5), ("broadcast", 100, 100, 8, 0, 2, 5), ("abort",),
    ]  # fmt: skip


def test_nccl4py_is_preferred_and_called_as_it_wants_to_be(monkeypatch):
    recorder = Recorder()
    for name, module in {**cupy_of(recorder), **nccl4py_of(recorder)}.items():
        monkeypatch.setitem(sys.modules, name, module)
    binding = find_binding()
    assert binding.name == "nccl4py"
    use(binding.join(4, 3, binding.new_id()))
    assert recorder.calls == [
        ("init", 4, 3, b"i" * 128), ("group_start",), ("send", 100, 8, 0, 1, 77, 5), ("recv", 200, 8, 0, 1, 77, 5),
        ("group_end",), ("all_reduce", 100, 200, 2, 7, 0, 77, 5), ("all_gather", 100, 200, 8, 0, 77, 5),
        ("broadcast", 100, 100, 8, 0, 2, 77, 5), ("abort",),
    ]  # fmt: skip


def test_without_a_binding_there_is_none(monkeypatch):
    for name in ("cupy", "cupy.cuda.nccl", "nccl", "nccl.core"):
        monkeypatch.setitem(sys.modules, name, None)
    assert find_binding() is None
