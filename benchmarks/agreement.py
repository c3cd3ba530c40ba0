"""Greedy outputs of hpcinfer beside those of transformers."""

import json
from typing import NamedTuple

from engines import JobResult, PeerResult
from workload import Workload

from hpcinfer.data.detokenizer import TextStream
from hpcinfer.data.tokenizer import Tokenizer

CLEAR_MARGIN = 1e-3  # ten times the relative error that logits may have


class Agreement(NamedTuple):
    """How greedy outputs of hpcinfer compare with transformers'."""

    rows: int
    equal: int
    clear: int  # rows all of whose tokens transformers chose by a margin above CLEAR_MARGIN
    clear_equal: int


def compare(job: JobResult, reference: PeerResult, workload: Workload, tokenizer: Tokenizer) -> Agreement:
    """Compare the texts of a job with those of transformers' token ids."""
    assert reference.margins is not None, reference.versions
    texts = [json.loads(line)["text"] for line in job.output.splitlines()]
    rows = zip(texts, workload.prompts, reference.token_ids, strict=True)
    is_equal = [text == _text(prompt, output, tokenizer) for text, prompt, output in rows]
    is_clear = [margin > CLEAR_MARGIN for margin in reference.margins]
    both = sum(equal and clear for equal, clear in zip(is_equal, is_clear, strict=True))
    return Agreement(len(texts), sum(is_equal), sum(is_clear), both)


def _text(prompt: list[int], output: list[int], tokenizer: Tokenizer) -> str:
    stream = TextStream(tokenizer, prompt_ids=prompt)
    for token_id in output:
        stream.append(token_id)
    return stream.text()
