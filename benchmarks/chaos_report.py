"""What the rounds of the chaos benchmark come to: for JSON, and as a page."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from chaos_kinds import KINDS

_PHASES = {  # of a recovery inside a job, after kills: silence takes as long to notice as the options say
    "detect_s": "noticed by the survivors",
    "agree_s": "agreed, mesh and communicators rebuilt",
    "refill_s": "weights refilled",
    "first_token_s": "prefilled, first token of any sequence",
    "fault_to_token_s": "**fault to first new token**",
    "fault_to_90_percent_s": "fault to 90 % of the rate before",
    "others_before_s": "longest step of other replicas, as long a time before",
    "others_meanwhile_s": "longest step of other replicas meanwhile",
}
_COUNTS = ("rows_lost", "rows_twice", "rows_again", "rows_overlapping", "rows_damaged")


class Spread(NamedTuple):
    """Percentiles of some times."""

    measured: int
    p50: float
    p95: float
    max: float

    def __str__(self) -> str:
        return f"{self.p50:.3f} / {self.p95:.3f} / {self.max:.3f}"


def spread(values: Sequence[float | None]) -> Spread | None:
    """Percentiles of those that are there; None if none is."""
    times = [value for value in values if value is not None]
    return Spread(len(times), *np.percentile(times, [50, 95, 100]).tolist()) if times else None


def summary(rounds: Sequence[dict[str, Any]], skipped: dict[str, str]) -> dict[str, Any]:
    """Add up rounds."""
    names = list(dict.fromkeys(played["kind"] for played in rounds))
    kinds = {name: _summary_of([played for played in rounds if played["kind"] == name]) for name in names}
    killed = [played for played in rounds if not KINDS[played["kind"]].may_overlap]
    recoveries = [recovery for played in killed for recovery in played["recoveries"]]
    phases = {phase: spread([recovery[phase] for recovery in recoveries]) for phase in _PHASES}
    return {
        "machine": _machine(),
        "all": _summary_of(rounds),
        "kinds": kinds,
        "phases": {name: times._asdict() for name, times in phases.items() if times},
        "skipped": skipped,
        "wrong": [{**played, "growth": []} for played in rounds if not played["is_right"]],
        "is_right": all(played["is_right"] for played in rounds),
    }


def _summary_of(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tokens = spread([recovery["fault_to_token_s"] for played in rounds for recovery in played["recoveries"]])
    durable = spread([seconds for played in rounds for seconds in played["next_row_s"]])
    return {
        "rounds": len(rounds),
        "faults": sum(len(played["faults"]) for played in rounds),
        "recoveries": sum(len(played["recoveries"]) for played in rounds),
        "went_on": sum(bool(played["faults"]) and len(played["starts"]) == 1 for played in rounds),
        "starts": sum(len(played["starts"]) for played in rounds),
        "is_equal": sum(played["is_equal"] for played in rounds),
        **{name: sum(played[name] for played in rounds) for name in _COUNTS},
        "fault_to_token_s": tokens._asdict() if tokens else None,
        "fault_to_row_s": durable._asdict() if durable else None,
    }


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": models[0] if models else platform.machine(), "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(), "load": os.getloadavg()[0]}  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """Write the page."""
    machine = result["machine"]
    head = f"{machine['cores']} cores of {machine['cpu']}, Python {machine['python']}, load {machine['load']:.1f}"
    lines = [head, "", *_kinds_table(result), "", *_phases_table(result)]
    lines += [f"Left out: {name}: {reason}." for name, reason in result["skipped"].items()]
    for played in result["wrong"]:
        counts = ", ".join(f"{name} {played[name]}" for name in _COUNTS)
        lines += ["", f"WRONG: --kinds {played['kind']} --seed {played['seed']}: equal {played['is_equal']}, {counts}"]
        lines += [f"  {problem}" for problem in played["problems"]]
    return "\n".join(lines) + "\n"


def _kinds_table(result: dict[str, Any]) -> list[str]:
    names = ["kind", "rounds", "faults", "without a restart", "starts", "SHA-256 equal", "rows lost", "rows twice",
             "rows again", "overlaps", "s to first token", "s to next durable row"]  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name, kind in [*result["kinds"].items(), ("**all**", result["all"])]:
        counts = [kind[key] for key in ("rounds", "faults", "went_on", "starts", "is_equal", *_COUNTS[:-1])]
        times = [_times(kind["fault_to_token_s"]), _times(kind["fault_to_row_s"])]
        lines.append(f"| {' | '.join(map(str, [name, *counts, *times]))} |")
    return lines


def _phases_table(result: dict[str, Any]) -> list[str]:
    if not result["phases"]:
        return []
    lines = ["| recovery inside a job after a kill | measured | p50 / p95 / max, s |", "|---|---|---|"]
    for name, times in result["phases"].items():
        lines.append(f"| {_PHASES[name]} | {times['measured']} | {_times(times)} |")
    return [*lines, ""]


def _times(times: dict[str, float] | None) -> str:
    return str(Spread(**times)) if times else ""  # type: ignore[arg-type]
