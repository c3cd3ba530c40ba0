import pytest

from hpcinfer.diagnosis import devices
from hpcinfer.diagnosis.devices import Devices, read_devices


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A machine without anything; nvidia-smi is not there either."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for folder in ("bin", "dev/dri", "proc/driver/nvidia/gpus", "sys/class/infiniband", "sys/class/cxi"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def touch(root, *names):
    for name in names:
        (root / name).touch()


def test_a_machine_without_anything_has_nothing(root):
    assert read_devices(root) == Devices() == read_devices(root / "missing")


def test_gpus_of_others_are_counted_and_not_opened(root, monkeypatch):
    touch(root, *(f"proc/driver/nvidia/gpus/{i}" for i in range(8)), *(f"dev/nvidia{i}" for i in range(8)))
    touch(root, "dev/nvidiactl", "dev/nvidia-uvm")
    monkeypatch.setattr(devices, "_can_open", lambda path: path.name in ("nvidia0", "nvidia1", "nvidia4", "nvidia5"))
    assert read_devices(root) == Devices(node_gpus=8, open_gpus=4)


def test_the_vendors_tool_is_asked_where_it_is(root):
    touch(root, "dev/nvidia0", "dev/nvidia1")
    tool = root / "bin/nvidia-smi"
    tool.write_text("#!/bin/sh\necho GPU-1\n")
    tool.chmod(0o755)
    assert read_devices(root).tool_gpus == 1
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert read_devices(root).tool_gpus == -1


def test_amds_gpus_are_those_with_the_compute_driver(root):
    touch(root, "dev/dri/renderD128", "dev/dri/renderD129", "dev/dri/card0")
    assert read_devices(root) == Devices()
    touch(root, "dev/kfd")
    assert read_devices(root) == Devices(node_gpus=2, open_gpus=2)


def test_fast_adapters_are_named(root):
    touch(root, "sys/class/infiniband/mlx5_0", "sys/class/cxi/cxi0")
    assert read_devices(root).fabrics == ("cxi0", "mlx5_0")
