"""Text to token ids and token ids to bytes, from the files of a model; the work is done by `tokenizers`.

Two families of vocabularies are served: byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece-like ones, with or
without byte fallback (Llama 2, Mistral, Gemma).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hpcinfer.data.model_files import read_json
from hpcinfer.errors import ModelError

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"  # SentencePiece's visible space
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")  # SentencePiece's byte fallback


class Tokenizer:
    """A model's tokenizer. Encodes as Hugging Face's would, decodes token by token."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """Build from the contents of the files that are there; only tokenizer.json must be.

        Raises:
            ModelError: a file that is missing, malformed or of an unknown family.
        """
        if "tokenizer.json" not in files:
            raise ModelError("the model has no tokenizer.json", expected="tokenizer.json beside config.json",
                             hint="AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL) writes it")  # fmt: skip
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the cores are for the kernels
        self._files = files
        self._config = {**read_json(files, "special_tokens_map.json"), **read_json(files, "tokenizer_config.json")}
        self._tokenizer = _load(files["tokenizer.json"])
        self._added = self._tokenizer.get_added_tokens_decoder()
        self._decode, self.strips_space = _read_decoder(read_json(files, "tokenizer.json").get("decoder"))
        self._bytes: dict[int, bytes] = {}
        self.bos_token, self.eos_token = self._named_token("bos_token"), self._named_token("eos_token")
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.digest = hashlib.sha256(files["tokenizer.json"]).hexdigest()
        self.version = f"tokenizers {_version()}"

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Encode a text, special tokens in it included.

        Args:
            add_special_tokens: add what tokenizer.json's post-processor adds to a plain prompt (as in Hugging Face,
                add_bos_token of tokenizer_config.json has no say beside it). A begin-of-sequence token that the text
                itself begins with is not doubled.
        """
        # encode_batch lets other threads run meanwhile, encode does not
        ids = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
        return ids[1:] if add_special_tokens and self._bos_prefix and ids[:2] == self._bos_prefix * 2 else ids

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token adds to a text; none for special and unknown tokens."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._find_bytes(token_id)
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """Name a token on its own, special ones by their content, as logprobs show it."""
        if token_id in self._added:
            return str(self._added[token_id].content)
        content = self.token_bytes(token_id)
        try:
            return content.decode() if content else f"token_id:{token_id}"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    @cached_property
    def chat_template(self) -> Any:
        """Source of the chat template as it stands (ChatTemplate checks it); of several, the one named default."""
        if "chat_template.jinja" in self._files:
            return self._files["chat_template.jinja"].decode(errors="surrogateescape")
        source = self._config.get("chat_template")
        if not isinstance(source, list):
            return source
        several = [item for item in source if isinstance(item, dict) and item.get("name") == "default"]
        return several[-1].get("template") if several else None

    @cached_property
    def _bos_prefix(self) -> list[int]:
        """[the begin-of-sequence token], if one is added to plain prompts."""
        ids = self._tokenizer.encode("", add_special_tokens=True).ids
        return ids[:1] if ids and ids[0] == self._tokenizer.token_to_id(self.bos_token or "") else []

    def _find_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            token = self._added[token_id]
            return b"" if token.special else token.content.encode()
        piece = self._tokenizer.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        return b"" if piece is None else self._decode(piece)

    def _named_token(self, name: str) -> str | None:
        value = self._config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if not isinstance(content, str | None):
            raise ModelError(f"the tokenizer's {name} is no text", expected="a string, or an object with content")
        return content


class TokenizerSource:
    """A tokenizer that is built when it is first asked for: a rank that never leads a replica needs none."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = files

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. See `Tokenizer` for what is raised."""
        return Tokenizer(self._files)


def _version() -> str:
    import tokenizers

    return str(tokenizers.__version__)


def _load(content: bytes) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(f"tokenizer.json cannot be read: {error}", hint="it may need a newer `tokenizers`") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _byte_alphabet() -> dict[str, int]:
    """Map GPT-2's visible characters to the bytes that they stand for.

    Source: bytes_to_unicode of GPT-2's encoder.py.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_ALPHABET = _byte_alphabet()


def _byte_level(piece: str) -> bytes:
    try:
        return bytes(_ALPHABET[char] for char in piece)
    except KeyError:
        return piece.encode()


def _sentencepiece(piece: str) -> bytes:
    return piece.replace(SPACE, " ").encode()


def _sentencepiece_fallback(piece: str) -> bytes:
    match = _BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(match[1]) if match else _sentencepiece(piece)


def _read_decoder(decoder: dict[str, Any] | None) -> tuple[Any, bool]:
    """Choose how a piece becomes bytes, and whether a text loses the space that it begins with."""
    steps = {} if decoder is None else {step["type"]: step for step in decoder.get("decoders", [decoder])}
    if "ByteLevel" in steps:
        return _byte_level, False
    if "Metaspace" in steps:
        scheme = steps["Metaspace"].get("prepend_scheme", "always")
        return _sentencepiece, scheme != "never" and steps["Metaspace"].get("add_prefix_space", True)
    if "ByteFallback" in steps or "Replace" in steps:
        strips = steps.get("Strip", {}).get("start", 0) > 0
        return _sentencepiece_fallback if "ByteFallback" in steps else _sentencepiece, strips
    raise ModelError(f"tokenizer.json has the decoder {sorted(steps) or None}",
                     expected="ByteLevel, or SentencePiece's Metaspace, Replace and ByteFallback")  # fmt: skip
