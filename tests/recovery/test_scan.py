import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

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


def test_prefix_is_of_the_prompt_not_of_the_line():
    texts = ["x" * 300 + "a", "x" * 300 + "b", "x" * 255]
    lines = [json.dumps({"custom_id": str(i), "prompt": text}).encode() for i, text in enumerate(texts)]
    found = scan_rows(enumerate(lines), "jsonl")
    assert found.prefixes[0] == found.prefixes[1] != 0 == found.prefixes[2]
    assert len(set(found.hashes.tolist())) == 3


def test_cost_counts_prompt_and_output_tokens():
    lines = [b'{"prompt": "%s", "max_tokens": %d}' % (b"x" * 400, wanted) for wanted in (7, 2**40)]
    assert scan_rows(enumerate(lines), "jsonl").costs.tolist() == [107, min(100 + 2**31 - 1, 2**32 - 1)]
