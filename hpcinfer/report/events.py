"""Faults and recoveries of a run, on one time axis: zero is where all ranks left the loading together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from hpcinfer.units import format_seconds


class Happening(NamedTuple):
    """One of them."""

    time_s: float  # from the start of the run on
    replica: int
    text: str
    seconds: float | None  # until the replica gave its next token; None if that is not known


def happenings(ranks: Sequence[dict[str, Any]]) -> list[Happening]:
    """Read them from the reports of the ranks: each once, though all survivors of a replica report it."""
    found: dict[tuple[int, str, str], Happening] = {}
    for each in sorted(_all(ranks), key=lambda each: (each[0].seconds is None, each[0].time_s)):
        found.setdefault((each[0].replica, *each[1]), each[0])
    return sorted(found.values())


def _all(ranks: Sequence[dict[str, Any]]) -> Iterator[tuple[Happening, tuple[str, str]]]:
    for rank in ranks:
        for recovery in rank.get("recoveries", ()):
            yield _read(recovery, rank.get("began", recovery["found_time"])), (recovery["cause"], recovery["mesh"])


def _read(recovery: dict[str, Any], began: float) -> Happening:
    found, first_token = recovery["found_time"], recovery.get("first_token_time")
    seconds = first_token - found if first_token is not None else None
    ranks = f"{recovery['members']} rank{'s' * (recovery['members'] > 1)}"
    text = f"{recovery['cause']}; {ranks} went on as {recovery['mesh']}"
    if seconds is not None:
        text += f", next token after {format_seconds(seconds)}"
    return Happening(found - began, recovery["replica"], text, seconds)
