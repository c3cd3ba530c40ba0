"""Plots of a study: throughput and efficiency over ranks, and where the time goes. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from hpcinfer.recovery.durable import replace_bytes
from hpcinfer.scaling.fit import Fit
from hpcinfer.scaling.losses import SHARES
from hpcinfer.scaling.plan import STRONG
from hpcinfer.scaling.results import Result, Series, series_of

_COLORS = ("#1f5fa8", "#c8553d", "#3d8b5f", "#8a6bbe", "#b08a2e", "#4fa3b8")
_GREY = "#5b6770"
_MARKERS = ("o", "s", "^", "D", "v", "P")
_SHARE_COLORS = ("#1f5fa8", "#8fb4dc", "#c8553d", "#8a6bbe", "#e0a458", "#3d8b5f", "#b9bec4", "#6b7178")
_FURTHER = 4  # times the ranks that were measured: how far a fit is drawn


def draw(results: Sequence[Result], folder: Path, kind: str) -> list[Path]:
    """Draw scaling.KIND and losses.KIND; nothing where nothing was measured."""
    measured = [result for result in results if result.samples]
    scalings = list(dict.fromkeys(result.point.scaling for result in measured))
    if not measured:
        return []
    figure = Figure(figsize=(11, 0.8 + 4.2 * len(scalings)), layout="constrained")
    rows: Any = figure.subplots(len(scalings), 2, squeeze=False)
    for (left, right), scaling in zip(rows, scalings, strict=True):
        chosen = [each for each in series_of(measured) if each.scaling == scaling]
        _draw_rates(left, chosen)
        _draw_efficiency(right, chosen)
    _legend(figure, series_of(measured))
    bars = Figure(figsize=(11, 1.8 + 0.36 * (len(measured) + len(scalings))), layout="constrained")
    _draw_losses(bars.subplots(), measured)
    paths = [folder / f"scaling.{kind}", folder / f"losses.{kind}"]
    for path, each in zip(paths, (figure, bars), strict=True):
        drawn = io.BytesIO()
        each.savefig(drawn, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None)
        replace_bytes(path, drawn.getvalue())
    return paths


def _draw_rates(axis: Axes, chosen: Sequence[Series]) -> None:
    for index, series in enumerate(chosen):
        middles = np.array([result.rate for result in series.results])
        rates = [[sample.rate for sample in result.samples] for result in series.results]
        spread = np.array([middles - list(map(min, rates)), list(map(max, rates)) - middles])
        axis.errorbar(_places(chosen, index), middles, spread, color=_color(index), linestyle="none", capsize=3)
        _draw_markers(axis, chosen, index, middles)
        if series.fits:
            _draw_fit(axis, series, _color(index))
    points = sorted({(result.point.shape.ranks, result.ideal) for series in chosen for result in series.results
                     if result.ideal})  # fmt: skip
    axis.plot([ranks for ranks, _ in points], [ideal for _, ideal in points], color="black", linewidth=0.8, zorder=1)
    _finish(axis, chosen, "output tokens/s", most=_FURTHER if any(series.fits for series in chosen) else 1)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axis.yaxis.set_minor_locator(NullLocator())


def _draw_efficiency(axis: Axes, chosen: Sequence[Series]) -> None:
    for index, series in enumerate(chosen):
        values = np.array([100 * (result.efficiency or 0) for result in series.results])
        axis.plot(_places(chosen, index), values, color=_color(index), linewidth=1)
        _draw_markers(axis, chosen, index, values)
    axis.axhline(100, color="black", linewidth=0.8)
    _finish(axis, chosen, "efficiency, %", most=1)
    axis.set_ylim(0, None)


def _draw_markers(axis: Axes, chosen: Sequence[Series], index: int, values: np.ndarray) -> None:
    """Full markers where each thread has a core, hollow ones where they share cores."""
    crowded = np.array([result.is_crowded for result in chosen[index].results])
    places = _places(chosen, index)
    for mask, face in ((~crowded, _color(index)), (crowded, "white")):
        axis.plot(places[mask], values[mask], _marker(index), color=_color(index), markerfacecolor=face, zorder=4)


def _draw_fit(axis: Axes, series: Series, color: str) -> None:
    found: Fit = series.fits[-1]
    first, last = min(result.point.shape.ranks for result in series.results), found.largest
    for start, end, style in ((first, last, "-"), (last, _FURTHER * last, "--")):
        ranks = np.geomspace(start, end, 100)
        axis.plot(ranks, [found.at(n) for n in ranks], color=color, linewidth=1, linestyle=style)


def _finish(axis: Axes, chosen: Sequence[Series], label: str, *, most: int) -> None:
    results = sorted((each for series in chosen for each in series.results), key=lambda each: each.point.shape.ranks)
    first, largest = results[0].point, results[-1].point.shape.ranks
    ticks = {result.point.shape.ranks: f"{result.point.shape.ranks}\n({result.point.shape})" for result in results}
    ticks.update({largest * factor: str(largest * factor) for factor in (2, 4) if factor <= most})
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlim(first.shape.ranks / 1.25, largest * most * 1.25)
    axis.set_xlabel("ranks (nodes x ranks on each)")
    axis.set_ylabel(label)
    rows = f"{first.rows} rows" if first.scaling == STRONG else f"{first.rows / first.shape.ranks:g} rows for each rank"
    axis.set_title(f"{first.scaling} scaling, {rows}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, chosen: Sequence[Series]) -> None:
    """One for all panels: the meshes, then what lines and markers mean."""
    recipes = list(dict.fromkeys(series.recipe for series in chosen))
    entries = [Line2D([], [], color=_color(i), marker=_marker(i), linestyle="none", label=str(recipe))
               for i, recipe in enumerate(recipes)]  # fmt: skip
    if any(result.is_crowded for series in chosen for result in series.results):
        entries.append(Line2D([], [], color=_GREY, marker="o", markerfacecolor="white", linestyle="none",
                              label="hollow: ranks share cores"))  # fmt: skip
    laws = "/".join(dict.fromkeys(series.fits[-1].law for series in chosen if series.fits))
    if laws:
        entries.append(Line2D([], [], color=_GREY, linewidth=1, label=f"{laws} fit"))
        entries.append(Line2D([], [], color=_GREY, linewidth=1, linestyle="--", label=f"{laws} fit, extrapolated"))
    entries.append(Line2D([], [], color="black", linewidth=0.8, label="ideal of the cores at hand"))
    figure.legend(handles=entries, loc="outside lower center", ncols=min(len(entries), 5), frameon=False, fontsize=9)


def _draw_losses(axis: Axes, measured: Sequence[Result]) -> None:
    places, names, place = [], [], 0.0
    for number, result in enumerate(measured):
        if number and measured[number - 1].point.scaling != result.point.scaling:
            place += 0.6
        places.append(place)
        names.append(f"{result.point.scaling}, {result.point.recipe}, {result.point.shape}"
                     + ("*" if result.is_crowded else ""))  # fmt: skip
        place += 1
    left = np.zeros(len(measured))
    for share, color in zip(SHARES, _SHARE_COLORS, strict=True):
        widths = np.array([100 * (result.shares or {}).get(share, 0.0) for result in measured])
        axis.barh(places, widths, left=left, color=color, height=0.75, label=share)
        left += widths
    axis.set_yticks(places, names, fontsize=8)
    axis.set_ylim(places[-1] + 0.6, -0.6)
    axis.set_xlim(0, 100)
    starred = "; *: ranks share cores" if any(result.is_crowded for result in measured) else ""
    axis.set_xlabel(f"% of all rank-seconds, from the launcher's start to its end{starred}")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _places(chosen: Sequence[Series], index: int) -> np.ndarray:
    """Ranks, moved a little so that curves do not hide each other."""
    ranks = np.array([result.point.shape.ranks for result in chosen[index].results], dtype=float)
    return ranks * 2 ** (0.04 * (index - (len(chosen) - 1) / 2))


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]


def _marker(index: int) -> str:
    return _MARKERS[index % len(_MARKERS)]
