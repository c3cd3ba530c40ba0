"""The libraries that fix the bytes of prompts and records are named."""

import json
import sys

import jinja2
import tokenizers

from hpcinfer.data.versions import profile


def test_profile_names_interpreter_and_libraries() -> None:
    values = profile()
    assert values["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert (values["tokenizers"], values["jinja2"]) == (tokenizers.__version__, jinja2.__version__)
    assert json.loads(json.dumps(values)) == values
