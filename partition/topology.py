"""Where ranks run, as integers: nodes, the switches above them, sockets inside them."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

NODE, SWITCH, ALL = "node", "switch", "all"  # levels, from the innermost


class Location(NamedTuple):
    """Where one rank runs. Numbers are given by first appearance, the same on every rank."""

    switches: tuple[int, ...]  # above its node, from the outermost, as many as for every other rank; empty if unknown
    node: int  # ranks of one node share memory
    socket: int  # inside its node; 0 if unknown, or if its CPUs are of several

    @property
    def path(self) -> tuple[int, ...]:
        """From the outermost switch to the socket."""
        return (*self.switches, self.node, self.socket)


def by_node(locations: Sequence[Location]) -> list[tuple[int, ...]]:
    """Ranks of each node, in order of the first of each."""
    return _together([location.node for location in locations])


def by_switch(locations: Sequence[Location]) -> list[tuple[int, ...]]:
    """Ranks below each innermost switch, in order of the first of each; all in one where no switch is known."""
    return _together([location.switches for location in locations])


def level_of(locations: Sequence[Location]) -> str:
    """The innermost level that has all of these: NODE, SWITCH where switches are known, else ALL."""
    if len({location.node for location in locations}) == 1:
        return NODE
    switches = {location.switches for location in locations}
    return SWITCH if len(switches) == 1 and switches != {()} else ALL


def numbered(names: Sequence[Hashable]) -> list[int]:
    """A number for each name, by first appearance."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(name, len(numbers)) for name in names]


def _together(keys: Sequence[Hashable]) -> list[tuple[int, ...]]:
    found: dict[Hashable, list[int]] = {}
    for rank, key in enumerate(keys):
        found.setdefault(key, []).append(rank)
    return [tuple(ranks) for ranks in found.values()]
