import gzip
import hashlib

import pytest

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.errors import ConfigError
from hpcinfer.recovery import inputs
from hpcinfer.recovery.inputs import inspect_input, plain_input
from hpcinfer.recovery.layout import JobPaths

GROUP = SerialGroup()


@pytest.fixture
def paths(tmp_path):
    paths = JobPaths(tmp_path / "out.jsonl")
    paths.create()
    return paths


def test_digest_does_not_depend_on_the_number_of_ranks(tmp_path, ranks, monkeypatch):
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 1000)
    source = tmp_path / "in.txt"
    source.write_bytes(bytes(range(256)) * 41)
    expected = inspect_input(source, GROUP)
    blocks = [source.read_bytes()[i:i + 1000] for i in range(0, 256 * 41, 1000)]
    assert expected.digest == hashlib.sha256(b"".join(hashlib.sha256(b).digest() for b in blocks)).hexdigest()
    for size in (2, 3, 13):
        assert ranks(size, lambda group: inspect_input(source, group)) == [expected] * size


def test_plain_input_is_used_where_it_is(tmp_path, paths):
    source = tmp_path / "in.txt"
    source.write_text("a\n")
    assert plain_input(paths, inspect_input(source, GROUP), GROUP) == source


def test_gzip_is_known_by_its_bytes_and_unpacked_once(tmp_path, paths):
    source = tmp_path / "in.whatever"
    source.write_bytes(gzip.compress(b"a\n") + gzip.compress(b"b\n"))
    plain = plain_input(paths, inspect_input(source, GROUP), GROUP)
    assert plain.read_bytes() == b"a\nb\n"
    inode = plain.stat().st_ino
    assert plain_input(paths, inspect_input(source, GROUP), GROUP).stat().st_ino == inode
    assert [item.name for item in paths.root.iterdir() if item.is_file()] == ["input.plain"]


def test_truncated_gzip_is_named_and_leaves_nothing(tmp_path, paths):
    source = tmp_path / "in.gz"
    source.write_bytes(gzip.compress(b"some text\n" * 1000)[:-12])
    with pytest.raises(ConfigError, match="damaged"):
        plain_input(paths, inspect_input(source, GROUP), GROUP)
    assert not [item for item in paths.root.iterdir() if item.is_file()]


@pytest.mark.parametrize("content", [None, b""])
def test_missing_or_empty_input_is_refused(tmp_path, content):
    source = tmp_path / "in.txt"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(ConfigError, match="input"):
        inspect_input(source, GROUP)


def test_compressed_nothing_is_refused(tmp_path, paths):
    source = tmp_path / "in.gz"
    source.write_bytes(gzip.compress(b""))
    with pytest.raises(ConfigError, match="empty"):
        plain_input(paths, inspect_input(source, GROUP), GROUP)
