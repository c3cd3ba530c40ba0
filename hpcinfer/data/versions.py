"""Versions of what makes prompts and records: another one may write other bytes for the same row."""

import sys
from importlib.metadata import version


def profile() -> dict[str, str]:
    """Name the interpreter and the libraries that fix the bytes of prompts and records."""
    python = ".".join(map(str, sys.version_info[:2]))
    return {"python": python, "tokenizers": version("tokenizers"), "jinja2": version("jinja2")}
