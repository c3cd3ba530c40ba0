"""The mesh of a run, drawn: a box per replica, a row per stage, a cell per rank in the colour of its node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from hpcinfer.report.svg import FAINT, PALETTE, Canvas, shorten, text_width

MOST_RANKS = 512  # drawn; of more the first
_CELL, _HEIGHT, _PAD, _SPACE = 46.0, 24.0, 8.0, 16.0
_WIDTH = 860.0


class Seat(NamedTuple):
    """A rank in the mesh."""

    rank: int
    host: str
    replica: int | None  # None on spare ranks
    pp_rank: int
    tp_rank: int


def seats_of(placement: Sequence[dict[str, Any]]) -> list[Seat]:
    """Read them from a report's placement: where each rank began."""
    return [Seat(each["rank"], each["host"], each["dp"], each["pp"] or 0, each["tp"] or 0) for each in placement]


def draw_mesh(seats: Sequence[Seat]) -> str:
    """Draw the mesh."""
    seats = seats[:MOST_RANKS]
    hosts = {host: PALETTE[i % len(PALETTE)] for i, host in enumerate(dict.fromkeys(seat.host for seat in seats))}
    boxes: dict[int | None, list[Seat]] = {}
    for seat in seats:
        boxes.setdefault(seat.replica, []).append(seat)
    order = sorted(boxes, key=lambda replica: (replica is None, replica or 0))
    places, height = _arrange([_size(boxes[replica], is_spare=replica is None) for replica in order])
    legend = _legend_rows(list(hosts))
    canvas = Canvas(_WIDTH, height + 22.0 * len(legend) + 8, "ranks in their replicas, coloured by node")
    for row, names in enumerate(legend):
        canvas.legend(2, 16 + 22.0 * row, [(shorten(name, 300), hosts[name]) for name in names])
    for replica, (x, y) in zip(order, places, strict=True):
        _box(canvas, boxes[replica], replica, (x, y + 22.0 * len(legend) + 4), hosts)
    return canvas.render()


def _size(seats: Sequence[Seat], *, is_spare: bool) -> tuple[float, float]:
    columns = len(seats) if is_spare else 1 + max(seat.tp_rank for seat in seats)
    rows = 1 if is_spare else 1 + max(seat.pp_rank for seat in seats)
    return max(columns * _CELL + 2 * _PAD, 92.0), rows * _HEIGHT + 2 * _PAD + 18


def _arrange(sizes: Sequence[tuple[float, float]]) -> tuple[list[tuple[float, float]], float]:
    """Put boxes side by side, line by line; returns their places and the height of all."""
    places, x, y, line = [], 0.0, 0.0, 0.0
    for width, height in sizes:
        if x and x + width > _WIDTH:
            x, y, line = 0.0, y + line + _SPACE, 0.0
        places.append((x, y))
        x, line = x + width + _SPACE, max(line, height)
    return places, y + line


def _legend_rows(hosts: Sequence[str]) -> list[list[str]]:
    rows, x = [list[str]()], 0.0
    for host in hosts:
        width = 32 + text_width(shorten(host, 300))
        if rows[-1] and x + width > _WIDTH:
            rows, x = [*rows, []], 0.0
        rows[-1].append(host)
        x += width
    return rows


def _box(
    canvas: Canvas, seats: Sequence[Seat], replica: int | None, at: tuple[float, float], hosts: dict[str, str]
) -> None:
    x, y = at
    width, height = _size(seats, is_spare=replica is None)
    canvas.rectangle(x + 1, y, width - 2, height, "none", stroke=FAINT)
    canvas.text(x + _PAD, y + 15, "spare ranks" if replica is None else f"replica {replica}", colour=FAINT)
    for i, seat in enumerate(seats):
        column, row = (i, 0) if replica is None else (seat.tp_rank, seat.pp_rank)
        left, top = x + _PAD + column * _CELL, y + 18 + _PAD + row * _HEIGHT
        tip = f"rank {seat.rank} on {seat.host}, stage {seat.pp_rank}, tp rank {seat.tp_rank}"
        canvas.rectangle(left, top, _CELL - 3, _HEIGHT - 3, hosts[seat.host], tip=tip)
        canvas.text(left + (_CELL - 3) / 2, top + 15, str(seat.rank), anchor="middle", colour="#ffffff")
