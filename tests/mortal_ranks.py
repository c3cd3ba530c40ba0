"""Ranks that die, simulated: threads that run one at a time, in an order and with deaths that a seed decides.

What a rank has sent before its death may arrive or not; each of the others learns of the death when it likes. The
clock is the simulation's: a moment passes with each call. A run is the same for the same seed and deaths.
"""

import random
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from hpcinfer.errors import RankFailedError

_TICK_S = 0.0005  # passes with each call of a rank
_MAX_CALLS = 60_000  # of all ranks together: who is not at rest by then hangs


class Death(BaseException):  # noqa: N818  # no error: nothing may catch it
    """What a rank feels when it is killed."""


class Hang(Exception):  # noqa: N818
    """Ranks wait for something that never comes."""


class Sent:
    """A message that has left."""

    def test(self) -> bool:
        """Say so."""
        return True

    def wait(self) -> None:
        """Return at once."""


class Network:
    """All ranks, their messages and the clock."""

    def __init__(self, size: int, seed: int, deaths: Mapping[int, int]) -> None:
        """Begin.

        Args:
            size: number of ranks.
            seed: of the order in which they run, and of what becomes of the messages of the dead.
            deaths: the call at which a rank dies, by rank.
        """
        self.size, self.random, self.deaths = size, random.Random(seed), dict(deaths)
        self.now, self.num_calls = 0.0, 0
        self.dead: set[int] = set()
        self.is_over = False
        self.mail: dict[tuple[int, int, int], deque[bytes]] = {}  # by receiver, sender and tag
        self.resting: dict[int, tuple[int, ...]] = {}  # ranks with nothing to do before a message of these tags comes
        self.results: dict[int, Any] = {}
        self.lines = [Line(self, rank) for rank in range(size)]
        self._turns = [threading.Semaphore(0) for _ in range(size)]
        self._back = threading.Semaphore(0)

    def monotonic(self) -> float:
        """Seconds since the begin; stands in for the module `time`."""
        return self.now

    def run(self, main: Callable[["Line"], Any]) -> None:
        """Run `main(line)` on every rank until all that live are at rest, and have nothing left to learn.

        Raises:
            Hang: that does not happen.
        """
        threads = [threading.Thread(target=self._live, args=(rank, main), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        while waiting := [rank for rank in range(self.size) if rank not in self.dead and rank not in self.results]:
            self.num_calls += 1
            self.now += _TICK_S
            if self.num_calls > _MAX_CALLS:
                busy = [rank for rank in waiting if rank not in self.resting]
                self._end(threads, waiting)
                raise Hang(f"ranks {busy} wait for ever; dead: {sorted(self.dead)}")
            if self._is_at_rest(waiting):
                break
            rank = self.random.choice(waiting)
            self._turns[rank].release()
            self._back.acquire()
        self._end(threads, waiting)
        for result in self.results.values():
            if isinstance(result, BaseException):
                raise result

    def pass_the_turn(self, rank: int) -> None:
        """Let others run; a rank dies here, if it is to die."""
        self._back.release()
        self._turns[rank].acquire()
        self.lines[rank].num_calls += 1
        if self.deaths.get(rank) == self.lines[rank].num_calls or self.is_over:
            raise Death

    def _is_at_rest(self, waiting: list[int]) -> bool:
        know_all = all(self.lines[rank].seen >= self.dead for rank in waiting)
        is_coming = any(queue and sender in waiting and tag in self.resting.get(to, ())
                        for (to, sender, tag), queue in self.mail.items() if to in waiting)  # fmt: skip
        is_anyone_to_die = any(rank in self.deaths for rank in waiting)
        return know_all and not is_coming and not is_anyone_to_die and all(rank in self.resting for rank in waiting)

    def _live(self, rank: int, main: Callable[["Line"], Any]) -> None:
        self._turns[rank].acquire()
        try:
            self.results[rank] = main(self.lines[rank])
        except Death:
            if not self.is_over:
                self._bury(rank)
        except BaseException as error:
            self.results[rank] = error
        self._back.release()

    def _bury(self, rank: int) -> None:
        self.dead.add(rank)
        for (_, sender, _), queue in self.mail.items():
            if sender == rank:
                for _ in range(self.random.choice([0, 0, len(queue)])):
                    queue.pop()

    def _end(self, threads: list[threading.Thread], ranks: list[int]) -> None:
        """End the threads of ranks that live on."""
        self.is_over = True
        for rank in ranks:
            self._turns[rank].release()
            threads[rank].join()


class Line:
    """What one rank sees of the network: the part of `MpiGroup` that survivors use."""

    is_tolerant = True

    def __init__(self, network: Network, rank: int) -> None:
        self.rank, self.size, self._network = rank, network.size, network
        self.num_calls = 0
        self.seen: frozenset[int] = frozenset()  # dead ranks that this one knows of

    def failed(self) -> frozenset[int]:
        """Learn of some deaths, or of none yet; never forget one."""
        network = self._network
        news = [rank for rank in sorted(network.dead - self.seen) if network.random.random() < 0.3]
        self.seen |= frozenset(news)
        return self.seen

    def send_bytes(self, data: bytes, peer: int, tag: int = 0) -> Sent:
        """Put bytes into the mail of a rank."""
        self._network.pass_the_turn(self.rank)
        self._network.mail.setdefault((peer, self.rank, tag), deque()).append(data)
        return Sent()

    def probe_bytes_of(self, peer: int, tag: int = 0) -> bytes | None:
        """Take a message of a rank, if there is one."""
        self._network.pass_the_turn(self.rank)
        queue = self._network.mail.get((self.rank, peer, tag))
        if peer in self.failed() and not (queue and self._network.random.random() < 0.5):
            raise RankFailedError("a rank has died")
        return self._take(queue) if queue else None

    def probe_bytes(self, tag: int = 0) -> tuple[int, bytes] | None:
        """Take a message of any living rank, if there is one."""
        self._network.pass_the_turn(self.rank)
        living = sorted(set(range(self.size)) - self.failed())
        senders = [peer for peer in living if self._network.mail.get((self.rank, peer, tag))]
        if not senders:
            return None
        sender = self._network.random.choice(senders)
        return sender, self._take(self._network.mail[self.rank, sender, tag])

    def pause(self) -> Callable[[], None]:
        """Begin to wait."""
        return lambda: self._network.pass_the_turn(self.rank)

    def rest(self, *tags: int) -> None:
        """Say that this rank has nothing to do until it takes a message; of these tags it will take any."""
        self._network.resting[self.rank] = tags

    def wake(self) -> None:
        """Say that it has something to do."""
        self._network.resting.pop(self.rank, None)

    def _take(self, queue: "deque[bytes]") -> bytes:
        self.wake()
        return queue.popleft()
