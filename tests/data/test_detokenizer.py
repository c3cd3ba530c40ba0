"""The text is that of the whole byte string, whatever tokens it came in."""

from hypothesis import example, given
from hypothesis import strategies as st

from hpcinfer.data.detokenizer import TextStream, decode
from hpcinfer.data.tokenizer import Tokenizer


class Pieces:
    """A tokenizer whose token i is the i-th of some byte strings."""

    strips_space = False

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    def token_bytes(self, token_id: int) -> bytes:
        return self._pieces[token_id]


def feed(pieces: list[bytes], stop: tuple[str, ...] = (), min_tokens: int = 0) -> tuple[TextStream, int]:
    """Append until a stop string is complete; gives the number of tokens taken."""
    stream = TextStream(Pieces(pieces), stop, min_tokens=min_tokens)  # type: ignore[arg-type]
    for count in range(len(pieces)):
        if stream.append(count):
            return stream, count + 1
    return stream, len(pieces)


UTF8 = st.text(alphabet="ab\né東🙂", max_size=3).map(str.encode)
BROKEN = st.sampled_from([b"\xf0", b"\x9f\x99", b"\x82", b"\xe6\x9d", b"\xb1", b"\xc3", b"\xff", b"\xe0\x80", b""])
TOKENS = st.lists(UTF8 | BROKEN | st.binary(max_size=3), max_size=12)


@given(TOKENS)
@example([b"\xf0\x9f", b"\x99\x82"])
def test_text_equals_decoding_of_the_whole(pieces: list[bytes]) -> None:
    assert feed(pieces)[0].text() == b"".join(pieces).decode("utf-8", "replace")


@given(TOKENS, st.lists(st.text(alphabet="ab\né東🙂", min_size=1, max_size=3), max_size=3), st.integers(0, 4))
@example([b"xa", b"", b"bay"], ["aba", "b"], 0)
@example([b"ab", b"ab"], ["ab"], 1)
def test_text_ends_before_the_first_stop_string(pieces: list[bytes], stops: list[str], min_tokens: int) -> None:
    stream, count = feed(pieces, tuple(stops), min_tokens)
    expected, expected_count = b"".join(pieces), len(pieces)
    for n in range(min_tokens + 1, len(pieces) + 1):
        free, whole = len(b"".join(pieces[:n - 1])), b"".join(pieces[:n])
        ends = [(at, at + len(stop.encode())) for stop in stops for at in range(len(whole))
                if whole.startswith(stop.encode(), at)]  # fmt: skip
        if starts := [start for start, end in ends if end > free]:
            expected, expected_count = whole[:min(starts)], n
            break
    assert (stream.text(), count) == (expected.decode("utf-8", "replace"), expected_count)


@given(TOKENS)
def test_offsets_are_the_characters_where_tokens_begin(pieces: list[bytes]) -> None:
    stream, _ = feed(pieces)
    whole, text = b"".join(pieces), stream.text()
    bounds = [0]  # byte at which each character ends, found by decoding byte by byte
    for offset, start, piece in zip(stream.offsets(), stream.starts, pieces, strict=True):
        head = whole[:start].decode("utf-8", "replace")
        assert offset in (len(head), len(head) - 1)
        if piece[:1] and piece[0] < 0x80:
            assert offset == len(head) and text[offset] == chr(piece[0])
        bounds.append(offset)
    assert bounds == sorted(bounds) and bounds[-1] <= len(text)


def test_offsets_stay_inside_a_cut_text() -> None:
    stream, _ = feed([b"ab", b"cSTO", b"P!"], ("STOP",))
    assert (stream.text(), stream.offsets()) == ("abc", [0, 2, 3])


def test_split_character_has_one_offset() -> None:
    assert feed([b"x", b"\xf0\x9f", b"\x99\x82", b"y"])[0].offsets() == [0, 1, 1, 2]


def test_earlier_of_two_matches_in_one_token_counts() -> None:
    assert feed([b"one two three"], ("three", "two"))[0].text() == "one "


def test_leading_space_goes_only_at_the_very_start(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("the cat", add_special_tokens=False)
    assert decode(sentencepiece, ids) == "the cat"
    after_text, after_bos = TextStream(sentencepiece, prompt_ids=ids), TextStream(sentencepiece, prompt_ids=[1])
    for token_id in ids:
        after_text.append(token_id)
        after_bos.append(token_id)
    assert (after_text.text(), after_bos.text()) == (" the cat", "the cat")


def test_special_tokens_are_no_text(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level, ("<|end|>",))
    assert not stream.append(1)
    assert stream.text() == ""
