"""Records, byte for byte."""

import json
from typing import Any

import numpy as np
import pytest

from hpcinfer.data.completion import Choice, TokenLogprob, completion_record, error_record
from hpcinfer.data.prepare import sampling_for
from hpcinfer.data.request import Prepared, parse_row
from hpcinfer.data.sampling_defaults import resolve_defaults
from hpcinfer.data.tokenizer import Tokenizer
from hpcinfer.errors import RequestError

CHAT = [{"role": "user", "content": "hi"}]


def prepared(tokenizer: Tokenizer, values: dict[str, Any] | bytes, prompt: str = "ab") -> Prepared:
    is_text = isinstance(values, bytes)
    line = values if isinstance(values, bytes) else json.dumps(values).encode()
    request = parse_row(12, line, "text" if is_text else "jsonl")
    ids = tokenizer.encode(prompt, add_special_tokens=True)
    return Prepared(request, np.array(ids), sampling_for(request, resolve_defaults({}, {})))


def choice(tokenizer: Tokenizer, text: str, index: int = 0, **more: Any) -> Choice:
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    return Choice(index, ids, text, "stop", **more)


def record(tokenizer: Tokenizer, values: dict[str, Any] | bytes, *choices: Choice) -> Any:
    line = completion_record(prepared(tokenizer, values), choices, "demo", tokenizer)
    assert b"\n" not in line
    return json.loads(line)


def scored(tokenizer: Tokenizer, text: str, top: tuple[tuple[int, float], ...] = ()) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(i, -0.5, top) for i in tokenizer.encode(text, add_special_tokens=False))


def test_openai_completion_record(byte_level: Tokenizer) -> None:
    row = {"custom_id": "ä", "method": "POST", "url": "/v1/completions", "body": {"prompt": "ab"}}
    line = completion_record(prepared(byte_level, row), (choice(byte_level, 'ö"\n'),), "demo", byte_level)
    assert line.decode() == (
        '{"id": "batch_req-000000012", "custom_id": "ä", '
        '"response": {"status_code": 200, "request_id": "req-000000012", '
        '"body": {"id": "cmpl-000000012", "object": "text_completion", "created": 0, "model": "demo", '
        '"choices": [{"index": 0, "text": "ö\\"\\n", "logprobs": null, "finish_reason": "stop"}], '
        '"usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}}, "error": null}'
    )


def test_openai_chat_record(byte_level: Tokenizer) -> None:
    row = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": CHAT, "n": 2}}
    body = record(byte_level, row, choice(byte_level, "x"), choice(byte_level, "yy", 1))["response"]["body"]
    assert (body["id"], body["object"]) == ("chatcmpl-000000012", "chat.completion")
    assert body["choices"][1] == {"index": 1, "message": {"role": "assistant", "content": "yy"}, "logprobs": None,
                                  "finish_reason": "stop"}  # fmt: skip


def test_simple_records(byte_level: Tokenizer) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 1}
    x, z = choice(byte_level, "x"), choice(byte_level, "z", 1)
    assert record(byte_level, b"ab", x) == {"row": 12, "text": "x", "finish_reason": "stop", **usage}
    row = {"id": 7, "prompt": "ab"}
    assert record(byte_level, row, x) == {"row": 12, "id": 7, "text": "x", "finish_reason": "stop", **usage}
    row = {"custom_id": "k", "messages": CHAT}
    message = {"role": "assistant", "content": "x"}
    assert record(byte_level, row, x) == {
        "row": 12, "custom_id": "k", "message": message, "finish_reason": "stop", **usage,
    }  # fmt: skip
    several = record(byte_level, {"prompt": "ab", "n": 2}, x, z)
    assert [one["text"] for one in several["choices"]] == ["x", "z"]
    assert several["completion_tokens"] == 2


def test_logprobs_of_a_completion(byte_level: Tokenizer) -> None:
    x, y = byte_level.encode("xy", add_special_tokens=False)
    logprobs = (TokenLogprob(x, -0.12345678, ((x, -0.12345678), (y, -1e-9))), TokenLogprob(1, -np.inf, ((y, -0.5),)))
    one = Choice(0, (x, 1), "x", "stop", logprobs=logprobs)
    assert record(byte_level, {"prompt": "ab", "logprobs": 2}, one)["logprobs"] == {
        "tokens": ["x", "<|end|>"],
        "token_logprobs": [-0.123457, -9999.0],
        "top_logprobs": [{"x": -0.123457, "y": 0.0}, {"y": -0.5, "<|end|>": -9999.0}],
        "text_offset": [0, 1],
    }


def test_negative_zero_is_not_written(byte_level: Tokenizer) -> None:
    one = choice(byte_level, "x", logprobs=(TokenLogprob(90, -1e-12),))
    line = completion_record(prepared(byte_level, {"prompt": "ab", "logprobs": 0}), (one,), "demo", byte_level)
    assert b'"token_logprobs": [0.0]' in line


