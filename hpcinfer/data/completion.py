"""One row's answer as one line of the output: the same shape as its input, and the same bytes in every run."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from hpcinfer.data.detokenizer import TextStream, decode
from hpcinfer.data.request import Prepared, RowRequest, is_openai
from hpcinfer.data.strict_json import parse_object
from hpcinfer.data.tokenizer import Tokenizer
from hpcinfer.errors import RequestError

LOWEST_LOGPROB = -9999.0  # what stands for minus infinity, as in OpenAI's format
_CUSTOM_ID = re.compile(rb'"custom_id"\s*:\s*("(?:[^"\\]|\\.)*")')
_OPENAI_KEY = re.compile(rb'"(?:body|url|method)"\s*:')


class TokenLogprob(NamedTuple):
    """Log-probability of a token that was sampled or stands in the prompt."""

    token_id: int
    logprob: float | None  # None: the first token of a prompt
    top: tuple[tuple[int, float], ...] = ()  # (token id, log-probability) of the most likely tokens, best first


@dataclass(frozen=True)
class Choice:
    """One finished completion of a prompt."""

    index: int
    token_ids: tuple[int, ...]  # output tokens, the one that ended it included
    text: str  # of the output alone
    finish_reason: str  # "stop" or "length"
    logprobs: tuple[TokenLogprob, ...] | None = None  # one per output token
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None  # one per prompt token, with echo


def completion_record(prepared: Prepared, choices: tuple[Choice, ...], model_name: str, tokenizer: Tokenizer) -> bytes:
    """Write the line that answers a row, without its newline."""
    request = prepared.request
    bodies = [_choice_body(prepared, choice, tokenizer) for choice in choices]
    num_output = sum(len(choice.token_ids) for choice in choices)
    usage = {"prompt_tokens": len(prepared.prompt_ids), "completion_tokens": num_output}
    if request.shape == "openai":
        return _line(_openai_record(request, bodies, usage, model_name))
    if len(bodies) > 1:
        return _line({**_simple_head(request), "choices": bodies, **usage})
    body = {name: value for name, value in bodies[0].items() if name != "index"}
    return _line({**_simple_head(request), **body, **usage})


def error_record(row: int, line: bytes, error: RequestError, kind: str = "jsonl") -> bytes:
    """Write the line that says why a row was not served; its shape and id are what can be read of the row."""
    request = _recover(row, line) if kind == "jsonl" else RowRequest(row, "completions", "text")
    body = {"code": error.code, "message": error.found, "param": error.param or None}
    if request.shape != "openai":
        return _line({**_simple_head(request), "error": body})
    return _line({"id": _batch_id(row), "custom_id": request.custom_id, "response": None, "error": body})


def _openai_record(
    request: RowRequest, bodies: list[dict[str, Any]], usage: dict[str, int], model: str
) -> dict[str, Any]:
    is_chat = request.endpoint == "chat"
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{request.row:09d}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": 0,  # a time would differ from run to run
        "model": model,
        "choices": bodies,
        "usage": {**usage, "total_tokens": sum(usage.values())},
    }
    response = {"status_code": 200, "request_id": f"req-{request.row:09d}", "body": body}
    return {"id": _batch_id(request.row), "custom_id": request.custom_id, "response": response, "error": None}


def _batch_id(row: int) -> str:
    return f"batch_req-{row:09d}"


def _simple_head(request: RowRequest) -> dict[str, Any]:
    identity = {} if request.custom_id is None else {request.id_field: request.custom_id}
    return {"row": request.row, **identity}


def _choice_body(prepared: Prepared, choice: Choice, tokenizer: Tokenizer) -> dict[str, Any]:
    request = prepared.request
    body: dict[str, Any] = {"index": choice.index}
    is_silent = prepared.sampling.logprobs is None
    if request.endpoint == "chat":
        body["message"] = {"role": "assistant", "content": choice.text}
        logprobs = None if is_silent else _chat_logprobs(choice.logprobs or (), tokenizer)
    else:
        echoed = _echoed(prepared, tokenizer)
        body["text"] = echoed + choice.text
        logprobs = None if is_silent else _text_logprobs(prepared, choice, len(echoed), tokenizer)
    if request.shape == "openai" or logprobs is not None:
        body["logprobs"] = logprobs
    body["finish_reason"] = choice.finish_reason
    return body


def _echoed(prepared: Prepared, tokenizer: Tokenizer) -> str:
    if not prepared.sampling.echo:
        return ""
    prompt = prepared.request.prompt
    return decode(tokenizer, prepared.prompt_ids.tolist()) if prompt is None else prompt


def _text_logprobs(prepared: Prepared, choice: Choice, num_echoed: int, tokenizer: Tokenizer) -> dict[str, list[Any]]:
    """OpenAI's completions format: parallel lists; offsets count characters of the choice's text."""
    prompt_ids = prepared.prompt_ids.tolist()
    prompt_logprobs = choice.prompt_logprobs or ()
    entries = [*prompt_logprobs, *(choice.logprobs or ())]
    in_prompt = _offsets(TextStream(tokenizer), prompt_ids[: len(prompt_logprobs)])
    in_output = _offsets(TextStream(tokenizer, prompt_ids=prompt_ids), choice.token_ids)
    return {
        "tokens": [tokenizer.token_text(entry.token_id) for entry in entries],
        "token_logprobs": [_rounded(entry.logprob) for entry in entries],
        "top_logprobs": [_top_by_text(entry, tokenizer) for entry in entries],
        "text_offset": [min(offset, num_echoed) for offset in in_prompt]
        + [num_echoed + min(offset, len(choice.text)) for offset in in_output],
    }


def _offsets(stream: TextStream, token_ids: list[int] | tuple[int, ...]) -> list[int]:
    for token_id in token_ids:
        stream.append(token_id)
    return stream.offsets()


def _top_by_text(entry: TokenLogprob, tokenizer: Tokenizer) -> dict[str, float | None] | None:
    """Most likely tokens by their text, and the token itself; of two with the same text the likelier one counts."""
    if entry.logprob is None:
        return None
    top: dict[str, float | None] = {}
    for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
        top.setdefault(tokenizer.token_text(token_id), _rounded(logprob))
    return top


def _chat_logprobs(entries: tuple[TokenLogprob, ...], tokenizer: Tokenizer) -> dict[str, Any]:
    """OpenAI's chat format: one object per token."""
    content = [
        {**_chat_token(entry.token_id, entry.logprob, tokenizer),
         "top_logprobs": [_chat_token(token_id, logprob, tokenizer) for token_id, logprob in entry.top]}
        for entry in entries
    ]  # fmt: skip
    return {"content": content, "refusal": None}


