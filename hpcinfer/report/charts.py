"""Charts of the page: lines over time, stacked bars, what replicas did until when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hpcinfer.report.classes import CLASSES
from hpcinfer.report.svg import FAINT, GRID, INK, PALETTE, Canvas, shorten, text_width, tick_names, ticks

CLASS_COLOURS = dict(zip(CLASSES, ("#0072b2", "#d55e00", "#c9c9c9", "#009e73", "#e69f00"), strict=True))
FAULT = "#c00000"

_WIDTH, _HEIGHT = 860.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 70.0, 20.0, 34.0, 46.0
_NAMED_LINES = 8  # more are drawn alike, with their mean
_BAR, _GAP = 18.0, 6.0


class Line(NamedTuple):
    """One line of a chart, at equal steps of x."""

    name: str
    step: float
    values: Sequence[float]


class Bar(NamedTuple):
    """One bar, of parts beside each other."""

    name: str
    parts: Sequence[float]


class _Frame(NamedTuple):
    """Where a chart's area lies, and its scales."""

    canvas: Canvas
    x_stop: float
    y_stop: float

    def x(self, value: float) -> float:
        return _LEFT + value / self.x_stop * (self.canvas.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return self.canvas.height - _BOTTOM - value / self.y_stop * (self.canvas.height - _TOP - _BOTTOM)


def line_chart(title: str, lines: Sequence[Line], y_label: str, x_stop: float, marks: Sequence[float] = ()) -> str:
    """Draw lines over seconds.

    Args:
        title: says what is shown.
        lines: each from x = 0 on.
        y_label: what is counted, with its unit.
        x_stop: end of the time axis.
        marks: moments of faults.
    """
    canvas = Canvas(_WIDTH, _HEIGHT, title)
    top = max((max(line.values, default=0.0) for line in lines), default=0.0)
    y_ticks, x_ticks = ticks(top), ticks(x_stop, 10)
    frame = _Frame(canvas, max(x_stop, 1e-9), y_ticks[-1])
    _y_axis(frame, y_ticks, y_label)
    _x_axis(frame, [tick for tick in x_ticks if tick <= x_stop])
    for mark in marks:
        x = frame.x(min(max(mark, 0.0), x_stop))
        canvas.line(x, _TOP, x, canvas.height - _BOTTOM, FAULT, width=1.5, dashes="4 3")
    entries = _draw_lines(frame, lines)
    canvas.legend(_LEFT, 18, [*entries, *([("fault", FAULT)] if marks else [])])
    return canvas.render()


def _draw_lines(frame: _Frame, lines: Sequence[Line]) -> list[tuple[str, str]]:
    """Draw few lines in their own colours, many faintly with their mean; returns the legend."""
    if len(lines) <= _NAMED_LINES:
        for line, colour in zip(lines, PALETTE, strict=False):
            _draw(frame, line, colour, 1.6, 1.0)
        return [(line.name, colour) for line, colour in zip(lines, PALETTE, strict=False)]
    for line in lines:
        _draw(frame, line, PALETTE[5], 1.0, 0.35)
    mean = [sum(values) / len(lines) for values in zip(*(line.values for line in lines), strict=True)]
    _draw(frame, Line("mean", lines[0].step, mean), PALETTE[0], 2.0, 1.0)
    return [(f"{len(lines)} replicas", PALETTE[5]), ("their mean", PALETTE[0])]


def _draw(frame: _Frame, line: Line, colour: str, width: float, opacity: float) -> None:
    """Draw a value at the middle of its interval, so that a chart of few intervals is right, too."""
    points = [(frame.x(min((i + 0.5) * line.step, frame.x_stop)), frame.y(value))
              for i, value in enumerate(line.values)]  # fmt: skip
    if points:
        points = [(frame.x(0.0), points[0][1]), *points, (frame.x(frame.x_stop), points[-1][1])]
    frame.canvas.path(points, colour, width=width, opacity=opacity)


def _y_axis(frame: _Frame, values: list[float], label: str) -> None:
    for value, name in zip(values, tick_names(values), strict=True):
        frame.canvas.line(_LEFT, frame.y(value), frame.canvas.width - _RIGHT, frame.y(value), GRID)
        frame.canvas.text(_LEFT - 6, frame.y(value) + 4, name, anchor="end", colour=FAINT)
    middle = _TOP + (frame.canvas.height - _TOP - _BOTTOM) / 2
    frame.canvas.text(16, middle, label, anchor="middle", colour=FAINT, turned=True)


def _x_axis(frame: _Frame, values: list[float], label: str = "seconds from the start of the run") -> None:
    bottom = frame.canvas.height - _BOTTOM
    frame.canvas.line(_LEFT, bottom, frame.canvas.width - _RIGHT, bottom, FAINT)
    for value, name in zip(values, tick_names(values if len(values) > 1 else [0.0, 1.0]), strict=False):
        frame.canvas.line(frame.x(value), bottom, frame.x(value), bottom + 4, FAINT)
        frame.canvas.text(frame.x(value), bottom + 17, name, anchor="middle", colour=FAINT)
    frame.canvas.text(_LEFT + (frame.canvas.width - _LEFT - _RIGHT) / 2, bottom + 36, label, anchor="middle",
                      colour=FAINT)  # fmt: skip


def class_bars(bars: Sequence[Bar]) -> str:
    """Draw the seconds of ranks by class, a bar for each."""
    left = min(260.0, 14 + max(text_width(bar.name) for bar in bars))
    canvas = Canvas(_WIDTH, 40 + len(bars) * (_BAR + _GAP) + 46, "seconds of each rank by class")
    canvas.legend(left, 18, list(CLASS_COLOURS.items()))
    values = ticks(max(sum(bar.parts) for bar in bars), 10)
    scale = (_WIDTH - left - _RIGHT) / values[-1]
    bottom = canvas.height - 40
    for value, name in zip(values, tick_names(values), strict=True):
        canvas.line(left + value * scale, 30, left + value * scale, bottom, GRID)
        canvas.text(left + value * scale, bottom + 16, name, anchor="middle", colour=FAINT)
    for i, bar in enumerate(bars):
        x, y = left, 36 + i * (_BAR + _GAP)
        canvas.text(left - 8, y + 13, shorten(bar.name, left - 10), anchor="end")
        for name, part in zip(CLASSES, bar.parts, strict=True):
            canvas.rectangle(x, y, part * scale, _BAR, CLASS_COLOURS[name], tip=f"{bar.name}: {name} {part:.2f} s")
            x += part * scale
    canvas.text(left + (_WIDTH - left - _RIGHT) / 2, bottom + 34, "seconds", anchor="middle", colour=FAINT)
    return canvas.render()


class Span(NamedTuple):
    """How long a replica had work."""

    name: str
    busy_s: float
    words: str  # behind the bar


def tail_chart(spans: Sequence[Span], end_s: float) -> str:
    """Draw how long each replica had work; what is grey is idle."""
    behind = max(text_width(span.words) for span in spans) + 12
    left = min(160.0, 14 + max(text_width(span.name) for span in spans))
    canvas = Canvas(_WIDTH, 40 + len(spans) * (_BAR + _GAP) + 46, "how long each replica had work")
    canvas.legend(left, 18, [("work", PALETTE[0]), ("idle until the end", CLASS_COLOURS["waiting"])])
    width = _WIDTH - left - behind - _RIGHT
    values = [value for value in ticks(end_s, 8) if value <= end_s * 1.0001]
    bottom = canvas.height - 40
    for value, name in zip(values, tick_names(values if len(values) > 1 else [0.0, 1.0]), strict=False):
        canvas.line(left + value / end_s * width, 30, left + value / end_s * width, bottom, GRID)
        canvas.text(left + value / end_s * width, bottom + 16, name, anchor="middle", colour=FAINT)
    for i, span in enumerate(spans):
        y, busy = 36 + i * (_BAR + _GAP), min(span.busy_s, end_s) / end_s * width
        canvas.text(left - 8, y + 13, shorten(span.name, left - 10), anchor="end")
        canvas.rectangle(left, y, width, _BAR, CLASS_COLOURS["waiting"])
        canvas.rectangle(left, y, busy, _BAR, PALETTE[0], tip=f"{span.name}: work until {span.busy_s:.2f} s")
        canvas.text(left + width + 8, y + 13, span.words, colour=INK)
    canvas.text(left + width / 2, bottom + 34, "seconds from the start of the run", anchor="middle", colour=FAINT)
    return canvas.render()
