"""A row becomes what the engine serves: token ids and sampling values, or an error record."""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from hpcinfer.config import SamplingParams
from hpcinfer.data.request import Prepared, RowRequest, parse_row
from hpcinfer.data.sampling_defaults import SamplingDefaults, sampling_for
from hpcinfer.data.tokenizer import Tokenizer, TokenizerSource
from hpcinfer.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from hpcinfer.data.chat import ChatTemplate


@dataclass(frozen=True)
class Preparer:
    """Prepares rows, one at a time; the same row gives the same result on every rank."""

    tokenizer: Tokenizer
    template: ChatTemplate
    defaults: SamplingDefaults
    max_model_len: int  # tokens of prompt and output together
    vocab_size: int  # of the model; its tokenizer's may be smaller
    kind: str  # of the input: "text" or "jsonl"

    def prepare(self, row: int, line: bytes) -> Prepared:
        """Parse, tokenize and check one row.

        A max_tokens that does not fit behind the prompt is lowered to what fits, also where the request gives it: the
        row is answered, with finish_reason "length".

        Raises:
            RequestError: a row that cannot be served, with the reason.
        """
        request = parse_row(row, line, self.kind)
        sampling = sampling_for(request, self.defaults)
        _check_sampling(sampling, self.vocab_size)
        prompt_ids = self._prompt_ids(request)
        return Prepared(request, np.array(prompt_ids, dtype=np.int64), self._fit(sampling, len(prompt_ids)))

    def _prompt_ids(self, request: RowRequest) -> list[int]:
        """Token ids of a prompt; the text of a chat template already has its special tokens."""
        if request.prompt_token_ids is not None:
            ids = list(request.prompt_token_ids)
        elif request.messages is not None:
            text = self.template.render(request.messages, **request.template_options)
            ids = self._encode(text, add_special_tokens=False)
        else:
            ids = self._encode(request.prompt or "", add_special_tokens=True)
        name = "messages" if request.endpoint == "chat" else "prompt"
        if not ids:
            raise RequestError("empty_prompt", f"{name}: no tokens, and none that the model begins with", param=name)
        _check_ids(name, ids, self.vocab_size)
        return ids

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except Exception:  # tokenizers raises plain Exception, as for a text outside a vocabulary without <unk>
            raise RequestError("tokenizer_error", "the model's tokenizer cannot encode this text") from None

    def _fit(self, sampling: SamplingParams, num_prompt_tokens: int) -> SamplingParams:
        """Lower max_tokens to the room behind the prompt, of at least one token (none if only the prompt is scored)."""
        room = self.max_model_len - num_prompt_tokens
        if room < min(1, sampling.max_tokens):
            message = f"the prompt has {num_prompt_tokens} tokens, max_model_len is {self.max_model_len}"
            raise RequestError("prompt_too_long", message, param="prompt")
        max_tokens = min(sampling.max_tokens, room)
        return dataclasses.replace(sampling, max_tokens=max_tokens, min_tokens=min(sampling.min_tokens, max_tokens))


@dataclass(frozen=True)
class Preparation:
    """What a preparer is made of; it is made when it is first asked for, by ranks that lead a replica."""

    source: TokenizerSource
    template_date: datetime.date  # that chat templates see
    defaults: SamplingDefaults
    max_model_len: int  # tokens of prompt and output together
    vocab_size: int  # of the model
    kind: str  # of the input: "text" or "jsonl"

    @cached_property
    def preparer(self) -> Preparer:
        """The preparer, with the model's chat template compiled."""
        from hpcinfer.data.chat import ChatTemplate

        tokenizer = self.source.tokenizer
        template = ChatTemplate(
            tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, self.template_date
        )
        return Preparer(tokenizer, template, self.defaults, self.max_model_len, self.vocab_size, self.kind)


def check_defaults(defaults: SamplingDefaults, vocab_size: int) -> None:
    """Check the token ids of the job's own sampling values.

    Raises:
        ConfigError: an id outside the vocabulary, which would make an error of every row.
    """
    try:
        _check_sampling(defaults.values, vocab_size)
    except RequestError as error:
        raise ConfigError(
            error.found, expected=f"token ids from 0 to {vocab_size - 1}", where=defaults.origins[error.param],
            hint="tokenizer.json of the model lists its token ids",
        ) from None  # fmt: skip


def _check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    _check_ids("logit_bias", [token_id for token_id, _ in sampling.logit_bias], vocab_size)
    _check_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)


def _check_ids(name: str, ids: list[int] | tuple[int, ...], vocab_size: int) -> None:
    if ids and max(ids) >= vocab_size:
        message = f"{name}: token id {max(ids)} is not in the vocabulary of {vocab_size}"
        raise RequestError("invalid_value", message, param=name)
