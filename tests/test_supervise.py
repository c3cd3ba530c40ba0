"""`hpcinfer supervise`: what its steps are told, and the plan that it makes."""

import argparse
import socket
import sys
import time
from typing import Any

import pytest

from hpcinfer import supervise
from hpcinfer.cli import given_options, read_options
from hpcinfer.config import JobMeshOptions, JobOptions, SuperviseOptions
from hpcinfer.errors import ConfigError, MeshError
from hpcinfer.supervision.launchers import Command
from hpcinfer.supervision.nodes import Node
from hpcinfer.supervision.plan import make_plan


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    supervise.add_arguments(parser)
    return parser.parse_args(["--model", "m", "--input", "i", "--output", "o", *flags])


class Recorder:
    """A launcher that runs something else and keeps what it was given."""

    name = "recorder"

    def command(self, step: str, placement: Any, program: list[str]) -> Command:
        self.program = program
        return Command([sys.executable, "-c", ""], {})


def flags_of_step(*flags: str, opens_retry: bool = False) -> list[str]:
    """Flags of a step of a job with these flags."""
    args, recorder = parse(*flags), Recorder()
    steps = supervise._Steps(recorder, {config: given_options(args, config) for config in supervise._PASSED_ON})
    step = steps.start("s", (), opens_retry)
    while step.poll() is None:
        time.sleep(0.01)
    assert recorder.program[:3] == [sys.executable, "-m", "hpcinfer.run"]
    return recorder.program[3:]


def plan(*flags: str, **environment: str) -> Any:
    args = parse("--launcher", "mpiexec", *flags)
    settings = {"PATH": "", "HPCINFER_MPIRUN": "/bin/true", **environment}
    own, mesh, job = (read_options(args, config) for config in (SuperviseOptions, JobMeshOptions, JobOptions))
    return make_plan(own, mesh, job, settings)


def test_steps_get_the_options_of_the_job():
    flags = flags_of_step("-tp", "2", "-dp", "3", "--temperature", "0", "--stop=-x", "--no-prefix-reuse", "--seed", "9")
    assert {"--model=m", "--input=i", "--output=o", "--tensor-parallel-size=2", "--temperature=0", "--stop=-x",
            "--no-prefix-reuse", "--seed=9"} <= set(flags)  # fmt: skip


def test_each_step_is_one_replica():
    assert "--data-parallel-size=1" in flags_of_step("-dp", "3")
    assert "--data-parallel-size=1" in flags_of_step()


def test_what_concerns_the_whole_job_is_not_for_the_steps():
    flags = flags_of_step("--requeue", "--fail-on-error", "--retry-errors", "--restarts", "3", "--backoff", "2")
    assert not {"--requeue", "--fail-on-error", "--retry-errors", "--restarts=3", "--backoff=2"} & set(flags)
    assert "--retry-errors" in flags_of_step("--retry-errors", opens_retry=True)


def test_time_limit_counts_from_the_start_of_the_supervisor(monkeypatch):
    assert not [flag for flag in flags_of_step() if flag.startswith("--time-limit")]
    monkeypatch.setattr(supervise, "_START", time.monotonic() - 100.0)
    (flag,) = [flag for flag in flags_of_step("--time-limit", "1:00:00") if flag.startswith("--time-limit")]
    assert 3480 <= int(flag.partition("=")[2]) <= 3500
    (flag,) = [flag for flag in flags_of_step("--time-limit", "50") if flag.startswith("--time-limit")]
    assert flag == "--time-limit=1"


def test_one_machine_has_room_for_what_is_asked():
    found = plan("-tp", "2", "-pp", "3", "-dp", "4", "--spare-ranks", "1")
    assert found.nodes == [Node(socket.gethostname(), 28)]
    assert (found.rules.num_replicas, found.rules.ranks, found.allocation) == (4, 7, None)
    assert plan().rules.num_replicas == 1


def test_nodes_say_how_many_replicas_there_are():
    found = plan("--nodes", "a:4,b:4,c:2", "-tp", "2")
    assert found.rules.num_replicas == 5
    assert plan("--nodes", "a,b", "--ranks-per-node", "3", "-tp", "2").rules.num_replicas == 3
    assert plan("--nodes", "a:4,b:4", "-tp", "2", "-dp", "1").rules.num_replicas == 1


@pytest.mark.parametrize("flags", [
    ("--nodes", "a:4", "-tp", "5"), ("--nodes", "a:4", "-tp", "2", "-dp", "3"), ("-tp", "0"), ("-dp", "0"),
    ("--spare-ranks", "-1"),
])
def test_mesh_without_room_is_refused(flags):
    with pytest.raises(MeshError):
        plan(*flags)


@pytest.mark.parametrize("flags", [
    ("--restarts", "-1"), ("--backoff", "-0.5"), ("--backoff", "nan"), ("--grace", "inf"), ("--ranks-per-node", "0"),
])
def test_numbers_out_of_range_are_refused(flags):
    with pytest.raises(ConfigError, match=flags[0]):
        plan(*flags)
