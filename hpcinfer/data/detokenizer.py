"""The text of a sequence, token by token: a pure function of its token ids, whatever the batch or the pace."""

import codecs
import itertools
from collections.abc import Iterable

from hpcinfer.data.tokenizer import Tokenizer


class TextStream:
    """Output text that grows by a token at a time, and the first stop string in it.

    Stop strings are matched on bytes: UTF-8 makes that the same as matching characters, and a match may begin and end
    inside tokens. A token that ends the sequence itself (end-of-sequence, stop_token_ids) is no text: do not append it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), *, prompt_ids: Iterable[int] = (),
                 min_tokens: int = 0) -> None:  # fmt: skip
        """Start after a prompt.

        Args:
            prompt_ids: what the text continues. A SentencePiece text loses its leading space only where nothing
                readable stands before it.
            min_tokens: stop strings that are complete within so many tokens do not count.
        """
        self._tokenizer = tokenizer
        self._stop = [text.encode() for text in stop]
        self._min_tokens = min_tokens
        self._buffer = bytearray()
        self._end: int | None = None  # where the text ends, once a stop string is complete
        self._strips_space = tokenizer.strips_space and not any(map(tokenizer.token_bytes, prompt_ids))
        self.starts: list[int] = []  # byte at which each token's own bytes begin

    def append(self, token_id: int) -> bool:
        """Add one token; true if a stop string is complete now."""
        content = self._tokenizer.token_bytes(token_id)
        if self._strips_space and content:
            content = content.removeprefix(b" ")
            self._strips_space = False
        searched = len(self._buffer)
        self.starts.append(searched)
        self._buffer += content
        if self._stop and self._end is None and content and len(self.starts) > self._min_tokens:
            found = [self._buffer.find(stop, max(0, searched - len(stop) + 1)) for stop in self._stop]
            self._end = min((start for start in found if start >= 0), default=None)
        return self._end is not None

    def text(self) -> str:
        """Text so far, up to the first stop string; bytes that are not UTF-8 are U+FFFD."""
        return self._buffer[: self._end].decode("utf-8", "replace")

    def offsets(self) -> list[int]:
        """Character of `text` in which each token begins; at most its length."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        length, count, result = len(self.text()), 0, []
        for start, stop in itertools.pairwise([*self.starts, len(self._buffer)]):
            count += len(decoder.decode(self._buffer[start : min(start + 1, stop)]))
            is_complete = start < stop and not decoder.getstate()[0]
            result.append(min(count - is_complete, length))
            count += len(decoder.decode(self._buffer[start + 1 : stop]))
        return result


def decode(tokenizer: Tokenizer, token_ids: Iterable[int]) -> str:
    """Decode a whole text."""
    stream = TextStream(tokenizer)
    for token_id in token_ids:
        stream.append(token_id)
    return stream.text()
