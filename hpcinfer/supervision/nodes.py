"""Nodes: how many ranks fit where, which nodes to leave out, and where the next step goes. Starts nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from hpcinfer.errors import ConfigError

_MAX_STRIKES = 3  # steps that died in a row on a node; then it is left out
_DOWN = {"DOWN", "FAIL", "FAILING", "ERROR", "UNKNOWN", "NOT_RESPONDING", "POWERED_DOWN", "POWERING_DOWN", "POWER_DOWN",
         "REBOOT", "REBOOT_ISSUED"}  # fmt: skip


class Node(NamedTuple):
    """A host, and how many ranks it takes."""

    name: str
    slots: int


class Seat(NamedTuple):
    """Some ranks of a step on one node."""

    node: str
    ranks: int


Placement = tuple[Seat, ...]


def parse_nodes(text: str, ranks_per_node: int | None, flag: str = "--nodes") -> list[Node]:
    """Read HOST[:RANKS],... as the user gives it.

    Raises:
        ConfigError: not of this form, or a host twice.
    """
    nodes = []
    for item in text.split(","):
        match = re.fullmatch(r"([^\s:,]+)(?::([1-9][0-9]*))?", item.strip())
        if not match:
            raise ConfigError(f"{flag} {text}: {item!r}", expected="HOST or HOST:RANKS, separated by commas")
        nodes.append(Node(match[1], int(match[2] or ranks_per_node or 1)))
    if len({node.name for node in nodes}) < len(nodes):
        raise ConfigError(f"{flag} {text}: a host is there twice", expected="each once")
    return nodes


def parse_counts(text: str) -> list[int]:
    """Read Slurm's numbers per node: 4(x2),3 is 4, 4, 3."""
    found = re.findall(r"([0-9]+)(?:\(x([0-9]+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def is_down(state: str) -> bool:
    """Whether a node in this state of Slurm's, as ALLOCATED+DRAIN or DOWN*, cannot run a step."""
    return state.endswith("*") or bool(_DOWN & set(re.split(r"[+*]", state.upper())))


def place(free: Mapping[str, int], ranks: int) -> Placement | None:
    """Choose nodes for a step: the one with most room, or the fewest that have room together; None if there is none."""
    by_room = sorted((Seat(name, slots) for name, slots in free.items() if slots > 0), key=lambda seat: -seat.ranks)
    chosen, left = [], ranks
    for seat in by_room:
        if left > 0:
            chosen.append(Seat(seat.node, min(seat.ranks, left)))
            left -= seat.ranks
    return tuple(chosen) if chosen and left <= 0 else None


def count_places(nodes: Sequence[Node], ranks: int) -> int:
    """Count the steps of so many ranks that the nodes hold together."""
    free, count = Counter({node.name: node.slots for node in nodes}), 0
    while placement := place(free, ranks):
        free.subtract({seat.node: seat.ranks for seat in placement})
        count += 1
    return count


class Roster:
    """The nodes of a supervisor: what is taken, what is down, what has failed too often."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._slots = {node.name: node.slots for node in nodes}
        self._taken: Counter[str] = Counter()
        self._strikes: Counter[str] = Counter()
        self._down: set[str] = set()
        self._lost: set[str] = set()  # down twice in a row: one that is busy may miss an answer

    @property
    def names(self) -> list[str]:
        """All nodes that were not given back."""
        return list(self._slots)

    @property
    def left_out(self) -> list[str]:
        """Nodes on which steps died again and again."""
        return [name for name in self._slots if self._strikes[name] >= _MAX_STRIKES]

    @property
    def idle(self) -> list[str]:
        """Nodes without a step."""
        return [name for name in self._slots if not self._taken[name]]

    def take(self, ranks: int) -> Placement | None:
        """Find room for a step and take it; nodes that were left out count again if no others are large enough."""
        placement = place(self._free(set(self.left_out) if self._has_room(ranks, self.left_out) else set()), ranks)
        self._taken.update({seat.node: seat.ranks for seat in placement or ()})
        return placement

    def give(self, placement: Placement) -> None:
        """Take note that a step has ended."""
        self._taken.subtract({seat.node: seat.ranks for seat in placement})

    def strike(self, placement: Placement) -> None:
        """Take note that a step has died: of its nodes those that are down are known, else all are suspected."""
        names = {seat.node for seat in placement}
        self._strikes.update(names & self._down or names)

    def praise(self, placement: Placement) -> None:
        """Take note that a step has done work."""
        for seat in placement:
            self._strikes[seat.node] = 0

    def bar(self, placement: Placement) -> None:
        """Leave out nodes that refuse the job, as those that compute other bits."""
        self._strikes.update({seat.node: _MAX_STRIKES for seat in placement})

    def set_down(self, names: Iterable[str]) -> None:
        """Take note of what Slurm says."""
        down = set(names) & self._slots.keys()
        self._down, self._lost = down, down & self._down

    def is_down(self, placement: Placement) -> bool:
        """Whether a node of a step is down."""
        return any(seat.node in self._down for seat in placement)

    def is_lost(self, placement: Placement) -> bool:
        """Whether a node of a step is down for so long that its ranks are given up."""
        return any(seat.node in self._lost for seat in placement)

    def drop(self, names: Iterable[str]) -> None:
        """Forget nodes: they are not ours any more."""
        for name in names:
            del self._slots[name]

    def has_room(self, ranks: int) -> bool:
        """Whether a step would have room if nothing ran."""
        return self._has_room(ranks, ())

    def _has_room(self, ranks: int, without: Iterable[str]) -> bool:
        names = self._slots.keys() - self._down - set(without)
        return sum(self._slots[name] for name in names) >= ranks

    def _free(self, without: set[str]) -> dict[str, int]:
        return {name: slots - self._taken[name] for name, slots in self._slots.items()
                if name not in without | self._down}  # fmt: skip
