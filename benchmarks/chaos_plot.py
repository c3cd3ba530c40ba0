"""Draw rounds of the chaos benchmark: output tokens/s over time with the faults marked; needs matplotlib.

    python benchmarks/chaos_plot.py chaos/rounds.jsonl --output docs/chaos.svg

Tokens count when their rows are durable: a rate is the mean since rows became durable before.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

_STEP_S = 0.05
_TOGETHER_S = 0.4  # rows that become durable so soon behind others count with them
_BEFORE_S, _AFTER_S = 3.0, 8.0
_BLUE, _RED = "#1f5fa8", "#c8553d"
_COLORS = (_BLUE, _RED, "#3d8b5f", "#8a6bbe", "#b08a2e", "#5b6770")


def main() -> None:
    """Draw the beginning of the rounds, and what follows a fault on average."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", type=Path, help="what chaos.py wrote")
    add = parser.add_argument
    add("--kinds", default="rank,ranks,plain-rank,launcher", help="of the lower panel (default: %(default)s)")
    add("--seconds", type=float, default=90, help="of the upper panel (default: %(default)s)")
    add("--output", type=Path, required=True, help="a .svg, .png or .pdf file")
    args = parser.parse_args()
    rounds = [json.loads(line) for line in args.rounds.read_text().splitlines()]
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(9, 6))
    draw_beginning(upper, rounds, args.seconds)
    draw_around_faults(lower, rounds, args.kinds.split(","))
    figure.tight_layout()
    figure.savefig(args.output, dpi=150)


def draw_beginning(axis: Any, rounds: list[dict[str, Any]], seconds: float) -> None:
    """Draw the first seconds, round after round."""
    begin = rounds[0]["begin"]
    times = np.arange(0, seconds, _STEP_S)
    rates = np.sum([rates_at(played, begin + times) for played in rounds], axis=0)
    axis.fill_between(times, rates, color=_BLUE, alpha=0.4, step="post")
    for played in rounds:
        for fault in played["faults"]:
            when = fault["time"] - begin
            if 0 <= when < seconds:
                axis.axvline(when, color=_RED, linewidth=0.8)
                where = axis.get_xaxis_transform()  # in seconds, and in heights of the panel
                axis.text(when, 1.01, played["kind"], transform=where, rotation=60, fontsize=7)
    axis.set_xlim(0, seconds)
    axis.set_xlabel("s")
    axis.set_ylabel("output tokens/s")
    axis.spines[["top", "right"]].set_visible(False)


def draw_around_faults(axis: Any, rounds: list[dict[str, Any]], kinds: list[str]) -> None:
    """Draw the mean rate before and behind the first fault of a round, for each kind."""
    times = np.arange(-_BEFORE_S, _AFTER_S, _STEP_S)
    for kind, color in zip(kinds, _COLORS, strict=False):
        mine = [played for played in rounds if played["kind"] == kind and played["faults"]]
        if mine:
            rates = np.mean([rates_at(played, played["faults"][0]["time"] + times) for played in mine], axis=0)
            axis.plot(times, rates, color=color, label=f"{kind} ({len(mine)} rounds)")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel("s since the first fault of a round")
    axis.set_ylabel("output tokens/s, mean")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


def rates_at(played: dict[str, Any], times: np.ndarray) -> np.ndarray:
    """Rates of a round at some times; 0 outside of it."""
    edges: list[float] = [played["begin"]]
    tokens: list[int] = []
    for when, count in played["growth"]:
        if tokens and when - edges[-1] < _TOGETHER_S:
            edges[-1], tokens[-1] = when, tokens[-1] + count
        else:
            edges.append(when)
            tokens.append(count)
    rates = np.array([0.0, *(np.array(tokens) / np.diff(edges)), 0.0])
    return rates[np.searchsorted(edges, times)]


if __name__ == "__main__":
    main()
