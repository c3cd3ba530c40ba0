"""What collectives.py has found, as tables and as a picture.

    python benchmarks/collectives_report.py collectives.json --plot collectives.svg
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

Result = dict[str, Any]


class Row(NamedTuple):
    """One size in one scene: seconds, medians over the rounds."""

    num_bytes: int
    default: float  # Open MPI's choice
    best: float  # of its algorithms, and its choice
    best_name: str
    mpich: float | None
    auto: float
    choice: str
    form: float  # the fastest form
    form_name: str
    to_default: float  # how many times faster auto is: medians of each round's ratio
    to_best: float
    behind: float  # how far auto is behind the fastest form, as a fraction
    noise: float  # how far it is behind its own form when that is forced


def rows(scene: Result) -> Iterator[Row]:
    """Put the starts of a scene together, size by size."""
    starts = scene["starts"]
    for index, item in enumerate(starts[""]["rows"]):
        seconds = item["seconds"]
        forms = {name: median(values) for name, values in seconds.items() if name not in ("mpi", "auto")}
        form = min(forms, key=lambda name: forms[name])
        ratios = {"its choice": ratio(seconds["mpi"], seconds["auto"])}
        mpi = {"its choice": median(seconds["mpi"])}
        for name, start in starts.items():
            if name.startswith("Open MPI"):
                other = start["rows"][index]["seconds"]
                short = name.removeprefix("Open MPI, ")
                mpi[short], ratios[short] = median(other["mpi"]), ratio(other["mpi"], other["auto"])
        best = min(ratios, key=lambda name: ratios[name])
        mpich = median(starts["MPICH"]["rows"][index]["seconds"]["mpi"]) if "MPICH" in starts else None
        behind, noise = (ratio(seconds["auto"], seconds[name]) - 1 for name in (form, item["choice"]))
        yield Row(item["num_bytes"], mpi["its choice"], mpi[best], best, mpich, median(seconds["auto"]),
                  item["choice"], forms[form], form, ratios["its choice"], ratios[best], behind, noise)  # fmt: skip


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times faster: the median of each round's ratio."""
    return median(a / b for a, b in zip(slow, fast, strict=True))


def machine_line(result: Result) -> str:
    """Where it was measured."""
    machine, scenes = result["machine"], result["scenes"]
    library = scenes[0]["starts"][""]["library"] if scenes else ""
    loads = ", ".join(f"{scene['load']:.1f}" for scene in scenes)
    return (f"{machine['processor']}, {machine['cores']} cores for all hosts together; {library}; "
            f"{result['rounds']} rounds of loops of {result['seconds']:g} s in all; load {loads}")  # fmt: skip


def markdown(scene: Result) -> list[str]:
    """A table: microseconds, ratios, choices."""
    lines = ["", f"### {scene['scene']['name']}", "",
             "| size | Open MPI | its best algorithm | MPICH | hpcinfer | form | to Open MPI | to its best |"
             " fastest form | behind it | behind itself |", "|" + "---|" * 11]  # fmt: skip
    for row in rows(scene):
        mpich = "" if row.mpich is None else f"{row.mpich * 1e6:,.0f}"
        lines.append(
            f"| {size_name(row.num_bytes)} | {row.default * 1e6:,.0f} | {row.best * 1e6:,.0f} ({row.best_name})"
            f" | {mpich} | {row.auto * 1e6:,.0f} | {row.choice} | {row.to_default:.2f} × | {row.to_best:.2f} ×"
            f" | {row.form_name} {row.form * 1e6:,.0f} | {100 * row.behind:+.0f} % | {100 * row.noise:+.0f} % |"
        )
    return lines


def size_name(num_bytes: int) -> str:
    """Kilobytes or megabytes."""
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KiB"


def plot(result: Result, path: Path) -> None:
    """Draw a panel for each scene: microseconds by size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scenes = result["scenes"]
    figure, axes = plt.subplots(1, len(scenes), figsize=(4.6 * len(scenes), 4.2), squeeze=False)
    for axis, scene in zip(axes[0], scenes, strict=True):
        draw(axis, scene)
    axes[0][0].set_ylabel("microseconds for an all-reduce")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def draw(axis: Any, scene: Result) -> None:
    """Draw one scene."""
    found = list(rows(scene))
    sizes = [row.num_bytes / 1024 for row in found]
    axis.plot(sizes, [row.default * 1e6 for row in found], color="#8a9099", marker="o", ms=3, label="Open MPI")
    if any(name.startswith("Open MPI") for name in scene["starts"]):
        axis.plot(sizes, [row.best * 1e6 for row in found], color="#8a9099", ls="--", label="its best algorithm")
    if found and found[0].mpich is not None:
        axis.plot(sizes, [(row.mpich or 0) * 1e6 for row in found], color="#c98a2b", ls=":", label="MPICH")
    axis.plot(sizes, [row.auto * 1e6 for row in found], color="#1f5fa8", marker="o", ms=3, lw=2, label="hpcinfer")
    axis.set(xscale="log", yscale="log", xlabel="KiB", title=scene["scene"]["name"])
    axis.title.set_fontsize(10)
    axis.grid(visible=True, which="major", color="#e4e6e9", lw=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)


def main() -> None:
    """Print the tables of a result, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="what collectives.py --json wrote")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a .svg or .png file")
    arguments = parser.parse_args()
    result = json.loads(arguments.result.read_text())
    print("\n".join([machine_line(result), *(line for scene in result["scenes"] for line in markdown(scene))]))
    if arguments.plot:
        plot(result, arguments.plot)


if __name__ == "__main__":
    main()
