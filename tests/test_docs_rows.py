"""docs/rows.md says what is true: its rows are accepted, its fields and error codes are those of the source."""

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from sources import CHECKOUT

from hpcinfer.config import SamplingParams
from hpcinfer.data import fields
from hpcinfer.data.request import parse_row
from hpcinfer.data.sampling_defaults import resolve_defaults, sampling_for
from hpcinfer.errors import RequestError

TEXT = (CHECKOUT / "docs/rows.md").read_text()
SOURCE = "".join(path.read_text() for path in sorted((CHECKOUT / "hpcinfer").rglob("*.py")))
HEADS: dict[str, dict[str, Any]] = {
    "completions": {"prompt": "a"},
    "chat": {"messages": [{"role": "user", "content": "a"}]},
}


def section(title: str) -> str:
    """The text under a heading of level two."""
    return re.split(r"^## ", TEXT.split(f"\n## {title}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


def table(title: str) -> list[list[str]]:
    """The cells of the table of a section, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def code_in(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def json_values(text: str) -> Iterator[Any]:
    """JSON values that follow each other."""
    while text := text.strip():
        value, end = json.JSONDecoder().raw_decode(text)
        yield value
        text = text[end:]


def blocks(kind: str) -> list[Any]:
    """All values of the JSON blocks of a kind: " input" or "" (records)."""
    texts = re.findall(rf"^```json{kind}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    return [value for text in texts for value in json_values(text)]


def field_values() -> list[tuple[str, str]]:
    """(field, JSON value that asks for nothing) of the table of fields that are not served."""
    return [(name, value) for values, names in table("Fields that are not served")
            for value in code_in(values) for name in code_in(names) if name not in ("n", "best_of")]  # fmt: skip


def test_example_rows_are_accepted() -> None:
    rows = blocks(" input")
    assert {"prompt", "messages", "body"} <= {name for row in rows for name in row}
    for row in rows:
        request = parse_row(0, json.dumps(row).encode(), "jsonl")
        sampling_for(request, resolve_defaults({}, {}))


def test_example_errors_are_made_by_their_rows() -> None:
    messages = [record["error"]["message"] for record in blocks("") if record.get("error")]
    rows = [{"prompt": "Return the", "temprature": 0.5},
            {"custom_id": "a-3", "method": "POST", "url": "/v1/embeddings", "body": {}}]  # fmt: skip
    for row, message in zip(rows, messages, strict=True):
        with pytest.raises(RequestError) as caught:
            parse_row(0, json.dumps(row).encode(), "jsonl")
        assert caught.value.found == message


def test_error_codes_are_those_of_the_source() -> None:
    codes = [code for row in table("Error records") for code in code_in(row[0])]
    raised = set(re.findall(r'RequestError\(\s*"(\w+)"', SOURCE))
    assert len(codes) == len(set(codes))
    assert raised <= set(codes), "codes that docs/rows.md does not name"
    assert not [code for code in codes if f'"{code}"' not in SOURCE]


def test_fields_are_those_of_the_source() -> None:
    named = {name for row in table("Fields") for name in code_in(row[0])}
    served = {name for checks in fields.SAMPLING_FIELDS.values() for name in checks}
    assert {field.name for field in dataclasses.fields(SamplingParams)} <= named
    assert named == served | set(fields.TEMPLATE_FIELDS) | fields.LABELS | {"model"}


def test_defaults_are_those_of_the_source() -> None:
    written = {code_in(row[0])[0]: row[3] for row in table("Fields")}
    words = {None: ("none", "the job's"), (): ("none",), False: ("false",)}
    for field in dataclasses.fields(SamplingParams):
        value = field.default
        expected = words[value] if isinstance(value, bool | tuple | None) else (str(value),)
        assert written[field.name] in expected, field.name


@pytest.mark.parametrize("endpoint", HEADS)
def test_fields_that_ask_for_nothing_are_accepted(endpoint: str) -> None:
    for name, value in field_values():
        parse_row(0, json.dumps({**HEADS[endpoint], name: json.loads(value)}).encode(), "jsonl")
        parse_row(0, json.dumps({**HEADS[endpoint], name: None}).encode(), "jsonl")
        with pytest.raises(RequestError) as caught:
            parse_row(0, json.dumps({**HEADS[endpoint], name: {"other": 1}}).encode(), "jsonl")
        assert caught.value.code == "not_implemented"


def test_fields_that_are_not_served_are_those_of_the_source() -> None:
    written: dict[str, list[Any]] = {}
    for name, value in field_values():
        written.setdefault(name, []).append(json.loads(value))
    for name, values in fields._NEUTRAL.items():
        accepted = [value for value in values if type(value) is not float] or [None]
        assert written.pop(name) == accepted, name
    assert not written
