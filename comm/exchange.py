"""Messages of the same buffers again and again, made anew each time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives, Messages, Pending


class RepeatedMessages:
    """An `Exchange` of any group: what a dead rank has left behind can be cancelled."""

    def __init__(self, group: Collectives, outgoing: Messages, incoming: Messages, tag: int) -> None:
        self._group, self._outgoing, self._incoming, self._tag = group, outgoing, incoming, tag
        self._pending: list[Pending] = []

    def start(self) -> None:
        """Let all of them leave and come once more."""
        for buffer, peer in self._incoming:
            self._pending.append(self._group.start_receive(buffer, peer, self._tag))
        for buffer, peer in self._outgoing:
            self._pending.append(self._group.send(buffer, peer, self._tag))

    def finish(self) -> None:
        """Wait until all of them have left and come."""
        pending, self._pending = self._pending, []
        self._group.wait_all(pending)

    def cancel(self) -> None:
        """Let those that have not come come no more."""
        for each in self._pending:
            each.cancel()
        self._pending.clear()
