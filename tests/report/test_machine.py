import pytest

from hpcinfer.report.machine import describe_node, read_io


@pytest.mark.parametrize(("text", "cpu"), [
    ("processor\t: 0\nmodel name\t: AMD EPYC 9654\nflags : a b\n", "AMD EPYC 9654"),
    ("processor\t: 0\ncpu\t\t: POWER9, altivec supported\n", "POWER9, altivec supported"),
    ("processor\t: 0\nBogoMIPS : 50.00\n", None),
])  # fmt: skip
def test_processor_is_named_where_the_system_does(tmp_path, text, cpu):
    (tmp_path / "cpuinfo").write_text(text)
    (tmp_path / "meminfo").write_text("MemTotal:       2048 kB\nMemFree: 1 kB\n")
    found = describe_node(tmp_path)
    assert (found["cpu"], found["memory_bytes"]) == (cpu, 2 << 20) and found["cpus"] >= 1


def test_system_without_these_files_says_nothing(tmp_path):
    found = describe_node(tmp_path)
    assert found["cpu"] is None and found["memory_bytes"] is None and read_io(tmp_path) is None


def test_counts_of_this_process_are_read(tmp_path):
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "io").write_text("rchar: 5\nwchar: 6\nsyscr: 7\nread_bytes: 8\nwrite_bytes: 9\n")
    assert read_io(tmp_path) == {"rchar": 5, "wchar": 6, "read_bytes": 8, "write_bytes": 9}
