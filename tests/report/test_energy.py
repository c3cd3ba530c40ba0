import time

import pytest

from hpcinfer.report import energy
from hpcinfer.report.energy import Counter, EnergyMeter, open_meter


class Reading:
    """A counter that a test turns."""

    def __init__(self, *values):
        self._values = list(values)

    def __call__(self):
        return self._values.pop(0) if len(self._values) > 1 else self._values[0]


def domain(folder, number, name, joules, limit=1000):
    path = folder / f"intel-rapl:{number}"
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    (path / "max_energy_range_uj").write_text(f"{int(limit * 1e6)}\n")
    return path / "energy_uj"


def test_packages_and_memory_count_once(tmp_path):
    counts = [domain(tmp_path, *each) for each in
              (("0", "package-0", 100), ("0:0", "core", 50), ("0:1", "dram", 10), ("1", "psys", 500))]  # fmt: skip
    meter = open_meter(tmp_path, "libno.so")
    for count in counts:
        count.write_text(str(int(count.read_text()) + 7_000_000))
    found = meter.stop()
    assert found["joules"] == 14.0 and found["why_not"] == ""
    assert list(found["parts"]) == ["RAPL intel-rapl:0 package-0", "RAPL intel-rapl:0:1 dram"]


def test_counter_that_begins_again_loses_nothing():
    meter = EnergyMeter([Counter("RAPL", Reading(990.0, 998.0, 4.0), 1000.0)], read_s=60)
    meter._look()
    assert meter.stop()["joules"] == 14.0


def test_thread_reads_in_between():
    reading = Reading(0.0, 900.0, 100.0, 200.0)
    meter = EnergyMeter([Counter("RAPL", reading, 1000.0)], read_s=0.01)
    end = time.monotonic() + 10
    while len(reading._values) > 1 and time.monotonic() < end:
        time.sleep(0.01)
    assert meter.stop()["joules"] == 1200.0


def test_nothing_to_read_is_said(tmp_path):
    assert open_meter(tmp_path / "none", "libno.so").stop() == {
        "joules": None, "parts": {}, "why_not": f"not readable here (no {tmp_path / 'none'})"}  # fmt: skip


def test_counter_without_permission_is_said(tmp_path):
    domain(tmp_path, "0", "package-0", 1).unlink()
    found = open_meter(tmp_path, "libno.so").stop()
    assert found["joules"] is None and "energy_uj" in found["why_not"]


@pytest.mark.parametrize("text", ["", "what"])
def test_counter_that_is_no_number_is_left_out(tmp_path, text):
    domain(tmp_path, "0", "package-0", 1).write_text(text)
    assert open_meter(tmp_path, "libno.so").stop()["joules"] is None


class Driver:
    """A driver of two GPUs; the second one counts no energy."""

    def __init__(self, *joules):
        self._joules = Reading(*joules)

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, device):
        device._obj.value = 1 + index.value
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, device, millijoules):
        if device.value != 1:
            return 3  # not supported
        millijoules._obj.value = int(1000 * self._joules())
        return 0


def test_gpus_that_count_are_measured(tmp_path, monkeypatch):
    driver = Driver(500.0, 500.0, 620.0)  # looked for, begun, ended
    monkeypatch.setattr(energy.ctypes, "CDLL", lambda name: driver)
    found = open_meter(tmp_path).stop()
    assert (found["joules"], found["parts"]) == (120.0, {"GPU 0": 120.0})
    assert found["why_not"].startswith("not readable here (no "), "that the processors were not counted"


def test_failed_read_is_no_zero():
    meter = EnergyMeter([Counter("GPU 0", Reading(500.0, None, 620.0), 0.0)], read_s=60)
    meter._look()
    assert meter.stop()["joules"] == 120.0
    lost = EnergyMeter([Counter("GPU 0", Reading(500.0, 600.0, None), 0.0)], read_s=60)
    lost._look()
    assert lost.stop() == {"joules": None, "parts": {}, "why_not": "GPU 0 could not be read to the end"}


def test_second_way_to_the_same_package_is_not_counted(tmp_path):
    domain(tmp_path, "0", "package-0", 100)
    (tmp_path / "intel-rapl:0").rename(tmp_path / "intel-rapl-mmio:0")
    domain(tmp_path, "0", "package-0", 100)
    assert list(open_meter(tmp_path, "libno.so").stop()["parts"]) == ["RAPL intel-rapl:0 package-0"]
