"""Draw results of throughput.py as bars: each engine as a fraction of the roofline; needs matplotlib.

    python benchmarks/roofline_plot.py M1.json M2.json --output roofline.svg
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

_OWN, _PEER = "#1f5fa8", "#b0b7c0"


def main() -> None:
    """Draw one panel for each result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="what throughput.py --json wrote")
    parser.add_argument("--output", type=Path, required=True, help="a .svg, .png or .pdf file")
    args = parser.parse_args()
    results = [json.loads(path.read_text()) for path in args.results]
    height = 0.8 + 0.32 * max(len(result["contenders"]) for result in results)
    figure, axes = plt.subplots(1, len(results), figsize=(7.5 * len(results), height), squeeze=False)
    for axis, result in zip(axes[0], results, strict=True):
        draw(axis, result)
    figure.tight_layout()
    figure.savefig(args.output, dpi=150)


def draw(axis: Any, result: dict[str, Any]) -> None:
    """Draw one result, the best engine of each precision on top."""
    items = sorted(result["contenders"], key=lambda item: (item["precision"], -item["roofline"]), reverse=True)
    fractions = [100 * item["roofline"] for item in items]
    colors = [_OWN if item["engine"].startswith("hpcinfer") else _PEER for item in items]
    bars = axis.barh([f"{item['engine']}, {item['precision']}" for item in items], fractions, color=colors)
    rates = [f"{item['output_tokens_per_s']:,.0f} tokens/s" for item in items]
    axis.bar_label(bars, rates, padding=3, fontsize=8)
    axis.set_xlim(0, max(115, 1.3 * max(fractions)))
    axis.axvline(100, color="black", linewidth=0.8)
    axis.set_xlabel("% of the roofline")
    axis.set_title(f"{result['model']}, {result['workload']}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
