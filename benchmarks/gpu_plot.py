"""Draw what benchmarks/gpu.py measured: decoding and prefill as fractions of the rooflines; needs matplotlib.

    python benchmarks/gpu_plot.py gpu.json --output gpu.svg
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from gpu_results import DECODE_FRACTION, PREFILL_FRACTION, decode_fraction, peaks, prefill_fraction, rows_of, way

Lines = dict[str, list[tuple[float, float]]]


def main() -> None:
    """Draw a result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="what gpu.py --json wrote")
    parser.add_argument("--output", type=Path, required=True, help="a .svg, .png or .pdf file")
    args = parser.parse_args()
    draw(json.loads(args.result.read_text()), args.output)


def draw(result: dict[str, Any], output: Path) -> None:
    """Draw decoding over batches and prefill over lengths, a line for each precision and way."""
    best = peaks(result["parts"])
    decode: Lines = defaultdict(list)
    prefill: Lines = defaultdict(list)
    for row in rows_of(result["parts"], "decode"):
        if (fraction := decode_fraction(row, best)) is not None:
            decode[_about(row)].append((row["batch"], 100 * fraction))
    for row in rows_of(result["parts"], "prefill"):
        if (fraction := prefill_fraction(row, best)) is not None:
            prefill[_about(row)].append((row["length"], 100 * fraction))
    figure, axes = plt.subplots(1, 2, figsize=(13, 5))
    _panel(axes[0], decode, DECODE_FRACTION, "sequences decoding", "% of the memory's rate")
    _panel(axes[1], prefill, PREFILL_FRACTION, "tokens of a prompt", "% of the library's products")
    figure.suptitle(result["machine"]["device"])
    figure.tight_layout()
    figure.savefig(output, dpi=150)


def _panel(axis: Any, lines: Lines, target: float, x_label: str, y_label: str) -> None:
    for name, points in lines.items():
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axis.axhline(100 * target, color="black", linewidth=0.8, linestyle="--")
    axis.set_xscale("log", base=2)
    ticks = sorted({x for points in lines.values() for x, _ in points})
    axis.set_xticks(ticks, [f"{x:,}" for x in ticks], fontsize=8)
    axis.set_ylim(0, 105)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.spines[["top", "right"]].set_visible(False)
    if lines:
        axis.legend(fontsize=7)


def _about(row: dict[str, Any]) -> str:
    return f"{row['shape']}, {row['precision']}{way(row)}{'' if row['graphs'] else ', no graphs'}"


if __name__ == "__main__":
    main()
