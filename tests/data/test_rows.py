"""Rows of an input file: every row once, wherever the file is cut."""

import io
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.data.rows import input_kind, iter_rows, prompt_text

SAMPLES = [b"", b" ", b"\t", b"a", b'{"x": 1}', b"two words", "é".encode() * 9, b"\r"]
LINES = st.lists(st.sampled_from(SAMPLES), max_size=12)


@given(LINES, st.booleans(), st.sampled_from([b"\n", b"\r\n"]), st.lists(st.integers(0, 120), max_size=5))
def test_any_partition_yields_each_row_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], is_ended: bool, end: bytes, cuts: list[int]
) -> None:
    path = tmp_path_factory.getbasetemp() / "rows"
    content = end.join(lines) + (end if is_ended else b"")
    path.write_bytes(content)
    bounds = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    rows = [row for start, stop in itertools.pairwise(bounds) for row in iter_rows(path, start, stop)]
    expected = [line.removesuffix(b"\r") for line in content.split(b"\n") if line.strip()]
    assert [line for _, line in rows] == expected
    data = path.read_bytes()
    assert all(data[offset : offset + len(line)] == line for offset, line in rows)
    assert all(offset == 0 or content[offset - 1 : offset] == b"\n" for offset, _ in rows)


def test_line_longer_than_the_buffer_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"x" * (3 << 20) + b"\nlast")
    assert [len(line) for _, line in iter_rows(path, 0, 4 << 20)] == [3 << 20, 4]
    assert list(iter_rows(path, 1, 4 << 20)) == [((3 << 20) + 1, b"last")]


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.txt", b"hello\n", "text"),
        ("a.txt", b"\n  \n {\"prompt\": 1}\n", "jsonl"),
        ("a", b"\xef\xbb\xbf{}", "jsonl"),
        ("a.jsonl", b"broken", "jsonl"),
        ("a.JSON", b"", "jsonl"),
        ("a.txt", b"", "text"),
        ("a.txt", b"[1]", "text"),
    ],
)
def test_kind_follows_suffix_or_first_row(name: str, content: bytes, kind: str) -> None:
    assert input_kind(name, io.BytesIO(content)) == kind


def test_kind_follows_the_name_before_decompression() -> None:
    assert input_kind("prompts.jsonl.gz", io.BytesIO(b"broken")) == "jsonl"
    assert input_kind("prompts.txt.gz", io.BytesIO(b"broken")) == "text"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prompt": "hé", "max_tokens": 7}, ("hé".encode(), 7)),
        ({"body": {"prompt": "x", "max_tokens": None}}, (b"x", 0)),
        ({"messages": [{"role": "system", "content": "a"}, {"content": [{"type": "text", "text": "b"}]}]}, (b"ab", 0)),
        ({"messages": [{"content": "a"}, {"content": None}], "max_completion_tokens": 3}, (b"a", 3)),
        ({"prompt": [5, 6], "max_tokens": 2**70}, (b"5 6 ", 2**31 - 1)),
        ({"prompt": "\ud800", "max_tokens": True}, (b"\xed\xa0\x80", 0)),
        ({"prompt": "x", "max_tokens": -3}, (b"x", 0)),
    ],
)
def test_prompt_text_of_good_rows(values: dict, expected: tuple[bytes, int]) -> None:
    assert prompt_text(json.dumps(values).encode(), "jsonl") == expected


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"[1]", b"3", b"{}", b'{"prompt": 4}', b'{"body": 1}', b'{"messages": [1]', b"\xff{}", b"[" * 100000,
     b'{"prompt": null}', b'{"prompt": {"a": 1, "content": 3}}',
     b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}"],
)
def test_malformed_row_is_its_own_text(line: bytes) -> None:
    assert prompt_text(line, "jsonl") == (line, 0)


@given(st.binary(max_size=200))
def test_prompt_text_never_raises(line: bytes) -> None:
    prompt_text(line, "jsonl")
    assert prompt_text(line, "text") == (line, 0)


def test_byte_order_mark_at_the_start_of_the_file_is_no_part_of_the_row(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"\xef\xbb\xbffirst\n\xef\xbb\xbfsecond\n")
    assert list(iter_rows(tmp_path / "in", 0, 19)) == [(3, b"first"), (9, b"\xef\xbb\xbfsecond")]
    (tmp_path / "blank").write_bytes(b"\xef\xbb\xbf\n")
    assert list(iter_rows(tmp_path / "blank", 0, 4)) == []
