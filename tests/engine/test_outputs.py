import pytest

from hpcinfer.config import SamplingParams
from hpcinfer.engine.logits import TokenScore
from hpcinfer.engine.outputs import Outputs
from hpcinfer.engine.request import Request
from hpcinfer.engine.sampler import RowResult
from hpcinfer.engine.scheduler import Work
from hpcinfer.engine.sequence import Finish, Sequence

EOS = 1


@pytest.fixture
def outputs(tokenizer):
    return Outputs(tokenizer, (EOS,))


def open_row(outputs, prompt=(0, 5, 6), row=0, first_id=0, **params):
    request = Request(row, tuple(prompt), SamplingParams(**{"max_tokens": 50, **params}))
    sequences = [Sequence(first_id + i, request, i) for i in range(request.sampling.n)]
    outputs.open(sequences)
    return sequences


def score(token_id):
    return TokenScore(token_id, -token_id / 8, ((token_id, -token_id / 8),))


def feed(outputs, sequence, token_ids):
    """Give tokens until the sequence ends; returns why, and the only choice if the row is complete."""
    finish = Finish.NONE
    for token_id in token_ids:
        assert finish is Finish.NONE, "tokens after the end"
        work = Work.of(sequence, len(sequence.token_ids) - 1, len(sequence.token_ids))
        has_score = sequence.request.sampling.logprobs is not None
        finish = outputs.extend(work, [RowResult(token_id, score(token_id) if has_score else None)])
        sequence.token_ids.append(token_id)
    return finish, outputs.close(sequence, finish) if finish is not Finish.NONE else None


def test_end_of_sequence_ends_without_text(outputs, tokenizer):
    ids = tokenizer.encode("hello world", add_special_tokens=False)
    finish, [choice] = feed(outputs, *open_row(outputs), [*ids, EOS])
    assert (finish, choice.text, choice.finish_reason) == (Finish.STOP, "hello world", "stop")
    assert choice.token_ids == (*ids, EOS) and choice.logprobs is None and choice.prompt_logprobs is None


def test_ignored_end_of_sequence_goes_on(outputs):
    finish, [choice] = feed(outputs, *open_row(outputs, ignore_eos=True, max_tokens=3), [EOS, 40, EOS])
    assert finish is Finish.LENGTH and choice.token_ids == (EOS, 40, EOS)


def test_stop_token_ends_even_where_end_of_sequence_is_ignored(outputs, tokenizer):
    ids = tokenizer.encode("list of", add_special_tokens=False)
    finish, [choice] = feed(outputs, *open_row(outputs, stop_token_ids=(77,), ignore_eos=True), [*ids, 77])
    assert (finish, choice.text) == (Finish.STOP, "list of")


def test_stop_string_across_tokens_cuts_the_text(outputs, tokenizer):
    ids = [i for char in "return value" for i in tokenizer.encode(char, add_special_tokens=False)]
    sequences = open_row(outputs, stop=("xyz", "n val"))
    finish, [choice] = feed(outputs, *sequences, ids[:10])
    assert (finish, choice.text, choice.finish_reason) == (Finish.STOP, "retur", "stop")
    assert choice.token_ids == tuple(ids[:10])


@pytest.mark.parametrize("last", [EOS, 77])
def test_an_end_at_max_tokens_is_still_a_stop(outputs, last):
    finish, [choice] = feed(outputs, *open_row(outputs, max_tokens=2, stop_token_ids=(77,)), [40, last])
    assert finish is Finish.STOP and choice.finish_reason == "stop"


def test_max_tokens_end_with_length(outputs):
    finish, [choice] = feed(outputs, *open_row(outputs, max_tokens=2), [40, 41])
    assert finish is Finish.LENGTH and choice.finish_reason == "length" and choice.token_ids == (40, 41)


def test_stop_strings_do_not_count_before_min_tokens(outputs, tokenizer):
    [letter] = tokenizer.encode("a", add_special_tokens=False)
    finish, [choice] = feed(outputs, *open_row(outputs, stop=("a",), min_tokens=2), [letter] * 3)
    assert (finish, choice.text) == (Finish.STOP, "aa")