def test_echo_with_logprobs_covers_the_prompt(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("ab", add_special_tokens=True)
    in_prompt = (TokenLogprob(ids[0], None), *scored(byte_level, "ab"))
    one = choice(byte_level, "xy", logprobs=scored(byte_level, "xy"), prompt_logprobs=in_prompt)
    values = {"prompt": "ab", "echo": True, "logprobs": 1}
    body = record(byte_level, values, one)
    assert body["text"] == "abxy"
    assert body["logprobs"]["tokens"] == ["<|begin|>", "a", "b", "x", "y"]
    assert body["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5]
    assert body["logprobs"]["top_logprobs"][0] is None
    assert body["logprobs"]["text_offset"] == [0, 0, 1, 2, 3]
    scoring = Choice(0, (), "", "length", logprobs=(), prompt_logprobs=in_prompt)
    body = record(byte_level, values | {"max_tokens": 0}, scoring)
    assert (body["text"], body["completion_tokens"]) == ("ab", 0)
    assert body["logprobs"]["text_offset"] == [0, 0, 1]


def test_echo_of_token_ids_is_their_text(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("ab", add_special_tokens=True)
    assert record(byte_level, {"prompt": ids, "echo": True}, choice(byte_level, "x"))["text"] == "abx"


def test_offsets_end_with_a_text_cut_by_a_stop_string(byte_level: Tokenizer) -> None:
    ids = tuple(byte_level.encode("xyz", add_special_tokens=False))
    one = Choice(0, ids, "x", "stop", logprobs=scored(byte_level, "xyz"))
    assert record(byte_level, {"prompt": "ab", "logprobs": 0}, one)["logprobs"]["text_offset"] == [0, 1, 1]


def test_logprobs_of_a_chat(byte_level: Tokenizer) -> None:
    [x] = byte_level.encode("x", add_special_tokens=False)
    half = byte_level.encode("🙂", add_special_tokens=False)[0]
    one = Choice(0, (x, 1), "x", "stop", logprobs=(TokenLogprob(x, -0.5, ((half, -0.25),)), TokenLogprob(1, -1.0)))
    row = {"messages": CHAT, "logprobs": True, "top_logprobs": 1}
    content = record(byte_level, row, one)["logprobs"]["content"]
    top = {"token": byte_level.token_text(half), "logprob": -0.25, "bytes": list(byte_level.token_bytes(half))}
    assert content == [
        {"token": "x", "logprob": -0.5, "bytes": [120], "top_logprobs": [top]},
        {"token": "<|end|>", "logprob": -1.0, "bytes": list(b"<|end|>"), "top_logprobs": []},
    ]


ERROR = RequestError("invalid_value", "top_p=7: expected …", param="top_p")
BODY = {"code": "invalid_value", "message": "top_p=7: expected …", "param": "top_p"}


@pytest.mark.parametrize(
    ("line", "custom_id"),
    [
        (b'{"custom_id": "a", "method": "POST", "url": "/v1/x", "body": {}}', "a"),
        (b'{"custom_id": "\\u00e4\\"", "method": "POST", "body": {"prompt": "x"', 'ä"'),
        (b'{"custom_id": "a", "body": {"prompt": "\xff"}}', "a"),
        (b'{"custom_id": "\\ud800", "body": {}}', None),
        (b'{"custom_id": "\xff", "body": {}}', None),
        (b'{"method": "POST"}', None),
        (b'{"custom_id": ["a"], "body": {}}', None),
    ],
)
def test_errors_of_openai_lines_keep_the_id(line: bytes, custom_id: str | None) -> None:
    expected = {"id": "batch_req-000000012", "custom_id": custom_id, "response": None, "error": BODY}
    assert json.loads(error_record(12, line, ERROR)) == expected


@pytest.mark.parametrize(
    ("line", "head"),
    [(b"garbage", {}), (b'{"id": 5, "prompt": "x"}', {"id": 5}), (b'{"custom_id": "a"', {"custom_id": "a"}),
     (b"[1]", {}), (b"", {}), (b'{"id": [5]}', {}), (b'{"id": true}', {})],
)  # fmt: skip
def test_errors_of_simple_lines(line: bytes, head: dict[str, Any]) -> None:
    assert json.loads(error_record(12, line, ERROR)) == {"row": 12, **head, "error": BODY}


def test_text_line_that_looks_like_json_has_no_id() -> None:
    assert json.loads(error_record(12, b'{"id": 5, "body": 1}', ERROR, "text")) == {"row": 12, "error": BODY}
    assert json.loads(error_record(1, b"x", RequestError("c", "m"), "text"))["error"]["param"] is None
