"""The results of a study as a table for people, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from hpcinfer import __version__
from hpcinfer.scaling.losses import SHARES
from hpcinfer.scaling.plan import STRONG
from hpcinfer.scaling.results import Result, Series, same_bytes, series_of
from hpcinfer.scaling.study import Study

_HEAD = ("mesh", "nodes", "ranks", "cores", "rows", "runs", "tokens/s", "least-most", "ideal", "efficiency", "run s",
         "wall s")  # fmt: skip
_LEGEND = (
    "tokens/s: output tokens in the phase `run` from when all weights were there, median of the runs; ideal: rate",
    "per core of the point on fewest cores (of several the fastest), times the cores; rank-seconds: of all ranks,",
    "from the launcher's start to its end; slower: computing beyond what that point needs for as many tokens",
)
CSV_COLUMNS = (
    "scaling", "mesh", "dp", "pp", "tp", "nodes", "ranks_per_node", "ranks", "threads", "cores", "machines", "hosts",
    "rows", "runs", "output_tokens", "tokens_per_s", "tokens_per_s_least", "tokens_per_s_most", "ideal_tokens_per_s",
    "efficiency", "run_s", "wall_s", *(f"share_{name.replace(', ', '_').replace(' ', '_')}" for name in SHARES),
)  # fmt: skip


def table(study: Study, results: Sequence[Result]) -> list[str]:
    """Write everything that was found."""
    lines = [f"{study.model}, {study.input}; hpcinfer {__version__}"]
    if study.flags:
        lines.append(f"options: {' '.join(study.flags)}")
    lines += _LEGEND
    for scaling in dict.fromkeys(result.point.scaling for result in results):
        lines += ["", *_part([result for result in results if result.point.scaling == scaling], scaling)]
    return [*lines, *_bytes(results), *_failures(results)]


def write_csv(results: Sequence[Result]) -> str:
    """Write a line for each point that was measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows([_round(value) for value in _values(result)] for result in results if result.samples)
    return text.getvalue()


def _part(results: Sequence[Result], scaling: str) -> Iterator[str]:
    yield f"{scaling} scaling: {'the same rows everywhere' if scaling == STRONG else 'as many rows for each rank'}"
    measured = [result for result in results if result.samples]
    yield from _columns([_HEAD, *map(_rates, measured)])
    yield from _notes(results)
    yield from ("", "% of rank-seconds")
    yield from _columns([("mesh", "nodes", "ranks", *map(_short, SHARES)), *map(_losses, measured)])
    yield ""
    for series in series_of(results):
        yield from _fits(series)


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        yield "  ".join((cells[0].ljust(widths[0]), *aligned[1:])).rstrip()


def _place(result: Result) -> tuple[str, str, str]:
    shape = result.point.shape
    return str(result.point.recipe), str(shape.nodes), f"{shape.ranks}{'*' if result.is_crowded else ''}"


def _rates(result: Result) -> list[str]:
    rates = [sample.rate for sample in result.samples]
    return [
        *_place(result), str(result.used_cores) if result.cores else "?", str(result.point.rows),
        f"{len(rates)}/{result.num_runs}", f"{result.rate:.1f}", f"{min(rates):.1f}-{max(rates):.1f}",
        f"{result.ideal or 0:.1f}", f"{100 * (result.efficiency or 0):.0f} %", f"{result.middle('run_s'):.2f}",
        f"{result.middle('wall_s'):.2f}",
    ]  # fmt: skip


def _losses(result: Result) -> list[str]:
    return [*_place(result), *(f"{100 * (result.shares or {}).get(name, 0):.1f}" for name in SHARES)]


def _short(share: str) -> str:
    """The name of a share without its end."""
    return {"input and output": "I/O", "scheduling, other": "other", "pipeline bubbles": "bubbles",
            "slower computing": "slower"}.get(share, share)  # fmt: skip


def _notes(results: Sequence[Result]) -> Iterator[str]:
    measured = [result for result in results if result.samples]
    crowded = [result for result in measured if result.is_crowded]
    if crowded:
        least = min(crowded, key=lambda result: result.point.shape.ranks)
        yield (f"* more threads than cores, from {least.point.shape} on: the ideal is that of the cores at hand;"
               " computing lasts longer there because ranks take turns")  # fmt: skip
    if any(result.cores and result.cores.machines < result.point.shape.nodes for result in measured):
        yield "nodes are hosts of one machine, or stand for its ranks: their cores are counted once"
    if any(result.cores is None for result in measured):
        yield "? the cores of the ranks are not known: the ideal takes one for each thread"


def _fits(series: Series) -> Iterator[str]:
    name = f"{series.scaling}, {series.recipe}"
    if not series.fits:
        yield f"{name}: no fit, 1 number of ranks is too few (Amdahl takes 2, USL 3)"
    for found in series.fits:
        yield f"{name}: {found}" + ("; of this machine, whose cores ranks share" if series.fits_crowded else "")
    if len(series.fits) == 1:
        yield f"{name}: no USL, it takes 3 numbers of ranks"


def _bytes(results: Sequence[Result]) -> Iterator[str]:
    yield ""
    for rows, digests in same_bytes(results).items():
        is_same = len(digests) == 1
        words = f"the same bytes in all runs, digest {min(digests)[:16]}" if is_same else "THE OUTPUTS DIFFER"
        yield f"outputs of {rows} rows: {words}"


def _failures(results: Sequence[Result]) -> Iterator[str]:
    for failure in dict.fromkeys(failure for result in results for failure in result.failures):
        yield f"failed: {failure.name}: {failure.reason}"
        yield from (f"    {line}" for line in failure.last_lines)


def _values(result: Result) -> list[object]:
    point, shares, mesh = result.point, result.shares or {}, result.point.recipe.mesh(result.point.shape)
    rates, cores = [sample.rate for sample in result.samples], result.cores
    return [
        point.scaling, str(point.recipe), mesh.dp, mesh.pp, mesh.tp, point.shape.nodes, point.shape.ranks_per_node,
        point.shape.ranks, cores.threads if cores else "", cores.num_cores if cores else "",
        cores.machines if cores else "", result.middle("hosts"), point.rows, len(rates),
        result.middle("output_tokens"), result.rate, min(rates), max(rates), result.ideal, result.efficiency,
        result.middle("run_s"), result.middle("wall_s"), *(shares.get(name, 0.0) for name in SHARES),
    ]  # fmt: skip


def _round(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value
