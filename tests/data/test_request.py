"""Every field of a request is served or refused by name; every malformed line has its own code."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.data.request import RowRequest, parse_row
from hpcinfer.errors import RequestError

CHAT = [{"role": "user", "content": "hi"}]


def parse(values: Any) -> RowRequest:
    return parse_row(3, json.dumps(values).encode(), "jsonl")


def completion(**body: Any) -> RowRequest:
    return parse({"prompt": "p", **body})


def chat(**body: Any) -> RowRequest:
    return parse({"messages": CHAT, **body})


def refusal(line: Any, kind: str = "jsonl") -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_row(0, line if isinstance(line, bytes) else json.dumps(line).encode(), kind)
    return caught.value


def test_text_line_is_a_completion() -> None:
    assert parse_row(3, b'{"prompt": 1}', "text") == RowRequest(3, "completions", "text", prompt='{"prompt": 1}')


def test_openai_lines_of_both_endpoints() -> None:
    head = {"custom_id": "a-1", "method": "POST"}
    request = parse({**head, "url": "/v1/completions", "body": {"model": "m", "prompt": "p", "max_tokens": 4}})
    assert (request.endpoint, request.shape, request.custom_id, request.model) == ("completions", "openai", "a-1", "m")
    assert (request.prompt, request.options) == ("p", {"max_tokens": 4})
    request = parse({**head, "url": "/v1/chat/completions", "body": {"messages": CHAT}})
    assert (request.endpoint, request.messages, request.prompt) == ("chat", tuple(CHAT), None)


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"custom_id": None}, "missing_field", "custom_id"),
        ({"custom_id": 5}, "invalid_type", "custom_id"),
        ({"method": None}, "missing_field", "method"),
        ({"method": "GET"}, "invalid_value", "method"),
        ({"method": 3}, "invalid_type", "method"),
        ({"url": "/v1/embeddings"}, "unsupported_url", "url"),
        ({"url": None}, "missing_field", "url"),
        ({"body": None}, "missing_field", "body"),
        ({"body": [1]}, "invalid_type", "body"),
        ({"body": {}}, "missing_field", "prompt"),
        ({"body": {"messages": CHAT}}, "missing_field", "prompt"),
        ({"extra": 1}, "unknown_field", "extra"),
    ],
)
def test_malformed_openai_envelope(change: dict[str, Any], code: str, param: str) -> None:
    values = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "p"}, **change}
    error = refusal(values)
    assert (error.code, error.param) == (code, param)
    assert param in str(error)


@pytest.mark.parametrize(
    ("given_id", "field", "value"),
    [({"id": 17}, "id", 17), ({"custom_id": "x"}, "custom_id", "x"), ({"id": None}, "id", None)],
)
def test_simple_row_keeps_its_id(given_id: dict[str, Any], field: str, value: str | int | None) -> None:
    request = completion(**given_id)
    assert (request.id_field, request.custom_id, request.shape) == (field, value, "simple")


SAMPLING = {
    "temperature": (1, 1.0), "top_p": (0.5, 0.5), "top_k": (40, 40), "min_p": (0.1, 0.1),
    "repetition_penalty": (2, 2.0), "presence_penalty": (-1, -1.0), "frequency_penalty": (0.5, 0.5),
    "max_tokens": (9, 9), "min_tokens": (2, 2),
    "stop": ("x", ("x",)), "stop_token_ids": ([3, 1], (3, 1)), "ignore_eos": (True, True), "n": (2, 2),
    "seed": (-5, -5), "logit_bias": ({"10": -100, "9": 1.5}, ((9, 1.5), (10, -100.0))),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_field_is_taken_by_both_endpoints(name: str) -> None:
    value, expected = SAMPLING[name]
    for make in (completion, chat):
        options = make(**{name: value}).options
        assert options == {name: expected} and type(options[name]) is type(expected)
        assert make(**{name: None}).options == {}


def test_fields_of_one_endpoint() -> None:
    assert completion(logprobs=3, echo=True, max_tokens=0).options == {"logprobs": 3, "echo": True, "max_tokens": 0}
    assert chat(max_completion_tokens=5).options == {"max_tokens": 5}
    assert chat(max_completion_tokens=5, max_tokens=5).options == {"max_tokens": 5}
    assert chat(logprobs=True).options == {"logprobs": 0}
    assert chat(logprobs=True, top_logprobs=4).options == {"logprobs": 4}
    assert chat(logprobs=False, top_logprobs=0).options == {"logprobs": None}
    assert completion(stop=["a", "b"]).options == {"stop": ("a", "b")}


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", "1"), ("temperature", True), ("temperature", [1]), ("top_k", 1.0), ("top_k", True), ("n", "2"),
     ("max_tokens", 2.5), ("seed", 1.0), ("stop", 3), ("stop", [3]), ("stop", [None]), ("stop_token_ids", "3"),
     ("stop_token_ids", [1.0]), ("stop_token_ids", [True]), ("ignore_eos", 1), ("ignore_eos", "true"), ("echo", 0),
     ("logprobs", True), ("logit_bias", []), ("logit_bias", {"1": "2"}), ("logit_bias", {"1": True}), ("model", 3)],
)  # fmt: skip
def test_wrong_types_are_named(name: str, value: Any) -> None:
    error = refusal({"prompt": "p", name: value})
    assert error.code == "invalid_type"
    assert error.param.startswith(name) and "expected" in str(error)


@pytest.mark.parametrize(
    ("name", "value"),
    [("stop", ""), ("stop", ["a", ""]), ("stop_token_ids", [-1]), ("seed", 2**63),
     ("logit_bias", {"x": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"01": 1}), ("logit_bias", {"٣": 1}),
     ("logit_bias", {"1": 101}), ("logit_bias", {"9" * 5000: 1})],
)  # fmt: skip
def test_wrong_values_are_named(name: str, value: Any) -> None:
    error = refusal({"prompt": "p", name: value})
    assert (error.code, error.param.partition("[")[0]) == ("invalid_value", name)


NOT_IMPLEMENTED = {
    "tools": [{"type": "function"}], "tool_choice": "required", "response_format": {"type": "json_object"},
    "best_of": 3, "suffix": "end", "stream": True, "stream_options": {"include_usage": True}, "logit_processors": ["x"],
    "logits_processors": ["x"], "audio": {}, "modalities": ["text", "audio"], "store": True, "functions": [{}],
    "function_call": {"name": "f"}, "guided_json": {}, "structured_outputs": {}, "prompt_logprobs": 1,
    "use_beam_search": True, "length_penalty": 0.5, "skip_special_tokens": False, "include_stop_str_in_output": True,
    "truncate_prompt_tokens": 5, "bad_words": ["x"], "reasoning_effort": "low", "chat_template": "x", "priority": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_IMPLEMENTED)
def test_what_is_not_implemented_is_refused_by_name(name: str) -> None:
    for source in ({"prompt": "p"}, {"messages": CHAT}):
        error = refusal({**source, name: NOT_IMPLEMENTED[name]})
        assert (error.code, error.param) == ("not_implemented", name)
        parse({**source, name: None})


@pytest.mark.parametrize(
    "body",
    [{"stream": False}, {"tools": []}, {"tool_choice": "none"}, {"response_format": {"type": "text"}}, {"store": False},
     {"best_of": 1}, {"best_of": 3, "n": 3}, {"user": "me"}, {"metadata": {"a": "b"}}, {"suffix": ""},
     {"service_tier": "auto"}, {"modalities": ["text"]}, {"parallel_tool_calls": True}, {"length_penalty": 1}],
)  # fmt: skip
def test_neutral_values_are_accepted(body: dict[str, Any]) -> None:
    assert completion(**body).options == {name: value for name, value in body.items() if name == "n"}


@pytest.mark.parametrize("body", [{"best_of": 2}, {"best_of": 2, "n": 3}, {"stream": 0}, {"tools": {}}, {"store": ""}])
def test_near_neutral_values_are_not(body: dict[str, Any]) -> None:
    assert refusal({"prompt": "p", **body}).code == "not_implemented"


@pytest.mark.parametrize(
    ("source", "name"),
    [("prompt", "temprature"), ("prompt", "top_logprobs"), ("prompt", "max_completion_tokens"),
     ("prompt", "chat_template_kwargs"), ("messages", "prompt_"), ("messages", "")],
)  # fmt: skip
def test_unknown_field_is_named_even_if_null(source: str, name: str) -> None:
    for value in (None, 1):
        error = refusal({source: CHAT if source == "messages" else "p", name: value})
        assert (error.code, error.param) == ("unknown_field", name)


def test_echo_of_a_chat_is_refused() -> None:
    assert refusal({"messages": CHAT, "echo": True}).param == "echo"
    chat(echo=False)


@pytest.mark.parametrize(
    ("prompt", "code"),
    [(["a", "b"], "invalid_value"), (["a"], "invalid_value"), ([[1]], "invalid_value"), ([], "empty_prompt"),
     ([1, True], "invalid_type"), ([1.0], "invalid_type"), ([-1], "invalid_value"), (5, "invalid_type"),
     (None, "missing_field"), ({}, "invalid_type")],
)  # fmt: skip
def test_prompts_that_are_not_one_prompt(prompt: Any, code: str) -> None:
    assert refusal({"prompt": prompt}).code == code


def test_prompt_of_token_ids() -> None:
    request = parse({"prompt": [5, 0, 7]})
    assert (request.prompt, request.prompt_token_ids) == (None, (5, 0, 7))


def test_neither_or_both_sources() -> None:
    assert refusal({"max_tokens": 3}).code == "missing_field"
    assert refusal({"prompt": "p", "messages": CHAT}).param == "messages"


def test_text_parts_are_joined_by_newlines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse({"messages": [{"role": "user", "content": parts, "name": "me"}]}).messages == (
        {"role": "user", "content": "a\nb", "name": "me"},
    )


@pytest.mark.parametrize(
    ("messages", "code", "param"),
    [
        ([], "invalid_type", "messages"),
        ("hi", "invalid_type", "messages"),
        (["hi"], "invalid_type", "messages[0]"),
        ([*CHAT, {"content": "x"}], "invalid_type", "messages[1].role"),
        ([{"role": "wizard", "content": "x"}], "invalid_value", "messages[0].role"),
        ([{"role": "tool", "content": "x"}], "not_implemented", "messages[0].role"),
        ([{"role": "user"}], "invalid_type", "messages[0].content"),
        ([{"role": "user", "content": 3}], "invalid_type", "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "not_implemented",
         "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "invalid_type", "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}], "unknown_field",
         "messages[0].content[0].b"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "not_implemented", "messages[0].tool_calls"),
        ([{"role": "user", "content": "x", "name": 3}], "invalid_type", "messages[0].name"),
    ],
)  # fmt: skip
def test_malformed_messages(messages: Any, code: str, param: str) -> None:
    error = refusal({"messages": messages})
    assert (error.code, error.param) == (code, param)


def test_empty_tool_calls_of_a_message_are_accepted() -> None:
    message = {"role": "assistant", "content": "x", "tool_calls": [], "refusal": None}
    assert parse({"messages": [message]}).messages == ({"role": "assistant", "content": "x"},)


def test_template_options() -> None:
    assert chat().template_options == {"add_generation_prompt": True, "continue_final_message": False}
    assert chat(continue_final_message=True).template_options["add_generation_prompt"] is False
    assert chat(chat_template_kwargs={"enable_thinking": False}).template_options["enable_thinking"] is False
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert refusal({"messages": CHAT, **both}).code == "invalid_value"
    for name in ("messages", "tools", "add_generation_prompt", "__class__", "bos_token"):
        error = refusal({"messages": CHAT, "chat_template_kwargs": {name: 1}})
        assert error.param == f"chat_template_kwargs.{name}"


@pytest.mark.parametrize(
    ("body", "param"),
    [({"logprobs": 2}, "logprobs"), ({"top_logprobs": 2}, "top_logprobs"),
     ({"max_completion_tokens": 2, "max_tokens": 3}, "max_tokens"),
     ({"add_generation_prompt": 1}, "add_generation_prompt"), ({"chat_template_kwargs": []}, "chat_template_kwargs")],
)  # fmt: skip
def test_malformed_chat_options(body: dict[str, Any], param: str) -> None:
    assert refusal({"messages": CHAT, **body}).param == param


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"prompt": "a"', "invalid_json"),
        (b"prompt", "invalid_json"),
        (b'{"prompt": "a"} x', "invalid_json"),
        (b'{"prompt": "a\tb"}', "invalid_json"),
        (b'{"prompt": "a", "temperature": NaN}', "invalid_json"),
        (b'{"prompt": "a", "temperature": -Infinity}', "invalid_json"),
        (b'{"prompt": "a", "temperature": 1e999}', "invalid_value"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"prompt": "a", "seed": ' + b"9" * 301 + b"}", "invalid_json"),
        (b'{"prompt": "a", "top_p": 0.' + b"9" * 300 + b"}", "invalid_json"),
        (b'{"prompt": "a", "metadata": -1e999}', "invalid_value"),
        (b'{"prompt": ' + b"[" * 100000, "invalid_json"),
        (b"[" * 65 + b"]" * 65, "invalid_json"),
        (b"[" * 64 + b"]" * 64, "not_an_object"),
        (b'{"prompt": "\xff"}', "invalid_utf8"),
        (b'\xef\xbb\xbf{"prompt": "a"}', "byte_order_mark"),
        (b'{"prompt": "a", "prompt": "b"}', "duplicate_key"),
        (b'{"prompt": "a", "metadata": {"x": 1, "x": 2}}', "duplicate_key"),
        (b'{"prompt": "\\ud83d"}', "lone_surrogate"),
        (b'{"prompt": "a", "\\udc00": 1}', "lone_surrogate"),
        (b"[1]", "not_an_object"),
        (b'"text"', "not_an_object"),
        (b"null", "not_an_object"),
        (b"5", "not_an_object"),
    ],
)
def test_malformed_lines_have_a_code_each(line: bytes, code: str) -> None:
    error = refusal(line)
    assert error.code == code
    str(error).encode()


@pytest.mark.parametrize("depth", [2, 63, 64, 900, 100_000])
@pytest.mark.parametrize("prompt", ["\\ud83d\\ude00", "[[[{{{", '\\"[\\\\'])
def test_depth_has_a_limit_of_ours_however_much_stack_is_left(depth: int, prompt: str) -> None:
    line = f'{{"prompt": "{prompt}", "metadata": {"[" * (depth - 1)}{"]" * (depth - 1)}}}'.encode()

    def outcome(num_frames: int) -> str:
        if num_frames > 0:
            return outcome(num_frames - 1)
        try:
            return parse_row(0, line, "jsonl").prompt or ""
        except RequestError as error:
            return f"{error.code} {error.found}"

    expected = json.loads(f'"{prompt}"') if depth <= 64 else "invalid_json objects and arrays more than 64 deep"
    assert outcome(0) == outcome(700) and outcome(0).startswith(expected)


@pytest.mark.parametrize(
    "line", [b"[" * 70, b'"' + b"[" * 70, b'{"a": "' + b'\\"' * 200_000 + b"[" * 70, b"\\" + b"[" * 70]
)
def test_broken_lines_with_many_brackets_are_refused_quickly(line: bytes) -> None:
    assert refusal(line).code == "invalid_json"


def test_messages_are_not_those_of_python() -> None:
    assert refusal(b'{"prompt": }').found == "invalid JSON at character 11"
    assert refusal(b'a\xff').found == "byte 1 of the line is not UTF-8"
    assert refusal(b'{"a": ' + b"1" * 5000 + b"}").found == "a number of more than 300 characters"


def test_many_keys_are_compared_quickly() -> None:
    keys = ",".join(f'"{i}": 0' for i in range(100_000))
    assert refusal(f'{{{keys}, "99999": 1}}'.encode()).param == "99999"


def test_malformed_text_lines() -> None:
    assert refusal(b"\xc3", "text").code == "invalid_utf8"
    assert refusal(b"\xef\xbb\xbfhello", "text").code == "byte_order_mark"


def test_escaped_pair_is_one_character() -> None:
    assert parse_row(0, b'{"prompt": "\\ud83d\\ude42"}', "jsonl").prompt == "🙂"


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                    max_leaves=6)  # fmt: skip
OTHERS = ("logprobs", "echo", "custom_id", "id", "url", "body", "method", "x", "chat_template_kwargs")
NAMES = st.sampled_from([*SAMPLING, *NOT_IMPLEMENTED, *OTHERS])


@given(st.dictionaries(NAMES, JSON, max_size=3), st.sampled_from([{"prompt": "p"}, {"messages": CHAT}, {}]))
def test_any_object_is_a_request_or_a_named_error(extra: dict[str, Any], source: dict[str, Any]) -> None:
    try:
        parse({**source, **extra})
    except RequestError as error:
        assert error.code and error.found


@given(st.binary(max_size=60))
def test_any_line_is_a_request_or_a_named_error(line: bytes) -> None:
    for kind in ("text", "jsonl"):
        try:
            parse_row(0, line, kind)
        except RequestError as error:
            assert error.code and error.found
