"""Rows become token ids and sampling values that fit the model, or errors with the reason."""

import datetime
import json
from typing import Any

import pytest

from hpcinfer.data.chat import ChatTemplate
from hpcinfer.data.prepare import Preparer
from hpcinfer.data.request import Prepared
from hpcinfer.data.sampling_defaults import resolve_defaults
from hpcinfer.data.tokenizer import Tokenizer
from hpcinfer.errors import RequestError


@pytest.fixture
def preparer(byte_level: Tokenizer) -> Preparer:
    day = datetime.date(2026, 1, 31)
    template = ChatTemplate(byte_level.chat_template, byte_level.bos_token, byte_level.eos_token, day)
    defaults = resolve_defaults({"min_tokens": 3}, {})
    return Preparer(byte_level, template, defaults, max_model_len=20, vocab_size=390, kind="jsonl")


def prepare(preparer: Preparer, **values: Any) -> Prepared:
    return preparer.prepare(4, json.dumps(values).encode())


def refusal(preparer: Preparer, **values: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        prepare(preparer, **values)
    return caught.value


def test_plain_prompt_begins_with_bos(preparer: Preparer) -> None:
    prepared = prepare(preparer, prompt="x")
    assert prepared.prompt_ids.tolist()[0] == 0 and prepared.prompt_ids.dtype == "int64"
    assert prepare(preparer, prompt="").prompt_ids.tolist() == [0]
    assert prepared.request.row == 4


def test_chat_prompt_has_one_bos(preparer: Preparer) -> None:
    ids = prepare(preparer, messages=[{"role": "user", "content": "x"}]).prompt_ids.tolist()
    assert ids[:2] == [0, 2] and ids[-1] == 3 and ids.count(0) == 1


def test_token_ids_are_taken_as_they_are(preparer: Preparer) -> None:
    assert prepare(preparer, prompt=[7, 7, 389]).prompt_ids.tolist() == [7, 7, 389]


@pytest.mark.parametrize("options", [{}, {"max_tokens": 500}, {"max_tokens": 500, "min_tokens": 400}])
def test_max_tokens_is_lowered_to_what_fits(preparer: Preparer, options: dict[str, int]) -> None:
    sampling = prepare(preparer, prompt=[5] * 18, **options).sampling
    assert (sampling.max_tokens, sampling.min_tokens) == (2, 2)


def test_prompt_must_leave_room_for_one_token(preparer: Preparer) -> None:
    assert prepare(preparer, prompt=[5] * 19).sampling.max_tokens == 1
    error = refusal(preparer, prompt=[5] * 20)
    assert (error.code, error.param) == ("prompt_too_long", "prompt")
    assert "20 tokens" in str(error)


def test_scored_prompt_may_fill_the_model(preparer: Preparer) -> None:
    sampling = prepare(preparer, prompt=[5] * 20, echo=True, logprobs=1, max_tokens=0).sampling
    assert (sampling.max_tokens, sampling.scores_prompt) == (0, True)
    assert refusal(preparer, prompt=[5] * 21, echo=True, logprobs=1, max_tokens=0).code == "prompt_too_long"


@pytest.mark.parametrize("name", ["prompt", "stop_token_ids", "logit_bias"])
def test_ids_outside_the_vocabulary_are_named(preparer: Preparer, name: str) -> None:
    value = {"390": 1} if name == "logit_bias" else [5, 390]
    error = refusal(preparer, **{"prompt": "x", name: value})
    assert (error.code, error.param) == ("invalid_value", name)
    assert "390" in str(error)


def test_tokenizer_larger_than_the_model_is_noticed(preparer: Preparer) -> None:
    assert refusal(preparer, prompt="<think é>").code == "invalid_value"


def test_empty_prompt_without_bos_is_refused(preparer: Preparer, byte_level_files: dict[str, bytes]) -> None:
    content = json.loads(byte_level_files["tokenizer.json"]) | {"post_processor": None}
    tokenizer = Tokenizer({"tokenizer.json": json.dumps(content).encode()})
    template = ChatTemplate("", None, None, datetime.date(2026, 1, 31))
    bare = Preparer(tokenizer, template, resolve_defaults({}, {}), 20, 390, "jsonl")
    assert refusal(bare, prompt="").code == "empty_prompt"
    assert refusal(bare, messages=[{"role": "user", "content": "x"}]).param == "messages"


def test_errors_of_all_steps_come_out(preparer: Preparer) -> None:
    assert refusal(preparer, prompt="x", top_p=7).param == "top_p"
    assert refusal(preparer, prompt="x", max_tokens=0).param == "max_tokens"
    assert refusal(preparer).code == "missing_field"
    user = [{"role": "user", "content": "x"}]
    assert refusal(preparer, messages=user, chat_template_kwargs={"a": 1}).param == "chat_template_kwargs.a"
