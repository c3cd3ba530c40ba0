import time
from pathlib import Path

import pytest

from hpcinfer.diagnosis import places
from hpcinfer.diagnosis.places import Mount, answer_within, look_at, mount_of

TABLE = r"""
22 1 8:2 / / rw,relatime shared:1 - ext4 /dev/sda2 rw,errors=remount-ro
30 22 0:40 / /home rw,nosuid shared:2 - nfs4 server:/home rw,vers=4.2
31 22 0:41 / /lustre rw shared:3 - lustre 10.0.0.1@o2ib:/scratch rw,flock
32 31 0:42 / /lustre/old\040data ro - nfs server:/old rw
33 22 0:43 / /opt rw - squashfs /dev/loop0 ro,errors=continue
34 22 0:44 / /lustre rw - lustre 10.0.0.2@o2ib:/new rw
""".strip()


@pytest.mark.parametrize(("path", "mount"), [
    ("/etc/x", Mount("/", "ext4")), ("/home/me/model", Mount("/home", "nfs4")), ("/homework", Mount("/", "ext4")),
    ("/lustre/a", Mount("/lustre", "lustre")), ("/lustre/old data/b", Mount("/lustre/old data", "nfs", True)),
    ("/opt/python", Mount("/opt", "squashfs", True)),
])  # fmt: skip
def test_the_longest_mount_point_counts(path, mount):
    assert mount_of(Path(path), TABLE) == mount


def test_an_empty_table_is_unknown():
    assert mount_of(Path("/x"), "") == Mount("", "unknown")


def test_what_is_there_is_described(tmp_path):
    place = look_at("output", tmp_path / "not" / "yet", needs_write=True)
    assert place.problem == "" and place.free_bytes > 0 and place.mount.kind not in ("", "unknown")


def test_a_file_system_that_hangs_is_a_problem_and_costs_little(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "ANSWER_LIMIT_S", 0.2)
    monkeypatch.setattr(places, "_describe", lambda *arguments: time.sleep(5))
    start = time.monotonic()
    assert "no answer" in look_at("model", tmp_path).problem and time.monotonic() - start < 2


def test_answers_and_errors_come_through():
    assert answer_within(1.0, lambda: 7) == 7 and answer_within(1.0, lambda: None) is None
    with pytest.raises(PermissionError):
        answer_within(1.0, _refuse)


def _refuse():
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(("kind", "tool", "text", "expected"), [
    ("nfs4", "quota", "\tBlock limit reached on /home\n", "Block limit reached on /home"),
    ("nfs4", "quota", "\tBlock limit reached on /work\n", ""), ("nfs4", "quota", "", ""),
    ("lustre", "lfs", "/home 1200* 1000 1100 6d 10 0 0 -\n", "a limit of lfs quota is exceeded"),
    ("lustre", "lfs", "/home 200 1000 1100 - 10 0 0 -\n", ""),
])  # fmt: skip
def test_quota_tools_are_asked(tmp_path, monkeypatch, kind, tool, text, expected):
    script = tmp_path / tool
    script.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert places._quota(Path("/home"), Mount("/home", kind)) == expected
