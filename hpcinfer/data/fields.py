"""The fields of a request: how each value is checked, and which fields we know but do not serve.

A field that asks for something is served or refused by name; it is never ignored.
"""

import math
from collections.abc import Callable
from typing import Any

from hpcinfer.data.strict_json import type_name
from hpcinfer.errors import RequestError

Check = Callable[[str, Any], Any]  # (name, JSON value) -> value as SamplingParams holds it


def number(name: str, value: Any) -> float:
    """Check a finite number."""
    if type(value) not in (int, float):
        raise wrong_type(name, value, "a number")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise RequestError("invalid_value", f"{name}: expected a finite number", param=name)
    return result


def integer(name: str, value: Any) -> int:
    """Check a 64-bit integer."""
    if type(value) is not int:
        raise wrong_type(name, value, "an integer")
    if not -(2**63) <= value < 2**63:
        raise RequestError("invalid_value", f"{name}: expected a 64-bit integer", param=name)
    return value


def boolean(name: str, value: Any) -> bool:
    """Check true or false."""
    if type(value) is not bool:
        raise wrong_type(name, value, "true or false")
    return value


def string(name: str, value: Any) -> str:
    """Check a string."""
    if not isinstance(value, str):
        raise wrong_type(name, value, "a string")
    return value


def mapping(name: str, value: Any) -> dict[str, Any]:
    """Check an object."""
    if not isinstance(value, dict):
        raise wrong_type(name, value, "an object")
    return value


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Check an array of token ids."""
    if not isinstance(value, list):
        raise wrong_type(name, value, "an array of token ids")
    ids = tuple(integer(f"{name}[{i}]", item) for i, item in enumerate(value))
    if any(item < 0 for item in ids):
        raise RequestError("invalid_value", f"{name}: expected token ids of at least 0", param=name)
    return ids


def stop_strings(name: str, value: Any) -> tuple[str, ...]:
    """Check a string or an array of strings, none empty."""
    values = value if isinstance(value, list) else [value]
    stops = tuple(string(name, item) for item in values)
    if "" in stops:
        raise RequestError("invalid_value", f"{name}: an empty string stops everything", param=name)
    return stops


def logit_bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """Check an object of token id to bias from -100 to 100; ascending ids."""
    biases = {}
    for key, bias in mapping(name, value).items():
        if not (key.isascii() and key.isdecimal() and str(int(key[:19])) == key):
            raise RequestError("invalid_value", f"{name}: key {key!r}, expected a token id", param=name)
        biases[int(key)] = number(f"{name}[{key}]", bias)
        if abs(biases[int(key)]) > 100:
            raise RequestError("invalid_value", f"{name}[{key}]={bias}: expected a number from -100 to 100", param=name)
    return tuple(sorted(biases.items()))


def wrong_type(name: str, value: Any, expected: str) -> RequestError:
    """Make the error for a value of the wrong JSON type."""
    return RequestError("invalid_type", f"{name}: found {type_name(value)}, expected {expected}", param=name)


_SAMPLING: dict[str, Check] = {
    "temperature": number, "top_p": number, "top_k": integer, "min_p": number,
    "repetition_penalty": number, "presence_penalty": number, "frequency_penalty": number, "logit_bias": logit_bias,
    "max_tokens": integer, "min_tokens": integer, "stop": stop_strings, "stop_token_ids": token_ids,
    "ignore_eos": boolean, "n": integer, "seed": integer,
}  # fmt: skip
SAMPLING_FIELDS: dict[str, dict[str, Check]] = {
    "completions": {**_SAMPLING, "logprobs": integer, "echo": boolean},
    "chat": {**_SAMPLING, "logprobs": boolean, "top_logprobs": integer, "max_completion_tokens": integer},
}
TEMPLATE_FIELDS: dict[str, Check] = {
    "add_generation_prompt": boolean, "continue_final_message": boolean, "chat_template_kwargs": mapping,
}  # fmt: skip

# Fields that change no answer: any value is accepted.
LABELS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})

# Fields that we do not serve, with the values (beside null) that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,), "stream_options": (), "store": (False,), "service_tier": ("auto", "default"),
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False),
    "functions": ([],), "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "audio": (), "prediction": (), "reasoning_effort": (), "verbosity": (),
    "web_search_options": (), "suffix": ("",), "include_reasoning": (True,),
    # extras of vLLM and others
    "use_beam_search": (False,), "length_penalty": (1, 1.0), "early_stopping": (False,), "typical_p": (1, 1.0),
    "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,), "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (), "prompt_logprobs": (), "allowed_token_ids": (), "bad_words": ([],),
    "logits_processors": ([],), "logit_processors": ([],), "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,), "priority": (0,), "documents": ([],), "chat_template": (),
    "mm_processor_kwargs": (), "structured_outputs": (), "guided_json": (), "guided_regex": (), "guided_choice": (),
    "guided_grammar": (), "guided_decoding_backend": (), "guided_whitespace_pattern": (), "lora_request": (),
    "prompt_embeds": (), "kv_transfer_params": (), "vllm_xargs": (), "request_id": (), "cache_salt": (),
}  # fmt: skip
_NEUTRAL_OF: dict[str, dict[str, tuple[Any, ...]]] = {
    "completions": {"add_special_tokens": (True,)},
    "chat": {"add_special_tokens": (False,), "echo": (False,)},
}


def refuse_field(endpoint: str, name: str, value: Any, body: dict[str, Any]) -> None:
    """Accept a field that we do not serve if its value asks for nothing.

    Raises:
        RequestError: not_implemented for a known field, unknown_field otherwise; both name it.
    """
    neutral = {**_NEUTRAL, **_NEUTRAL_OF[endpoint], "best_of": (body.get("n") or 1,)}.get(name)
    if name in LABELS:
        return
    if neutral is None:
        message = f"{name}: unknown field of a {endpoint} request (notes of your own go into metadata)"
        raise RequestError("unknown_field", message, param=name)
    if value is not None and not any(type(value) is type(one) and value == one for one in neutral):
        raise RequestError("not_implemented", f"{name}: not implemented{_hint(name)}", param=name)


def _hint(name: str) -> str:
    hints = {"prompt_logprobs": " (use echo with logprobs)", "suffix": " (nothing is inserted before a suffix)"}
    return hints.get(name, "")
