"""Who takes part in the throughput benchmark, as the command line names them."""

from argparse import ArgumentTypeError
from dataclasses import dataclass
from typing import NamedTuple

PRECISIONS = ("f32", "int8", "int4")  # of the weights
PEER_PRECISIONS = {  # of each peer
    "transformers": ("f32",),
    "openvino": ("f32", "int8"),
    "vllm": ("f32",),
    "llama.cpp": ("f32", "int8"),
}
NO_REUSE = "no-prefix-reuse"
_CHANGE_NO_RESULT = (NO_REUSE, "max-num-seqs", "max-num-batched-tokens", "block-size", "kv-cache-memory")


class Mesh(NamedTuple):
    """Sizes of the axes of a job."""

    dp: int
    pp: int
    tp: int

    def __str__(self) -> str:
        return "x".join(map(str, self))

    @property
    def ranks(self) -> int:
        """Ranks of the job."""
        return self.dp * self.pp * self.tp


@dataclass(frozen=True)
class JobContender:
    """hpcinfer as a job of its own: PRECISION:MESH:THREADS[:OPTION[=VALUE]]..., as int8:1x1x2:1:no-prefix-reuse."""

    precision: str
    mesh: Mesh
    threads_per_rank: int
    options: tuple[str, ...] = ()  # of `hpcinfer run`, as NAME or NAME=VALUE

    @property
    def engine(self) -> str:
        """What the tables call it."""
        return " ".join([f"hpcinfer {self.mesh}", *self.options])

    @property
    def threads(self) -> int:
        """Threads of all ranks together."""
        return self.mesh.ranks * self.threads_per_rank

    @property
    def answer(self) -> str:
        """What contenders have in common whose outputs must be the same bytes."""
        changing = [option for option in self.options if option.partition("=")[0] not in _CHANGE_NO_RESULT]
        return " ".join([self.precision, *sorted(changing)])

    @property
    def flags(self) -> list[str]:
        """Its options on the command line of `hpcinfer run`."""
        return [f"--{option}" for option in self.options]


@dataclass(frozen=True)
class PeerContender:
    """Another engine: PEER:PRECISION[:no-prefix-reuse]; it gets as many threads as the jobs that it stands beside."""

    peer: str
    precision: str
    reuses_prefixes: bool = True  # in workloads that share a prefix, if it can
    threads: int = 1

    @property
    def engine(self) -> str:
        """What the tables call it."""
        return self.peer if self.reuses_prefixes else f"{self.peer} {NO_REUSE}"


Contender = JobContender | PeerContender


def parse_job(text: str) -> JobContender:
    """Read a contender as --contenders has it.

    Raises:
        ArgumentTypeError: it is not of the form that JobContender names.
    """
    precision, *rest = text.split(":")
    try:
        mesh, threads = Mesh(*map(int, rest[0].split("x"))), int(rest[1])
    except (IndexError, TypeError, ValueError):
        raise ArgumentTypeError(f"{text!r}, expected PRECISION:DPxPPxTP:THREADS, as f32:1x1x2:1") from None
    if precision not in PRECISIONS or min(*mesh, threads) < 1:
        raise ArgumentTypeError(f"{text!r}, expected one of {', '.join(PRECISIONS)} and sizes of at least 1")
    return JobContender(precision, mesh, threads, tuple(rest[2:]))


def parse_peer(text: str) -> PeerContender:
    """Read a peer as --against has it.

    Raises:
        ArgumentTypeError: no such peer, or not in that precision.
    """
    peer, _, rest = text.partition(":")
    precision, _, option = rest.partition(":")
    if precision not in PEER_PRECISIONS.get(peer, ()) or option not in ("", NO_REUSE):
        known = ", ".join(f"{name}:{one}" for name, precisions in PEER_PRECISIONS.items() for one in precisions)
        raise ArgumentTypeError(f"{text!r}, expected one of {known}, perhaps with :{NO_REUSE}")
    return PeerContender(peer, precision, reuses_prefixes=not option)
