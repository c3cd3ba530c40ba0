"""A long text as windows of tokens, for evaluation and calibration."""

from datetime import date
from pathlib import Path

from hpcinfer.data.chat import ChatTemplate
from hpcinfer.data.prepare import Preparer
from hpcinfer.data.sampling_defaults import resolve_defaults
from hpcinfer.data.tokenizer import Tokenizer
from hpcinfer.errors import ConfigError, RequestError

_ANY_DATE = date(2000, 1, 1)  # that templates see: the same in every year
_NO_LIMIT = 1 << 62  # tokens of a prompt that is cut into windows


def text_ids(path: Path, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Tokens of a text file, without any that stand only at a beginning or end.

    Raises:
        ConfigError: a file that cannot be read, or a token that the model does not have.
    """
    text = _read_text(path)
    try:
        ids = tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # tokenizers raises plain Exception, as for a text outside a vocabulary without <unk>
        raise ConfigError(
            f"the model's tokenizer cannot encode it ({error})", expected="text in its vocabulary", where=str(path)
        ) from error
    if max(ids, default=0) >= vocab_size:
        raise ConfigError(f"token {max(ids)} in {path}", expected=f"ids below {vocab_size}, the model's vocabulary")
    return ids


def prompt_ids(path: Path, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Tokens of a text file, or of the prompts of a .jsonl file as a job would see them, one after the other.

    Raises:
        ConfigError: a file that cannot be read, or a row that is no prompt.
    """
    if path.suffix != ".jsonl":
        return text_ids(path, tokenizer, vocab_size)
    template = ChatTemplate(tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, _ANY_DATE)
    preparer = Preparer(tokenizer, template, resolve_defaults({}, {}), _NO_LIMIT, vocab_size, "jsonl")
    ids: list[int] = []
    for row, line in enumerate(_read_text(path).split("\n")):
        try:
            ids += preparer.prepare(row, line.encode()).prompt_ids.tolist() if line.strip() else []
        except RequestError as error:
            raise ConfigError(f"row {row}: {error.found}", expected="a prompt in each row", where=str(path)) from error
    return ids


def first_tokens(tokenizer: Tokenizer) -> list[int]:
    """The begin-of-sequence token, if a model's prompts begin with one; else nothing."""
    alone, before_text = (tokenizer.encode(text, add_special_tokens=True)[:1] for text in ("", "a"))
    return alone if alone == before_text else []


def cut_windows(ids: list[int], length: int, first: list[int]) -> list[tuple[int, ...]]:
    """Cut tokens into windows of at most `length` that do not overlap, each behind the `first` ones.

    A window of one token is left out: it predicts nothing.
    """
    step = length - len(first)
    windows = [(*first, *ids[start : start + step]) for start in range(0, len(ids), step)] if step > 0 else []
    return [window for window in windows if len(window) > 1]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"a text that cannot be read: {error}",
            expected="a file in UTF-8",
            where=str(path),
            hint="check the path; iconv -t UTF-8 converts other encodings",
        ) from error
