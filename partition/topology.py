"""Where ranks run, as integers: nodes, the switches above them, sockets inside them."""

from typing import NamedTuple


class Location(NamedTuple):
    """Where one rank runs. Numbers are given by first appearance, the same on every rank."""

    switches: tuple[int, ...]  # above its node, from the outermost; empty if unknown
    node: int  # ranks of one node share memory
    socket: int  # inside its node; 0 if unknown, or if its CPUs are of several
