"""One row of the input becomes a request, or an error that names what is wrong with it.

Three shapes: OpenAI batch lines, JSON objects with `prompt` or `messages`, and plain text lines.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpcinfer.config import SamplingParams
from hpcinfer.data.fields import LABELS, SAMPLING_FIELDS, TEMPLATE_FIELDS, refuse_field, string, token_ids, wrong_type
from hpcinfer.data.rows import MAX_ROW_BYTES
from hpcinfer.data.strict_json import decode_line, parse_object
from hpcinfer.errors import RequestError

OPENAI_KEYS = ("custom_id", "method", "url", "body")
ENDPOINTS = {"/v1/completions": "completions", "/v1/chat/completions": "chat"}
ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True)
class RowRequest:
    """What one row asks for. Exactly one of prompt, prompt_token_ids and messages is there."""

    row: int  # index among the rows of the input
    endpoint: str  # "completions" or "chat"
    shape: str  # "openai", "simple" or "text": also the shape of the record that answers it
    custom_id: str | int | None = None
    id_field: str = "custom_id"  # the name it had: "custom_id" or "id"
    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    messages: tuple[dict[str, str], ...] | None = None  # content is a string
    model: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # SamplingParams values that were given explicitly
    template_options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of ChatTemplate.render


@dataclass(frozen=True)
class Prepared:
    """A request that can be served: its prompt as token ids, and all its sampling values."""

    request: RowRequest
    prompt_ids: np.ndarray  # int64
    sampling: SamplingParams


def parse_row(row: int, line: bytes, kind: str) -> RowRequest:
    """Parse one row of a "text" or "jsonl" input.

    Raises:
        RequestError: anything that cannot be served as it is written, named.
    """
    if len(line) > MAX_ROW_BYTES:
        raise RequestError("row_too_long", f"the row has more than {MAX_ROW_BYTES} bytes")
    if kind == "text":
        return RowRequest(row, "completions", "text", prompt=decode_line(line))
    values = parse_object(line)
    return _openai_row(row, values) if is_openai(values) else _simple_row(row, values)


def is_openai(values: dict[str, Any]) -> bool:
    """Tell an OpenAI batch line from an object with `prompt` or `messages`."""
    return any(name in values for name in ("body", "url", "method"))


def _openai_row(row: int, values: dict[str, Any]) -> RowRequest:
    for name in values:
        if name not in OPENAI_KEYS:
            raise RequestError("unknown_field", f"{name}: expected only {', '.join(OPENAI_KEYS)}", param=name)
    for name in OPENAI_KEYS:
        if values.get(name) is None:
            raise RequestError("missing_field", f"{name} is missing", param=name)
    custom_id = string("custom_id", values["custom_id"])
    if string("method", values["method"]) != "POST":
        raise RequestError("invalid_value", f"method={values['method']!r}: expected POST", param="method")
    url = string("url", values["url"])
    if url not in ENDPOINTS:
        raise RequestError("unsupported_url", f"url={url!r}: expected {' or '.join(ENDPOINTS)}", param="url")
    if not isinstance(values["body"], dict):
        raise wrong_type("body", values["body"], "an object")
    return _request(RowRequest(row, ENDPOINTS[url], "openai", custom_id), values["body"])


def _simple_row(row: int, values: dict[str, Any]) -> RowRequest:
    body = {name: value for name, value in values.items() if name not in ("custom_id", "id")}
    id_field = "custom_id" if values.get("custom_id") is not None else "id"
    custom_id = values.get(id_field)
    if custom_id is not None and type(custom_id) not in (str, int):
        raise wrong_type(id_field, custom_id, "a string or an integer")
    if "prompt" in body and "messages" in body:
        raise RequestError("invalid_value", "prompt and messages: expected one of them", param="messages")
    if "prompt" not in body and "messages" not in body:
        raise RequestError("missing_field", "prompt or messages is missing", param="prompt")
    endpoint = "chat" if "messages" in body else "completions"
    return _request(RowRequest(row, endpoint, "simple", custom_id, id_field), body)


def _request(head: RowRequest, body: dict[str, Any]) -> RowRequest:
    """Complete the request whose identity is known from its body."""
    source = "messages" if head.endpoint == "chat" else "prompt"
    if body.get(source) is None:
        raise RequestError("missing_field", f"{source} is missing", param=source)
    checks = SAMPLING_FIELDS[head.endpoint] | (TEMPLATE_FIELDS if head.endpoint == "chat" else {}) | {"model": string}
    given = {}
    for name, value in body.items():
        if name not in checks and name != source:
            refuse_field(head.endpoint, name, value, body)
        elif name != source and value is not None:
            given[name] = checks[name](name, value)
    model = given.pop("model", None)
    template_options = {name: given.pop(name) for name in TEMPLATE_FIELDS if name in given}
    common = {**vars(head), "model": model}
    if head.endpoint == "completions":
        return RowRequest(**{**common, **_prompt(body["prompt"]), "options": given})
    messages = _messages(body["messages"])
    return RowRequest(**{**common, "messages": messages, "options": _chat_options(given),
                         "template_options": _template_options(template_options, messages)})  # fmt: skip


def _prompt(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, list):
        raise wrong_type("prompt", value, "a string or an array of token ids")
    if any(isinstance(item, str | list) for item in value):
        raise RequestError("invalid_value", "prompt: found several, expected one prompt per row", param="prompt")
    if not value:
        raise RequestError("empty_prompt", "prompt: no token ids", param="prompt")
    return {"prompt_token_ids": token_ids("prompt", value)}


def _chat_options(given: dict[str, Any]) -> dict[str, Any]:
    """Translate chat's own names into those of SamplingParams."""
    options = {name: value for name, value in given.items() if name not in SAMPLING_FIELDS["chat"]
               or name not in ("logprobs", "top_logprobs", "max_completion_tokens")}  # fmt: skip
    if "max_completion_tokens" in given:
        options["max_tokens"] = given["max_completion_tokens"]
        if given.get("max_tokens", options["max_tokens"]) != options["max_tokens"]:
            raise RequestError("invalid_value", "max_completion_tokens and max_tokens differ", param="max_tokens")
    if given.get("logprobs"):
        options["logprobs"] = given.get("top_logprobs", 0)
    elif given.get("top_logprobs"):
        raise RequestError("invalid_value", "top_logprobs: expected logprobs to be true", param="top_logprobs")
    elif given.get("logprobs") is False:
        options["logprobs"] = None
    return options


