"""Tokens per second of a run, without the time in which it loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


def loaded_s(ranks: Sequence[dict[str, Any]]) -> float:
    """Seconds from the start of the run until the last rank had its last layer; 0 if that was before."""
    ends = [load["began"] + load["last_layer_s"] - rank["began"] for rank in ranks
            if (load := rank["loading"]).get("began") and load.get("last_layer_s")]  # fmt: skip
    return max([0.0, *ends])


class Rates(NamedTuple):
    """Tokens per second once all weights were there."""

    output: float
    total: float  # of prompts, too


def rates_of(run: dict[str, Any], ranks: Sequence[dict[str, Any]]) -> Rates:
    """Tokens per second once all weights were there, without those that came before; of all where it was over by then.

    Args:
        run: seconds by phase, seconds until it was loaded.
        ranks: reports of the ranks that live; leaders have timelines.
    """
    run_s, loaded = run["seconds"]["run"], run.get("loaded_s") or 0.0
    if not 0.0 <= loaded < run_s:
        loaded = 0.0
    output = sum(rank["tokens"]["output"] * _share_after(rank, "tokens", loaded) for rank in ranks)
    prompt = sum(rank["tokens"]["prompt"] * _share_after(rank, "batch_tokens", loaded) for rank in ranks)
    seconds = run_s - loaded
    return Rates(output / seconds, (output + prompt) / seconds) if seconds else Rates(0.0, 0.0)


def _share_after(rank: dict[str, Any], column: str, seconds: float) -> float:
    """Share of a column of the timeline that came later than so many seconds after the start; all if there is none."""
    if not (line := rank.get("timeline")):
        return 1.0
    values, place = line[column], max(0.0, (rank["began"] + seconds - line["start_time"]) / line["interval_s"])
    whole, first = sum(values), int(place)
    if not whole or first >= len(values):
        return 0.0 if whole else 1.0
    before = sum(values[:first]) + (place - first) * values[first]
    return float(1.0 - before / whole)
