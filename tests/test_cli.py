import argparse
import dataclasses
from dataclasses import dataclass

import pytest

from hpcinfer.__main__ import main
from hpcinfer.cli import add_options, given_options, read_options
from hpcinfer.comm import launcher
from hpcinfer.config import EngineOptions, JobMeshOptions, JobOptions, ModelOptions, SamplingParams, option

GROUPS = [ModelOptions, JobMeshOptions, EngineOptions, JobOptions, SamplingParams]


@dataclass(frozen=True)
class Sample:
    """One option of each kind."""

    path: str = option("", "where", metavar="FILE")
    count: int = option(3, "how many, 50% of them")
    ratio: float | None = option(None, "how much")
    is_on: bool = option(False, "whether")
    checks: bool = option(True, "trust everything")
    kind: str = option("a", "which", choices=("a", "b"))
    size_name: str = option("small", "how large", "-s")
    words: tuple[str, ...] = option((), "several")
    ids: tuple[int, ...] = option((), "several numbers", metavar="ID", parse=int)
    hidden: int = 5  # not an option


def parser_of(config, **how):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_options(parser, config, title="sample", **how)
    return parser


def read(*argv, config=Sample):
    return read_options(parser_of(config).parse_args(argv), config)


def usage_error(capsys, *argv, config=Sample):
    with pytest.raises(SystemExit) as caught:
        parser_of(config).parse_args(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("config", [Sample, *GROUPS])
def test_without_flags_everything_is_as_declared(config):
    assert read(config=config) == config() and hash(read(config=config)) == hash(config())


def test_flags_are_the_fields():
    argv = ["--path", "x", "--count", "7", "--ratio", "0.5", "--is-on", "--no-checks", "--kind", "b", "-s", "large"]
    assert read(*argv) == Sample("x", 7, 0.5, True, False, "b", "large")


def test_repeated_flags_make_a_tuple():
    assert read("--words", "a", "--words", "b", "--ids", "4", "--ids", "5") == Sample(words=("a", "b"), ids=(4, 5))
    assert read("--words", "a").words == ("a",) and read().words == ()  # the default is not the one before


def test_only_declared_options_are_flags():
    flags = {flag for action in parser_of(Sample)._actions for flag in action.option_strings}
    assert flags == {
        "-h", "--help", "--path", "--count", "--ratio", "--is-on", "--no-checks", "--kind", "--size-name", "-s",
        "--words", "--ids",
    }  # fmt: skip


@pytest.mark.parametrize("config", GROUPS)
def test_every_option_has_help_and_a_flag(config):
    text, fields = parser_of(config).format_help(), [f for f in dataclasses.fields(config) if "help" in f.metadata]
    for field in fields:
        prefix = "--no-" if field.default is True else "--"
        assert prefix + field.name.replace("_", "-") in text and field.metadata["help"]


def test_help_says_defaults_and_percents():
    text = " ".join(parser_of(Sample).format_help().split())
    assert "how many, 50% of them (default: 3)" in text and "{a,b}" in text
    assert "(default: None)" not in text and "(default: ())" not in text and "(default: False)" not in text


@pytest.mark.parametrize(("argv", "words"), [
    (["--unknown", "1"], "--unknown"), (["--count", "many"], "--count: invalid int value: 'many'"),
    (["--ratio", "x"], "--ratio"), (["--kind", "c"], "--kind"), (["--path"], "--path: expected one argument"),
    (["--is-on=1"], "--is-on"), (["--checks"], "--checks"), (["--coun", "1"], "--coun"),
    (["--hidden", "1"], "--hidden"), (["--ids", "x"], "--ids: 'x'"),
])  # fmt: skip
def test_wrong_flags_are_refused_by_name(capsys, argv, words):
    assert words in usage_error(capsys, *argv)


def test_values_that_need_parsing_are_refused_with_what_is_wrong(capsys):
    assert "--seed: '1e99'" in usage_error(capsys, "--seed", "1e99", config=JobOptions)
    assert "expected a 64-bit integer" in usage_error(capsys, "--seed", str(2**63), config=JobOptions)
    assert "--logit-bias: 'five'" in usage_error(capsys, "--logit-bias", "five", config=SamplingParams)
    assert "--logit-bias: '5'" in usage_error(capsys, "--logit-bias", "5", config=SamplingParams)


@pytest.mark.parametrize(("text", "seconds"), [
    ("0", 0), ("5400", 5400), ("90:00", 5400), ("1:30:00", 5400), ("1:30", 90), ("1-06:00:00", 108000),
    ("100:00:00", 360000),
])  # fmt: skip
def test_times_are_seconds_or_what_slurm_shows(text, seconds):
    assert read("--time-limit", text, config=JobOptions).time_limit == seconds


@pytest.mark.parametrize("text", ["", "-5", "1.5", "1-06", "1-06:00", "1:2:3:4", "1:", ":30", "1h", "1e3", "٣"])
def test_times_that_may_mean_something_else_are_refused(capsys, text):
    assert "expected seconds, or a time as 1:30:00" in usage_error(capsys, f"--time-limit={text}", config=JobOptions)


def test_given_options_are_only_what_the_user_said():
    parser = parser_of(SamplingParams, given_only=True)
    assert given_options(parser.parse_args([]), SamplingParams) == {}
    args = parser.parse_args(["--temperature", "1", "--stop", "a", "--stop", "b", "--logit-bias", "5=-1.5", "--echo"])
    assert given_options(args, SamplingParams) == {
        "temperature": 1.0, "stop": ("a", "b"), "logit_bias": ((5, -1.5),), "echo": True,
    }  # fmt: skip


def test_negative_numbers_are_values():
    args = parser_of(SamplingParams, given_only=True).parse_args(["--top-k", "-1"])
    assert given_options(args, SamplingParams) == {"top_k": -1}
    assert read("--seed", "-5", config=JobOptions).seed == -5
    assert read("-tp", "4", "-pp", "2", config=JobMeshOptions) == JobMeshOptions(4, 2, None)


@pytest.mark.parametrize("argv", [["run", "--nope", "1"], ["run", "--max-num-seq", "1"], ["nothing"], []])
def test_wrong_usage_of_a_command_ends_with_two(capsys, monkeypatch, argv):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert "error: " in said.err and " ".join(argv[1:2]) in said.err and not said.out


def test_other_ranks_end_alike_and_say_nothing(capsys, monkeypatch):
    monkeypatch.setattr(launcher.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as caught:
        main(["run", "--nope"])
    assert caught.value.code == 2 and capsys.readouterr() == ("", "")
