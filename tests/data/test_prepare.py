"""Rows become token ids and sampling values that fit the model, or errors with the reason."""

import dataclasses
import datetime
import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcinfer.data.chat import ChatTemplate
from hpcinfer.data.completion import error_record
from hpcinfer.data.fields import SAMPLING_FIELDS
from hpcinfer.data.prepare import Preparer, check_defaults
from hpcinfer.data.request import Prepared
from hpcinfer.data.sampling_defaults import resolve_defaults
from hpcinfer.data.tokenizer import Tokenizer
from hpcinfer.errors import ConfigError, RequestError


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


@pytest.mark.parametrize("cli", [{"stop_token_ids": (5, 390)}, {"logit_bias": ((390, 1.0),)}])
def test_default_ids_outside_the_vocabulary_are_refused_at_the_start(cli: dict[str, Any]) -> None:
    check_defaults(resolve_defaults(cli, {}), 391)
    with pytest.raises(ConfigError) as caught:
        check_defaults(resolve_defaults(cli, {}), 390)
    error = caught.value
    assert next(iter(cli)) in error.found and "390" in error.found
    assert (error.expected, error.where) == ("token ids from 0 to 389", "command line") and error.hint


def test_text_that_the_tokenizer_cannot_encode_is_an_error_of_the_row(preparer: Preparer) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    content = {"version": "1.0", "added_tokens": [], "model": model, "decoder": decoder}
    tokenizer = Tokenizer({"tokenizer.json": json.dumps(content).encode()})
    narrow = dataclasses.replace(preparer, tokenizer=tokenizer)
    assert prepare(narrow, prompt="a").prompt_ids.tolist() == [0]
    assert refusal(narrow, prompt="b").code == "tokenizer_error"


ODD = st.sampled_from([
    "", "\0", "\u2028", "é" * 3, "\ud800", "\udfff\ud800", "🙂", "<|begin|>", "<|end|>", "assistant", "text", "POST",
    "/v1/completions", "/v1/chat/completions", "HPCINFER_END_OF_FINAL_MESSAGE", True, False, None, 0, -1, 1.0, -0.0,
    2**31, 2**63, -(2**63) - 1, 10**299, 10**400, 1e308, math.nan, math.inf, 389, 390, [], {}, [[]], [{}], [None],
    [True], [-1], [0, 389, 2**70], ["", "a"], ["\ud800"], {"0": 1}, {"": 1}, {"-1": 1}, {"00": 1}, {"9" * 30: 1},
    {"1": math.nan}, {"１": 1}, {"type": "text", "text": ""}, [{"role": "user", "content": ""}],
    [{"role": "assistant", "content": "x", "name": ""}],
])  # fmt: skip
FIELDS = st.sampled_from([
    *SAMPLING_FIELDS["completions"], "prompt", "messages", "custom_id", "id", "body", "url", "method", "model", "role",
    "content", "name", "type", "text", "chat_template_kwargs", "add_generation_prompt", "continue_final_message",
    "metadata", "user", "best_of", "tools", "stream", "top_logprobs", "max_completion_tokens", "prompt_token_ids",
    "\ud800", "", "__class__",
])  # fmt: skip
VALUES = st.recursive(
    ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4), max_leaves=8
)
ROWS = st.builds(
    lambda base, extra: {**base, **extra},
    st.sampled_from([{"prompt": "x"}, {"messages": [{"role": "user", "content": "x"}]}, {"prompt": [5]}, {}]),
    st.dictionaries(FIELDS, VALUES, max_size=4),
)
OPENAI_ROWS = st.builds(
    lambda url, body: {"custom_id": "a", "method": "POST", "url": url, "body": body},
    st.sampled_from(["/v1/completions", "/v1/chat/completions"]), ROWS,
)  # fmt: skip
OVERWRITES = st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3)), max_size=3)


def mangled(values: dict[str, Any], overwrites: list[tuple[int, bytes]], *, is_ascii: bool) -> bytes:
    line = json.dumps(values, ensure_ascii=is_ascii).encode(errors="surrogatepass")
    for at, content in overwrites:
        line = line[:at] + content + line[at + 1 :]
    return line


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(ROWS | OPENAI_ROWS, OVERWRITES, st.booleans())
def test_any_row_is_prepared_or_becomes_an_error_record(
    preparer: Preparer, values: dict[str, Any], overwrites: list[tuple[int, bytes]], is_ascii: bool
) -> None:
    line = mangled(values, overwrites, is_ascii=is_ascii)
    for kind in ("jsonl", "text"):
        try:
            prepared = dataclasses.replace(preparer, kind=kind).prepare(0, line)
        except RequestError as error:
            record = json.loads(error_record(0, line, error, kind))
            assert record["error"]["code"] == error.code and error.found
        else:
            assert 0 < len(prepared.prompt_ids) <= 20 and min(prepared.prompt_ids) >= 0
            assert max(prepared.prompt_ids) < 390
