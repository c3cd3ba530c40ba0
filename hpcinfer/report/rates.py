"""Output tokens per second of a run, without the time in which it only loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def loaded_s(ranks: Sequence[dict[str, Any]]) -> float:
    """Seconds from the start of the run until the last rank had its last layer; 0 if that was before."""
    ends = [load["began"] + load["last_layer_s"] - rank["began"] for rank in ranks
            if (load := rank["loading"]).get("began") and load.get("last_layer_s")]  # fmt: skip
    return max([0.0, *ends])


def serving_s(run: dict[str, Any]) -> float:
    """Seconds that the run took once it was loaded; all of it where it was over by then."""
    run_s: float = run["seconds"]["run"]
    left_s: float = run_s - run["loaded_s"]
    return left_s if left_s > 0 else run_s
