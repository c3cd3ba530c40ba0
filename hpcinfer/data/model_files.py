"""The JSON files of a model that describe its tokenizer and its defaults."""

import json
from collections.abc import Mapping
from typing import Any

from hpcinfer.errors import ModelError


def read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Parse one of a model's files; empty if it is not there.

    Raises:
        ModelError: no JSON object.
    """
    try:
        values = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ModelError(f"{name}: {error}", expected="a JSON object") from None
    if not isinstance(values, dict):
        raise ModelError(f"{name} is no JSON object", expected="a JSON object")
    return values
