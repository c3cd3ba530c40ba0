"""Messages between two ranks of a node: bytes through a ring for each pair, in order, with a tag.

What fits into the ring leaves at once; the rest when the other has read, whenever this rank waits for anything in its
channel: two ranks that send each other much at the same time do not wait for each other for ever.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from typing import Any

from hpcinfer.comm.node.library import Library
from hpcinfer.errors import RankFailedError

_HEADER = struct.Struct("qq")  # tag, bytes
_SLICE_NS, _SHORT_SLICE_NS = 2_000_000, 100_000  # the short one while messages are under way: they move in between


class Outgoing:
    """A message on its way to a rank; its buffer must live until it has left."""

    def __init__(self, mail: Mail, peer: int, tag: int, data: memoryview) -> None:
        self._mail, self._peer = mail, peer
        self.left = deque([memoryview(_HEADER.pack(tag, len(data))), data])
        self._num_parts = len(self.left)

    def test(self) -> bool:
        """Whether the buffer may be used again."""
        if self.left:
            self._mail.push(self._peer)
        return not self.left

    def wait(self) -> None:
        """Return when the buffer may be used again."""
        self._mail.wait_until(self.test, self._peer, is_reading=False)

    def cancel(self) -> None:
        """Let the buffer be used again at once; what has begun to leave goes on from a copy."""
        if self.left:
            self.left = deque(memoryview(bytes(part)) for part in self.left)


class Incoming:
    """A message that is to come from a rank."""

    def __init__(self, mail: Mail, peer: int, tag: int, data: memoryview) -> None:
        self._mail, self._peer, self.tag, self.data, self.is_done = mail, peer, tag, data, False

    def test(self) -> bool:
        """Whether it is there."""
        if not self.is_done:
            self._mail.pull(self._peer)
        return self.is_done

    def wait(self) -> None:
        """Return when it is there."""
        self._mail.wait_until(self.test, self._peer, is_reading=True)

    def cancel(self) -> None:
        """Let it come no more: nothing is written to its buffer."""
        if not self.is_done:
            self._mail.forget(self, self._peer)

    def fill(self, data: memoryview) -> None:
        """Take a message that came before it was asked for."""
        if len(data):  # an empty buffer may be one that cannot be written
            self.data[:] = data
        self.is_done = True


class _Inbox:
    """What comes from one rank."""

    def __init__(self) -> None:
        self.waiting: list[Incoming] = []  # in the order in which they were asked for
        self.early: list[tuple[int, memoryview]] = []  # came before they were asked for: tag, bytes
        self.header = memoryview(bytearray(_HEADER.size))
        self.left = self.header  # of the header, or of the message that comes now
        self.whole: memoryview | None = None  # of that message
        self.receiver: Incoming | None = None  # whose buffer that is
        self.tag = 0


class Mail:
    """The messages of one rank.

    Args:
        library: of the channel.
        channel: C side of it.
        size: ranks of the channel.
        while_waiting: called again and again while a rank waits; may raise.
        is_busy: whether the MPI has messages to move on, too.
    """

    def __init__(
        self, library: Library, channel: Any, size: int, while_waiting: Callable[[], None], is_busy: Callable[[], bool]
    ) -> None:
        self._ffi, self._lib, self._channel = library.ffi, library.lib, channel
        self._while_waiting, self._is_busy = while_waiting, is_busy
        self._outboxes: list[deque[Outgoing]] = [deque() for _ in range(size)]
        self._inboxes = [_Inbox() for _ in range(size)]

    def send(self, data: memoryview, peer: int, tag: int) -> Outgoing:
        """Start sending."""
        message = Outgoing(self, peer, tag, data)
        self._outboxes[peer].append(message)
        self.push(peer)
        return message

    def start_receive(self, data: memoryview, peer: int, tag: int) -> Incoming:
        """Let a message come."""
        message = Incoming(self, peer, tag, data)
        early = self._take_early(peer, tag)
        if early:
            message.fill(early[0])
        else:
            self._inboxes[peer].waiting.append(message)
        return message

    def receive_bytes(self, peer: int, tag: int) -> bytes:
        """Wait for a message of whatever length."""
        found: list[memoryview] = []

        def take() -> bool:
            found.extend(self._take_early(peer, tag))
            if not found:
                self.pull(peer)
                found.extend(self._take_early(peer, tag))
            return bool(found)

        self.wait_until(take, peer, is_reading=True)
        return bytes(found[0])

    def _take_early(self, peer: int, tag: int) -> list[memoryview]:
        """The first message of a tag that has come and nobody has asked for, if there is one."""
        early = self._inboxes[peer].early
        for i, (found_tag, data) in enumerate(early):
            if found_tag == tag:
                del early[i]
                return [data]
        return []

    def close(self) -> None:
        """Let go of the channel: messages that have not left never will."""
        self._channel = None

    def slice_ns(self) -> int:
        """How long a rank that waits may sleep before it looks after messages."""
        return _SHORT_SLICE_NS if any(self._outboxes) or self._is_busy() else _SLICE_NS

    def push_all(self) -> None:
        """Let leave what can."""
        for peer, outbox in enumerate(self._outboxes):
            if outbox:
                self.push(peer)

    def push(self, peer: int) -> None:
        """Let leave what can to a rank."""
        outbox = self._outboxes[peer]
        while outbox:
            parts = outbox[0].left
            while parts:
                moved = self._move(self._lib.hpc_ring_write, peer, parts[0])
                if moved < len(parts[0]):
                    parts[0] = parts[0][moved:]
                    return
                parts.popleft()
            outbox.popleft()

    def pull(self, peer: int) -> None:
        """Take what has come from a rank."""
        inbox = self._inboxes[peer]
        while True:
            moved = self._move(self._lib.hpc_ring_read, peer, inbox.left)
            if moved < len(inbox.left):
                inbox.left = inbox.left[moved:]
                return
            if inbox.whole is None:
                self._begin(inbox)
            else:
                self._end(inbox)
                return

    def wait_until(self, is_done: Callable[[], bool], peer: int, *, is_reading: bool) -> None:
        """Wait for a rank to write, or to read.

        In a long wait what others have sent is taken, so that ranks which wait do not hold up those that send to them.
        """
        while not is_done():
            self.push_all()
            if not self._lib.hpc_ring_wait(self._open_channel(), peer, is_reading, self.slice_ns()):
                self._while_waiting()
                for other in range(len(self._inboxes)):
                    if other != peer or not is_reading:
                        self.pull(other)

    def forget(self, message: Incoming, peer: int) -> None:
        """Let a message come into memory of our own."""
        inbox = self._inboxes[peer]
        if message is inbox.receiver:
            assert inbox.whole is not None
            done = len(inbox.whole) - len(inbox.left)
            inbox.whole = memoryview(bytearray(inbox.whole))
            inbox.left, inbox.receiver = inbox.whole[done:], None
        elif message in inbox.waiting:
            inbox.waiting.remove(message)

    def _begin(self, inbox: _Inbox) -> None:
        """The header is there: find out where its message goes."""
        inbox.tag, length = _HEADER.unpack(inbox.header)
        inbox.receiver = next((each for each in inbox.waiting if each.tag == inbox.tag), None)
        if inbox.receiver is None:
            inbox.whole = memoryview(bytearray(length))
        else:
            inbox.waiting.remove(inbox.receiver)
            inbox.whole = inbox.receiver.data
        assert len(inbox.whole) == length, f"a message of {length} bytes for a buffer of {len(inbox.whole)}"
        inbox.left = inbox.whole

    def _end(self, inbox: _Inbox) -> None:
        """The message is whole."""
        receiver, whole = inbox.receiver, inbox.whole
        inbox.left, inbox.receiver, inbox.whole = inbox.header, None, None
        if receiver is not None:
            receiver.is_done = True
            return
        assert whole is not None
        late = next((each for each in inbox.waiting if each.tag == inbox.tag), None)  # asked for while it came
        if late is None:
            inbox.early.append((inbox.tag, whole))
        else:
            inbox.waiting.remove(late)
            late.fill(whole)

    def _move(self, function: Any, peer: int, data: memoryview) -> int:
        return int(function(self._open_channel(), peer, self._ffi.from_buffer(data), len(data))) if len(data) else 0

    def _open_channel(self) -> Any:
        if self._channel is None:
            raise RankFailedError("the channel of its node is closed")
        return self._channel
