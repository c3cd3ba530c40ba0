import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.recovery import digests
from hpcinfer.recovery.digests import BlockDigests, digest_of

BLOCK = 1000


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(digests, "BLOCK_BYTES", BLOCK)


def expected(data):
    blocks = [data[i : i + BLOCK] for i in range(0, len(data), BLOCK)]
    return hashlib.sha256(b"".join(hashlib.sha256(block).digest() for block in blocks)).hexdigest()


class Group(SerialGroup):
    """One rank of several: it is told what the others know."""

    def __init__(self, others):
        super().__init__()
        self._others = others

    def all_gather_bytes(self, data):
        others, self._others = self._others, []
        return [data, *(b"".join(digests._ENTRY.pack(*item) for item in each.items()) for each in others)]


@given(size=st.integers(0, 12_345), cuts=st.lists(st.integers(0, 12_345), max_size=5), piece=st.integers(1, 3000))
def test_digest_is_that_of_the_file_whoever_wrote_which_part(tmp_path_factory, size, cuts, piece):
    data = bytes(i * 7 % 251 for i in range(size))
    bounds = [0, *sorted(min(cut, size) for cut in cuts), size]
    found = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        part = BlockDigests(start)
        for at in range(start, stop, piece):
            part.update(data[at : min(at + piece, stop)])
        found.append(part.finish(size))
    path = tmp_path_factory.getbasetemp() / "output"
    path.write_bytes(data)
    assert digest_of(path, size, found[0], Group(found[1:])) == expected(data)


def test_only_blocks_that_nobody_has_whole_are_read(tmp_path, monkeypatch):
    data, read = bytes(range(250)) * 40, []
    path = tmp_path / "output"
    path.write_bytes(data)
    real = digests._read
    monkeypatch.setattr(digests, "_read", lambda path, blocks: read.extend(blocks) or real(path, blocks))
    parts = [BlockDigests(0), BlockDigests(3500)]
    parts[0].update(data[:3500])
    parts[1].update(data[3500:])
    own, other = (part.finish(len(data)) for part in parts)
    assert digest_of(path, len(data), own, Group([other])) == expected(data) and read == [3]


def test_file_that_nobody_has_hashed_is_read(tmp_path):
    path = tmp_path / "output"
    path.write_bytes(b"x" * 5500)
    assert digest_of(path, 5500, {}, SerialGroup()) == expected(b"x" * 5500)
