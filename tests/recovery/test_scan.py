import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.data import request, rows
from hpcinfer.data.request import parse_row
from hpcinfer.errors import RequestError
from hpcinfer.recovery.scan import content_hash, scan, scan_rows


@given(st.lists(st.sampled_from([b"a", b"bb", b"", b"\r", b" ", b"long line"]), max_size=12), st.booleans(),
       st.lists(st.integers(0, 80), max_size=3))
def test_any_cut_into_byte_ranges_finds_each_row_once(tmp_path_factory, lines, has_end, cuts):
    path = tmp_path_factory.getbasetemp() / "rows.txt"
    data = b"\n".join(lines) + (b"\n" if has_end else b"")
    path.write_bytes(data)
    whole = scan(path, 0, len(data), "text")
    bounds = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    parts = [scan(path, start, stop, "text") for start, stop in zip(bounds, bounds[1:], strict=False)]
    for column, pieces in zip(whole, zip(*parts, strict=True), strict=True) if parts else ():
        assert np.array_equal(column, np.concatenate(pieces))
    for offset, length, hash_ in zip(whole.offsets, whole.lengths, whole.hashes, strict=True):
        row = data[int(offset):int(offset) + int(length)]
        assert row.strip() and b"\n" not in row and content_hash(row) == hash_


def test_row_longer_than_the_limit_is_kept_up_to_one_byte_more(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 20)
    monkeypatch.setattr(request, "MAX_ROW_BYTES", 20)
    lines = [b"a" * 20, b"b" * 21, b"c" * 500, b" " * 500, b" " * 400 + b"d", b"e"]
    (tmp_path / "in").write_bytes(b"\n".join(lines) + b"\n")
    found = scan(tmp_path / "in", 0, 10**4, "text")
    assert found.lengths.tolist() == [20, 21, 21, 21, 1]
    kept = [line[:21] for line in lines if line.strip()]
    assert found.hashes.tolist() == [content_hash(line) for line in kept]
    for line in kept[1:4]:
        for kind in ("text", "jsonl"):
            with pytest.raises(RequestError, match="more than 20 bytes") as caught:
                parse_row(0, line, kind)
            assert caught.value.code == "row_too_long"
    assert parse_row(0, kept[0], "text").prompt == "a" * 20


@given(st.lists(st.sampled_from([b"a", b"aaaa", b"aaaaa", b"aaaa\r", b"aaaaaa", b"aaaa\ra", b"      b", b"       ",
                                 b"a" * 40]), max_size=8), st.sampled_from([b"\n", b"\r\n"]))
def test_cut_rows_start_and_end_like_whole_ones(tmp_path_factory, lines, end):
    path = tmp_path_factory.getbasetemp() / "long_rows.txt"
    path.write_bytes(b"".join(line + end for line in lines))
    size = path.stat().st_size
    whole = list(rows.iter_rows(path, 0, size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "MAX_ROW_BYTES", 4)
        patch.setattr(rows, "_PEEK_BYTES", 3)
        assert list(rows.iter_rows(path, 0, size)) == [(offset, line[:5]) for offset, line in whole]
        parts = [row for cut in range(size) for row in rows.iter_rows(path, cut, cut + 1)]
        assert parts == [(offset, line[:5]) for offset, line in whole]


def test_prefix_is_of_the_prompt_not_of_the_line():
    texts = ["x" * 300 + "a", "x" * 300 + "b", "x" * 255]
    lines = [json.dumps({"custom_id": str(i), "prompt": text}).encode() for i, text in enumerate(texts)]
    found = scan_rows(enumerate(lines), "jsonl")
    assert found.prefixes[0] == found.prefixes[1] != 0 == found.prefixes[2]
    assert len(set(found.hashes.tolist())) == 3


def test_cost_counts_prompt_and_output_tokens():
    lines = [b'{"prompt": "%s", "max_tokens": %d}' % (b"x" * 400, wanted) for wanted in (7, 2**40)]
    assert scan_rows(enumerate(lines), "jsonl").costs.tolist() == [107, min(100 + 2**31 - 1, 2**32 - 1)]
