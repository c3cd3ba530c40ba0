"""Token ids as Hugging Face's, and bytes per token that join to the text."""

import json
from datetime import date
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcinfer.data.chat import ChatTemplate
from hpcinfer.data.detokenizer import decode
from hpcinfer.data.tokenizer import Tokenizer
from hpcinfer.errors import ModelError, RequestError

TEXTS = ["", " ", "the cat", "  the  cat ", "Größe 東京 🙂\n\tx", "a <|end|> b", "\u2581", "\x00\x7f", "x" * 50]


def reference(tmp_path: Path, files: dict[str, bytes]):  # noqa: ANN201
    transformers = pytest.importorskip("transformers")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    tokenizer = json.loads(files["tokenizer.json"]) | {"truncation": None, "padding": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return transformers.AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["byte_level_files", "sentencepiece_files"])
@pytest.mark.parametrize("config", [{}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}])
def test_ids_equal_transformers(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, config: dict[str, bool]
) -> None:
    files = dict(request.getfixturevalue(family))
    files["tokenizer_config.json"] = json.dumps(json.loads(files["tokenizer_config.json"]) | config).encode()
    ours, theirs = Tokenizer(files), reference(tmp_path, files)
    for text in TEXTS:
        for add in (True, False):
            assert ours.encode(text, add_special_tokens=add) == theirs.encode(text, add_special_tokens=add), text
        assert decode(ours, ours.encode(text, add_special_tokens=True)) == theirs.decode(
            theirs.encode(text), skip_special_tokens=True
        )


def test_bos_is_never_doubled(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    for tokenizer, bos in ((byte_level, "<|begin|>"), (sentencepiece, "<s>")):
        plain = tokenizer.encode("cat", add_special_tokens=True)
        [bos_id] = tokenizer.encode(bos, add_special_tokens=False)
        assert plain[0] == bos_id
        assert tokenizer.encode(f"{bos}cat", add_special_tokens=True).count(bos_id) == 1
        assert tokenizer.encode(f"{bos}{bos}cat", add_special_tokens=True).count(bos_id) == 2
        assert tokenizer.encode("", add_special_tokens=True) == [bos_id]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text())
def test_round_trip_is_exact(byte_level: Tokenizer, sentencepiece: Tokenizer, text: str) -> None:
    pieces = byte_level.encode(text, add_special_tokens=False)
    assert b"".join(map(byte_level.token_bytes, pieces)) == text.encode()
    pieces = sentencepiece.encode(text, add_special_tokens=True)
    assert decode(sentencepiece, pieces) == text.replace("\u2581", " ")


def test_truncation_and_padding_of_the_file_are_off(byte_level: Tokenizer) -> None:
    assert len(byte_level.encode("x" * 500, add_special_tokens=False)) > 8
    assert len(byte_level.encode("x", add_special_tokens=False)) == 1


def test_special_tokens_have_no_bytes_but_a_name(byte_level: Tokenizer) -> None:
    assert byte_level.token_bytes(0) == b""
    assert byte_level.token_text(0) == "<|begin|>"
    [think] = byte_level.encode("<think é>", add_special_tokens=False)
    assert byte_level.token_bytes(think) == "<think é>".encode()
    assert byte_level.vocab_size == think + 1


def test_ids_without_a_token_have_no_bytes(byte_level: Tokenizer) -> None:
    assert byte_level.token_bytes(10**6) == b""
    assert byte_level.token_text(10**6) == "token_id:1000000"


def test_half_characters_are_named_by_their_bytes(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    halves = byte_level.encode("🙂", add_special_tokens=False)
    assert byte_level.token_text(halves[0]).startswith("bytes:\\xf0")
    assert sentencepiece.token_bytes(3 + 0x0A) == b"\n"
    assert sentencepiece.token_text(3 + 0xFF) == "bytes:\\xff"


def test_digest_follows_the_file(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    assert byte_level.digest != sentencepiece.digest
    assert byte_level.version.startswith("tokenizers ")


def test_template_file_beats_config_and_default_is_chosen(byte_level_files: dict[str, bytes]) -> None:
    def template(name: str, content: bytes) -> str | None:
        return Tokenizer({**byte_level_files, name: content}).chat_template

    assert template("chat_template.jinja", b"file") == "file"
    several = {"chat_template": [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]}
    assert template("tokenizer_config.json", json.dumps(several).encode()) == "b"
    assert template("tokenizer_config.json", b"{}") is None


@pytest.mark.parametrize(
    "content",
    [b"\xff", b'{"chat_template": [3]}', b'{"chat_template": {"a": 1}}', b'{"chat_template": [{"name": "default"}]}',
     b'{"chat_template": "\\ud800"}'],
)  # fmt: skip
def test_bad_template_is_no_error_of_the_model(byte_level_files: dict[str, bytes], content: bytes) -> None:
    name = "tokenizer_config.json" if content.startswith(b"{") else "chat_template.jinja"
    source = Tokenizer({**byte_level_files, name: content}).chat_template
    template = ChatTemplate(source, None, None, date(2026, 1, 31))
    with pytest.raises(RequestError) as caught:
        template.render([{"role": "user", "content": "x"}])
    assert caught.value.code == "no_template"


def test_names_of_special_tokens_come_from_either_file(byte_level_files: dict[str, bytes]) -> None:
    special = json.dumps({"bos_token": {"content": "<|begin|>"}}).encode()
    files = {**byte_level_files, "tokenizer_config.json": b"{}", "special_tokens_map.json": special}
    assert (Tokenizer(files).bos_token, Tokenizer(files).eos_token) == ("<|begin|>", None)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.json": b"{"}, "cannot be read|tokenizer.json"),
        ({"tokenizer.json": b'{"model": 3}'}, "cannot be read"),
        ({"tokenizer_config.json": b"[]"}, "tokenizer_config.json is no JSON object"),
        ({"tokenizer_config.json": b"\xff"}, "tokenizer_config.json"),
        ({"tokenizer_config.json": b'{"bos_token": 1}'}, "bos_token"),
    ],
)
def test_broken_files_are_named(byte_level_files: dict[str, bytes], files: dict[str, bytes], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Tokenizer(files if "tokenizer.json" in files or not files else {**byte_level_files, **files})


def test_unknown_decoder_is_refused(byte_level_files: dict[str, bytes]) -> None:
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    content = json.loads(byte_level_files["tokenizer.json"]) | {"decoder": decoder}
    with pytest.raises(ModelError, match="WordPiece"):
        Tokenizer({"tokenizer.json": json.dumps(content).encode()})
