"""An examination as text: a line per finding, or JSON; and the last words of a process."""

import json
import socket

from hpcinfer.comm.launcher import read_launch
from hpcinfer.comm.library import describe_library
from hpcinfer.diagnosis.examination import Examination
from hpcinfer.diagnosis.finding import ERROR, WARNING, Finding, host_ranges, render

START = "starting MPI"  # the step in which libraries end a process that they do not like


def report(examination: Examination, who: str, seconds: float, *, is_json: bool) -> str:
    """Write all findings and how many are bad.

    Args:
        examination: what was found.
        who: ranks that it is about.
        seconds: that it took.
        is_json: one object instead of lines.
    """
    findings, hosts = examination.findings, examination.hosts
    errors, warnings = num_of(ERROR, findings), num_of(WARNING, findings)
    if is_json:
        counts = {"of": who, "errors": errors, "warnings": warnings, "seconds": round(seconds, 3)}
        return json.dumps({**counts, "hosts": hosts, "findings": [finding._asdict() for finding in findings]}, indent=2)
    counted = f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    lines = [render(finding, hosts) for finding in findings]
    return "\n".join([*lines, f"{who} on {host_ranges(hosts.values())}, {seconds:.1f} s: {counted}"])


def num_of(level: str, findings: list[Finding]) -> int:
    """Count findings of a level."""
    return sum(finding.level == level for finding in findings)


def last_words(step: str, limit_s: float, *, has_ended: bool, is_json: bool) -> str:
    """What is said for a process that waits too long in a step, or has ended in it; nothing where others tell."""
    if has_ended and step != START:
        return ""
    launch, check, hint = read_launch(), "time", "does another rank hang, or a file system? --time-limit S waits longer"
    if step == START:
        check, step = "MPI", f"{step}, {describe_library(is_started=False).name} under {launch.launcher or 'nothing'}"
        hint = "do they belong together, and do ranks reach each other? OMPI_MCA_btl_tcp_if_include, UCX_NET_DEVICES"
        hint += " or FI_PROVIDER choose a network, srun --mpi a PMI"
    end = "ended" if has_ended else f"still waits after {limit_s:.0f} s"
    found = f"rank {launch.rank}/{launch.size} on {socket.gethostname()} {end}: {step}"
    finding = Finding(ERROR, check, found, hint)
    return (json.dumps({"findings": [finding._asdict()]}) if is_json else render(finding, {})) + "\n"