def _template_options(given: dict[str, Any], messages: tuple[dict[str, str], ...]) -> dict[str, Any]:
    is_continued = given.get("continue_final_message", False)
    if is_continued and given.get("add_generation_prompt"):
        name = "continue_final_message"
        raise RequestError("invalid_value", f"{name} and add_generation_prompt: expected one of them", param=name)
    reserved = ("messages", "tools", "documents", "bos_token", "eos_token", *TEMPLATE_FIELDS)
    extra = given.get("chat_template_kwargs", {})
    for name in extra:
        if name in reserved or name.startswith("_"):
            where = f"chat_template_kwargs.{name}"
            raise RequestError("invalid_value", f"{where}: not for the template's caller to set", param=where)
    return {"add_generation_prompt": given.get("add_generation_prompt", not is_continued),
            "continue_final_message": is_continued, **extra}  # fmt: skip


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise wrong_type("messages", value, "an array of at least one message")
    return tuple(_message(f"messages[{i}]", message) for i, message in enumerate(value))


def _message(where: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise wrong_type(where, value, "an object")
    role = string(f"{where}.role", value.get("role"))
    if role not in ROLES:
        code = "not_implemented" if role in ("tool", "function") else "invalid_value"
        raise RequestError(code, f"{where}.role={role!r}: expected {', '.join(ROLES)}", param=f"{where}.role")
    message = {"role": role, "content": _content(f"{where}.content", value.get("content"))}
    for name, item in value.items():
        if name == "name" and item is not None:
            message["name"] = string(f"{where}.name", item)
        elif name not in ("role", "content", *LABELS) and item not in (None, []):
            raise RequestError("not_implemented", f"{where}.{name}: not implemented", param=f"{where}.{name}")
    return message


def _content(where: str, value: Any) -> str:
    """Text of a message; parts are joined by newlines, as vLLM does."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong_type(where, value, "a string or an array of text parts")
    return "\n".join(_part(f"{where}[{i}]", part) for i, part in enumerate(value))


def _part(where: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise wrong_type(where, value, "an object")
    kind = string(f"{where}.type", value.get("type"))
    if kind != "text":
        raise RequestError("not_implemented", f"{where}.type={kind!r}: expected text", param=f"{where}.type")
    for name in value:
        if name not in ("type", "text"):
            raise RequestError("unknown_field", f"{where}.{name}: unknown field", param=f"{where}.{name}")
    return string(f"{where}.text", value.get("text"))