def _chat_token(token_id: int, logprob: float | None, tokenizer: Tokenizer) -> dict[str, Any]:
    text = tokenizer.token_text(token_id)
    content = tokenizer.token_bytes(token_id) or text.encode()
    return {"token": text, "logprob": _rounded(logprob), "bytes": list(content)}


def _rounded(logprob: float | None) -> float | None:
    if logprob is None:
        return None
    return round(float(logprob), 6) + 0.0 if math.isfinite(logprob) else LOWEST_LOGPROB  # + 0.0: never -0.0


def _recover(row: int, line: bytes) -> RowRequest:
    """Find the shape and the id of a line that may be broken."""
    try:
        values = parse_object(line)
    except RequestError:
        return _recover_from_bytes(row, line)
    id_field = "custom_id" if values.get("custom_id") is not None or is_openai(values) else "id"
    custom_id = values.get(id_field)
    shape = "openai" if is_openai(values) else "simple"
    return RowRequest(row, "completions", shape, custom_id if type(custom_id) in (str, int) else None, id_field)


def _recover_from_bytes(row: int, line: bytes) -> RowRequest:
    custom_id, found = None, _CUSTOM_ID.search(line)
    try:
        custom_id = json.loads(found[1].decode()) if found else None
        json.dumps(custom_id, ensure_ascii=False).encode()
    except ValueError:
        custom_id = None
    return RowRequest(row, "completions", "openai" if _OPENAI_KEY.search(line) else "simple", custom_id)


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
