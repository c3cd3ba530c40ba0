"""Options as flags again: what `hpcinfer run` reads from them is what `hpcinfer supervise` was given."""

import argparse
import dataclasses

import pytest

from hpcinfer import run, supervise
from hpcinfer.cli import add_options, given_options, read_options
from hpcinfer.config import EngineOptions, JobMeshOptions, JobOptions, ModelOptions, SamplingParams
from hpcinfer.supervision.flags import to_flags

PASSED_ON = [ModelOptions, JobOptions, JobMeshOptions, EngineOptions, SamplingParams]


def flags_of(command) -> set[str]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    command.add_arguments(parser)
    return {flag for action in parser._actions for flag in action.option_strings}


def parser_of(config, *, given_only=False):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_options(parser, config, title="x", given_only=given_only)
    return parser


def other_value(field):
    """A value that is not the default."""
    if field.metadata["choices"]:
        return next(choice for choice in field.metadata["choices"] if choice != field.default)
    if field.name == "logit_bias":
        return ((42, -1.5), (7, 1e-07))
    if field.name == "stop_token_ids":
        return (3, 4)
    if isinstance(field.default, bool):
        return not field.default
    kind = str(field.type)
    if "tuple" in kind:
        return ("-x", "a b\n", "=")
    return 7 if "int" in kind else 90.0 if field.metadata["parse"] else 0.1 if "float" in kind else "--a b"


def test_supervise_takes_all_flags_of_run():
    assert flags_of(run) <= flags_of(supervise)


@pytest.mark.parametrize("config", PASSED_ON)
def test_defaults_need_no_flags(config):
    assert to_flags(dataclasses.asdict(config()), config) == []


@pytest.mark.parametrize("config", PASSED_ON)
def test_every_option_comes_back(config):
    fields = [field for field in dataclasses.fields(config) if "help" in field.metadata]
    values = {field.name: other_value(field) for field in fields}
    parser = parser_of(config)
    assert read_options(parser.parse_args(to_flags(values, config)), config) == config(**values)


def test_options_that_were_not_given_stay_so():
    parser = parser_of(SamplingParams, given_only=True)
    for given in ({}, {"temperature": 0.25, "stop": ("x",)}, {"temperature": SamplingParams().temperature}):
        flags = to_flags(given, SamplingParams, given_only=True)  # what is given beats generation_config.json
        assert given_options(parser.parse_args(flags), SamplingParams) == given
