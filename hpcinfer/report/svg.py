"""Small drawings as SVG text: shapes, text, an axis with round numbers. Widths of text are estimates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

FONT_SIZE = 12.0
_CHARACTER = 0.56  # width of one, in font sizes
INK, FAINT, GRID = "#222222", "#666666", "#e3e3e3"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#5f5f5f")  # Okabe and Ito's


class Canvas:
    """Shapes, one over the other."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height = width, height
        self._parts = [f"<title>{escape(title)}</title>"]

    def rectangle(self, x: float, y: float, width: float, height: float, fill: str, *, tip: str = "",
                  stroke: str = "none") -> None:
        """Draw a filled rectangle; `tip` is shown where the pointer rests."""
        text = f"<title>{escape(tip)}</title>" if tip else ""
        self._parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}"'
                           f' fill="{fill}" stroke="{stroke}">{text}</rect>')  # fmt: skip

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str, *, width: float = 1.0,
             dashes: str = "") -> None:
        """Draw a straight line."""
        pattern = f' stroke-dasharray="{dashes}"' if dashes else ""
        self._parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"'
                           f' stroke-width="{width}"{pattern}/>')  # fmt: skip

    def path(self, points: list[tuple[float, float]], colour: str, *, width: float = 1.6, opacity: float = 1.0) -> None:
        """Draw a line through points."""
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(f'<polyline points="{text}" fill="none" stroke="{colour}" stroke-width="{width}"'
                           f' stroke-opacity="{opacity}" stroke-linejoin="round"/>')  # fmt: skip

    def text(self, x: float, y: float, words: str, *, anchor: str = "start", colour: str = INK,
             size: float = FONT_SIZE, turned: bool = False) -> None:
        """Write words; `anchor` is start, middle or end."""
        turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
        self._parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"'
                           f' font-size="{size}"{turn}>{escape(words)}</text>')  # fmt: skip

    def legend(self, x: float, y: float, entries: list[tuple[str, str]]) -> None:
        """Draw coloured squares with names in a row."""
        for name, colour in entries:
            self.rectangle(x, y - 9, 10, 10, colour)
            self.text(x + 14, y, name)
            x += 14 + text_width(name) + 18

    def render(self) -> str:
        """The drawing as an element of a page."""
        size = f'viewBox="0 0 {self.width:.0f} {self.height:.0f}" width="{self.width:.0f}" height="{self.height:.0f}"'
        return (f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"'
                f' font-family="Helvetica, Arial, sans-serif">{"".join(self._parts)}</svg>')  # fmt: skip


def text_width(words: str, size: float = FONT_SIZE) -> float:
    """Estimate the width of words."""
    return len(words) * size * _CHARACTER


def shorten(words: str, width: float, size: float = FONT_SIZE) -> str:
    """Cut words that would be wider."""
    most = max(1, int(width / (size * _CHARACTER)))
    return words if len(words) <= most else words[: most - 1] + "…"


def ticks(stop: float, most: int = 6) -> list[float]:
    """Round numbers from 0 to `stop` or a little more, at most so many and one."""
    if stop <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(stop / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if stop / (power * factor) <= most)
    count = math.ceil(stop / step - 1e-9)
    return [i * step for i in range(count + 1)]


def tick_names(values: list[float]) -> Iterator[str]:
    """Name numbers with as many digits as they differ by, thousands as k, M or G."""
    top, step = max(values), values[1] - values[0]
    factor, unit = next((pair for pair in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if top >= 10 * pair[0]), (1.0, ""))
    digits = max(0, -math.floor(math.log10(step / factor) + 1e-9))
    for value in values:
        yield f"{value / factor:.{digits}f}{unit if value else ''}"
