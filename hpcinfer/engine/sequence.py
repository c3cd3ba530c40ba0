"""A sequence: one choice of a request while it is served. Replicated on every rank of the replica."""

from __future__ import annotations

from array import array
from enum import IntEnum
from typing import TYPE_CHECKING

from hpcinfer.engine.request import Request

if TYPE_CHECKING:
    from hpcinfer.engine.logits import SeenTokens


class Finish(IntEnum):
    """Why a sequence ended; NONE while it goes on. The values travel in step records."""

    NONE = 0
    STOP = 1
    LENGTH = 2


class Sequence:
    """Token ids and how far they are computed.

        token_ids   [0 ........ num_prompt ........ len)
        K and V     [0 ...... num_computed)              in `blocks`
        in flight   [num_computed .. num_scheduled)      up to a token behind len, which a device samples meanwhile
        scored      [0 .. num_scored)                    prompt tokens whose log-probability is known
    """

    def __init__(self, seq_id: int, request: Request, choice: int) -> None:
        self.seq_id = seq_id  # order of admission
        self.request, self.choice = request, choice
        self.token_ids = [*request.prompt_ids, *(request.resumed[choice] if request.resumed else ())]
        self.num_prompt = len(request.prompt_ids)
        self.num_computed = self.num_scheduled = 0
        self.num_scored = 1 if request.sampling.scores_prompt and choice == 0 else self.num_prompt  # once for all
        self.blocks = array("q")  # of which batches copy the bytes
        self.block_hashes: list[bytes] = []
        self.num_remembered = 0  # leading blocks that are offered for reuse
        self.seen: SeenTokens | None = None  # where something depends on it
        self.is_finished = False  # perhaps with a work in flight, which comes to nothing
        params = request.sampling  # whether each token is that of the largest logit, and nothing else is asked for
        self.takes_best = params.is_greedy and params.logprobs is None and not params.adjusts_logits(0)

    @property
    def is_in_flight(self) -> bool:
        """Whether some of its tokens are being computed."""
        return self.num_scheduled > self.num_computed

    @property
    def num_output(self) -> int:
        """Output tokens so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def output_ids(self) -> list[int]:
        """Output tokens so far."""
        return self.token_ids[self.num_prompt :]

    def __repr__(self) -> str:
        return f"Sequence(row={self.request.row}, choice={self.choice}, {self.num_computed}/{len(self.token_ids)})"
