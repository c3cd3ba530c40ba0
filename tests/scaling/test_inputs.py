"""Inputs of points: the first rows, and again from the first one."""

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.errors import ConfigError
from hpcinfer.scaling.inputs import count_rows, input_file, write_input


@given(count=st.integers(1, 7), wanted=st.integers(1, 20))
def test_rows_come_again_in_their_order(tmp_path_factory, count, wanted):
    folder = tmp_path_factory.mktemp("inputs")
    source = folder / "in.jsonl"
    source.write_text("".join(f'{{"prompt": "{i}"}}\n\n' for i in range(count)))
    lines = write_input(folder / "inputs", source, wanted).read_text().splitlines()
    assert lines == [f'{{"prompt": "{i % count}"}}' for i in range(wanted)]
    assert count_rows(source) == count


def test_compressed_input_and_ends_of_lines(tmp_path):
    source = tmp_path / "in.txt.gz"
    source.write_bytes(gzip.compress(b"one\r\n \r\ntwo"))
    path = write_input(tmp_path, source, 3)
    assert path == input_file(tmp_path, source, 3) and path.name == "rows-3.txt"
    assert path.read_bytes() == b"one\ntwo\none\n"


def test_missing_and_empty_inputs_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no input at"):
        count_rows(tmp_path / "nothing")
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(ConfigError, match="has no rows"):
        count_rows(tmp_path / "empty")
