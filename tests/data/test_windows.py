import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_tokenizer

from hpcinfer.data.tokenizer import Tokenizer
from hpcinfer.data.windows import cut_windows, first_tokens, prompt_ids, text_ids
from hpcinfer.errors import ConfigError

TEXT = "The list of files is read line by line.\n\nGröße 🙂\n"


def tokenizer(adds_bos=True):
    return Tokenizer({"tokenizer.json": tiny_tokenizer(adds_bos=adds_bos)[0].encode()})


@given(st.lists(st.integers(0, 99)), st.integers(1, 9), st.sampled_from([[], [7]]))
def test_windows_hold_every_token_once_behind_the_first_ones(ids, length, first):
    windows = cut_windows(ids, length, first)
    assert all(2 <= len(window) <= length and list(window[: len(first)]) == first for window in windows)
    held = [token for window in windows for token in window[len(first) :]]
    is_whole = length > 1 and (first or length == 1 or len(ids) % length != 1)
    assert held == ids if is_whole else held == ids[: len(held)]
    assert len(ids) - len(held) <= 1 or length == 1


def test_first_token_is_the_one_that_prompts_begin_with():
    assert first_tokens(tokenizer()) == [0] and first_tokens(tokenizer(adds_bos=False)) == []


def test_text_is_taken_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    ids = text_ids(tmp_path / "a.txt", tokenizer(), 500)
    assert b"".join(map(tokenizer().token_bytes, ids)).decode() == TEXT
    assert prompt_ids(tmp_path / "a.txt", tokenizer(), 500) == ids


def test_prompts_are_those_of_a_job(tmp_path):
    rows = [{"prompt": "The list"}, {"prompt": [5, 6, 7]}, {"prompt": "of files", "max_tokens": 3}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    encode = tokenizer().encode
    expected = [*encode("The list", add_special_tokens=True), 5, 6, 7, *encode("of files", add_special_tokens=True)]
    assert prompt_ids(tmp_path / "a.jsonl", tokenizer(), 500) == expected


def test_text_that_a_tokenizer_cannot_encode_is_refused(tmp_path):
    class Strict:
        def encode(self, text, *, add_special_tokens):
            raise Exception("WordLevel error: Missing [UNK] token")

    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(ConfigError, match="cannot encode it .*UNK") as caught:
        text_ids(tmp_path / "a.txt", Strict(), 500)
    assert "a.txt" in str(caught.value)


@pytest.mark.parametrize(("name", "content", "found"), [
    ("a.txt", b"\xff\xfe", "cannot be read"), ("a.txt", None, "cannot be read"), ("a.txt", b"hello", "token"),
    ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": 5}\n', "row 2"), ("a.jsonl", b"hello", "row 0"),
])  # fmt: skip
def test_wrong_files_are_refused_by_name(tmp_path, name, content, found):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=found) as caught:
        prompt_ids(tmp_path / name, tokenizer(), 500 if name != "a.txt" else 3)
    assert name in str(caught.value)
