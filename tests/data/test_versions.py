"""The libraries that fix the bytes of prompts and records are named."""

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest
import tokenizers

from hpcinfer.data.versions import find_libraries, profile


def test_profile_names_interpreter_and_libraries() -> None:
    values = profile()
    assert values["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert (values["tokenizers"], values["jinja2"]) == (tokenizers.__version__, jinja2.__version__)
    assert json.loads(json.dumps(values)) == values


def refuse_to_search(name: str) -> Any:
    raise AssertionError(f"{name} is searched for")


def test_libraries_that_another_rank_has_found_are_not_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, told = profile(), find_libraries()
    monkeypatch.setattr(importlib.metadata, "distribution", refuse_to_search)
    assert profile(told) == expected
    with pytest.raises(AssertionError, match="is searched for"):
        profile()


def test_what_another_rank_has_and_this_one_has_not_does_not_count(tmp_path: Path) -> None:
    search_path, found = json.loads(find_libraries())
    elsewhere = tmp_path / "tokenizers-9.9.9.dist-info"
    elsewhere.mkdir()
    told = json.dumps([search_path, {**found, "tokenizers": ["9.9.9", str(elsewhere)]}]).encode()
    assert profile(told)["tokenizers"] == "9.9.9"  # both ranks see that folder
    shutil.rmtree(elsewhere)
    assert profile(told)["tokenizers"] == tokenizers.__version__
    other_path = json.dumps([["elsewhere"], {"tokenizers": ["9.9.9", str(tmp_path)]}]).encode()
    assert profile(other_path)["tokenizers"] == tokenizers.__version__