def test_choices_of_a_row_come_together_and_in_order(outputs):
    sequences = open_row(outputs, n=3, max_tokens=1, row=8)
    other = open_row(outputs, max_tokens=1, row=9, first_id=3)
    assert feed(outputs, sequences[2], [42])[1] == () and feed(outputs, sequences[0], [40])[1] == ()
    assert [choice.token_ids for choice in feed(outputs, *other, [50])[1]] == [(50,)]
    choices = feed(outputs, sequences[1], [41])[1]
    assert [(choice.index, choice.token_ids) for choice in choices] == [(0, (40,)), (1, (41,)), (2, (42,))]


def test_logprobs_are_of_each_token(outputs):
    _, [choice] = feed(outputs, *open_row(outputs, logprobs=1, max_tokens=3), [40, 41, EOS])
    assert [(entry.token_id, entry.logprob) for entry in choice.logprobs] == [(40, -5.0), (41, -5.125), (EOS, -0.125)]
    assert choice.logprobs[0].top == ((40, -5.0),)


def test_prompt_is_scored_over_chunks_and_its_first_token_not_at_all(outputs):
    [sequence] = open_row(outputs, prompt=(10, 11, 12, 13), echo=True, logprobs=1, max_tokens=1)
    first = outputs.extend(Work.of(sequence, 0, 2), [RowResult(i, score(i)) for i in (11, 12)])
    sequence.num_scored = 3
    last = outputs.extend(Work.of(sequence, 2, 4), [RowResult(i, score(i)) for i in (13, 99)])
    assert (first, last) == (Finish.NONE, Finish.LENGTH)
    sequence.token_ids.append(99)
    [choice] = outputs.close(sequence, last)
    assert [entry.token_id for entry in choice.prompt_logprobs] == [10, 11, 12, 13]
    assert choice.prompt_logprobs[0].logprob is None and choice.prompt_logprobs[3].logprob == -13 / 8
    assert [entry.token_id for entry in choice.logprobs] == [99]


def test_prompt_is_scored_once_for_all_choices(outputs):
    first, second = open_row(outputs, prompt=(10, 11), echo=True, logprobs=1, max_tokens=1, n=2)
    assert (first.num_scored, second.num_scored) == (1, 2)
    assert outputs.extend(Work.of(second, 0, 2), [RowResult(98, score(98))]) is Finish.LENGTH
    assert outputs.close(second, Finish.LENGTH) == ()
    assert outputs.extend(Work.of(first, 0, 2), [RowResult(11, score(11)), RowResult(99, score(99))]) is Finish.LENGTH
    choices = outputs.close(first, Finish.LENGTH)
    assert [[entry.token_id for entry in choice.prompt_logprobs] for choice in choices] == [[10, 11]] * 2
    assert [choice.logprobs[0].token_id for choice in choices] == [99, 98]


@pytest.mark.parametrize("prompt", [(10,), (10, 11, 12)])
def test_scoring_alone_ends_with_the_prompt(outputs, prompt):
    [sequence] = open_row(outputs, prompt=prompt, echo=True, logprobs=0, max_tokens=0)
    results = [RowResult(i, TokenScore(i, -1.0, ())) for i in prompt[1:]]
    for i, result in enumerate(results):
        assert outputs.extend(Work.of(sequence, i, i + 1), [result]) is Finish.NONE
        sequence.num_scored += 1
    finish = outputs.extend(Work.of(sequence, len(prompt) - 1, len(prompt)), [])
    [choice] = outputs.close(sequence, finish)
    assert (choice.text, choice.token_ids, choice.finish_reason, choice.logprobs) == ("", (), "length", ())
    assert len(choice.prompt_logprobs) == len(prompt)


def test_chunks_without_rows_end_nothing(outputs):
    [sequence] = open_row(outputs, prompt=range(20))
    assert outputs.extend(Work.of(sequence, 0, 19), []) is Finish.NONE
