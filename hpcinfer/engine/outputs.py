"""From token ids to completions: incremental text, stop conditions, log-probabilities. On the leader only.

Text and finish reason are pure functions of the ids.
"""

from dataclasses import dataclass, field, replace

from hpcinfer.data.completion import Choice, TokenLogprob
from hpcinfer.data.detokenizer import TextStream
from hpcinfer.data.tokenizer import Tokenizer
from hpcinfer.engine.logits import TokenScore
from hpcinfer.engine.sampler import RowResult
from hpcinfer.engine.scheduler import Work
from hpcinfer.engine.sequence import Finish, Sequence

_REASONS = {Finish.STOP: "stop", Finish.LENGTH: "length"}


@dataclass
class _Output:
    """What has come of one sequence."""

    stream: TextStream
    end_ids: frozenset[int]  # tokens that end it
    token_ids: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)


class Outputs:
    """The outputs of all sequences of a replica."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: tuple[int, ...]) -> None:
        self._tokenizer, self._eos_ids = tokenizer, eos_ids
        self._open: dict[int, _Output] = {}  # by seq_id
        self._choices: dict[int, list[Choice]] = {}  # by row

    def open(self, sequences: list[Sequence]) -> None:
        """Expect the tokens of new sequences, and take those that resumed ones have."""
        for sequence in sequences:
            params = sequence.request.sampling
            stream = TextStream(
                self._tokenizer, params.stop, prompt_ids=sequence.request.prompt_ids, min_tokens=params.min_tokens
            )
            end_ids = frozenset(params.stop_token_ids if params.ignore_eos else params.stop_token_ids + self._eos_ids)
            output = self._open[sequence.seq_id] = _Output(stream, end_ids)
            for token_id in sequence.output_ids:
                finish = _append(output, token_id, params.max_tokens)
                assert finish is Finish.NONE, f"{sequence} is resumed after its end: {finish = }"

    def extend(self, work: Work, results: list[RowResult]) -> Finish:
        """Take over what a work gave; says whether its sequence ends here."""
        output, params = self._open[work.sequence.seq_id], work.sequence.request.sampling
        if not work.samples:
            output.prompt_scores += [result.score for result in results if result.score]
            is_scored = params.max_tokens == 0 and work.stop == work.sequence.num_prompt
            return Finish.LENGTH if is_scored else Finish.NONE
        sampled = results[-1]
        if sampled.score:
            output.prompt_scores += [result.score for result in results[:-1] if result.score]
            output.scores.append(sampled.score)
        return _append(output, sampled.token_id, params.max_tokens)

    def close(self, sequence: Sequence, finish: Finish) -> tuple[Choice, ...]:
        """End a sequence; gives all choices of its row when it was the last of them, else none."""
        request, output = sequence.request, self._open.pop(sequence.seq_id)
        choices = self._choices.setdefault(request.row, [])
        choices.append(self._choice(sequence.choice, output, sequence, finish))
        if len(choices) < request.sampling.n:
            return ()
        choices = sorted(self._choices.pop(request.row), key=lambda choice: choice.index)
        if request.sampling.scores_prompt:
            choices = [replace(choice, prompt_logprobs=choices[0].prompt_logprobs) for choice in choices]
        return tuple(choices)

    def _choice(self, index: int, output: _Output, sequence: Sequence, finish: Finish) -> Choice:
        params = sequence.request.sampling
        prompt_logprobs = None
        if params.scores_prompt and index == 0:  # which has scored it for all
            first = TokenLogprob(sequence.request.prompt_ids[0], None)
            prompt_logprobs = (first, *(_logprob(score) for score in output.prompt_scores))
        return Choice(
            index=index,
            token_ids=tuple(output.token_ids),
            text=output.stream.text(),
            finish_reason=_REASONS[finish],
            logprobs=None if params.logprobs is None else tuple(_logprob(score) for score in output.scores),
            prompt_logprobs=prompt_logprobs,
        )


def _append(output: _Output, token_id: int, max_tokens: int) -> Finish:
    output.token_ids.append(token_id)
    if token_id in output.end_ids or output.stream.append(token_id):
        return Finish.STOP
    return Finish.LENGTH if len(output.token_ids) >= max_tokens else Finish.NONE


def _logprob(score: TokenScore) -> TokenLogprob:
    return TokenLogprob(score.token_id, score.logprob, score.top)
