"""Log-likelihood of a text under a model: windows of tokens go through the loop as prompts that are only scored."""

import json
import math
from collections import deque
from typing import NamedTuple

from hpcinfer.comm.protocol import Collectives
from hpcinfer.config import SamplingParams
from hpcinfer.data.completion import Choice
from hpcinfer.data.tokenizer import Tokenizer
from hpcinfer.engine.leader import Leader
from hpcinfer.engine.outputs import Outputs
from hpcinfer.engine.replica import Replica
from hpcinfer.engine.request import Request
from hpcinfer.partition.mesh import Mesh

_SCORING = SamplingParams(temperature=0.0, max_tokens=0, echo=True, logprobs=0)

Window = tuple[int, ...]  # token ids


class Likelihood(NamedTuple):
    """How well a model predicts a text: all tokens of each window but its first."""

    nats: float  # in all; minus the sum of log-probabilities
    num_tokens: int
    num_bytes: int  # of these tokens
    num_windows: int

    @property
    def nats_per_token(self) -> float:
        """Mean of minus the log-probability."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """Exponential of the nats per token; infinite where it is beyond all numbers, NaN of NaN."""
        return math.inf if self.nats_per_token >= 700 else math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """What models with unlike tokenizers can be compared by."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.inf


class WindowFrontend:
    """Frontend of one replica over its windows: keeps their nats."""

    def __init__(self, requests: list[Request]) -> None:
        self._waiting = deque(requests)
        self.nats: list[float] = []  # of finished windows

    def take(self, wanted: int) -> list[Request]:
        """Give the next windows. Not collective."""
        return [self._waiting.popleft() for _ in range(min(wanted, len(self._waiting)))]

    def finish(self, row: int, choices: tuple[Choice, ...]) -> None:
        """Add up a window; the sum is the exact one, rounded once. Not collective."""
        scored = choices[0].prompt_logprobs or ()
        self.nats.append(-math.fsum(item.logprob for item in scored if item.logprob is not None))

    def is_exhausted(self) -> bool:
        """Whether all windows are taken. Not collective."""
        return not self._waiting

    def is_stopping(self) -> bool:
        """Never: all windows are scored. Not collective."""
        return False

    def wait(self) -> None:
        """Never needed: windows are there or not. Not collective."""


def measure(
    world: Collectives, mesh: Mesh, replica: Replica, tokenizer: Tokenizer, windows: list[Window]
) -> Likelihood:
    """Score all windows; the replicas share them. The numbers are the same for every mesh.

    Collective over the world.

    Args:
        world: all ranks of the mesh.
        mesh: how they are laid out.
        replica: this rank's part.
        tokenizer: of the model.
        windows: token ids, at least two and at most max_model_len of them each; the same on all ranks.
    """
    nats: list[float] = []
    if replica.is_leader:
        rows = range(mesh.coord(world.rank).dp, len(windows), mesh.dp)
        frontend = WindowFrontend([Request(row, windows[row], _SCORING) for row in rows])
        outputs = Outputs(tokenizer, replica.runner.eos_ids)
        replica.engine.run(Leader(replica.scheduler, outputs, frontend, replica.runner))
        nats = frontend.nats
    else:
        replica.engine.run(None)
    parts = [json.loads(data) for data in world.all_gather_bytes(json.dumps(nats).encode())]
    scored = [token for window in windows for token in window[1:]]
    return Likelihood(
        nats=math.fsum(value for part in parts for value in part),
        num_tokens=len(scored),
        num_bytes=sum(len(tokenizer.token_bytes(token)) for token in scored),
        num_windows=len(windows),
    )
