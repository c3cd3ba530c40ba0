"""Is it right: tokens and log-probabilities beside transformers', and the same bytes whatever the batch."""

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import gpu_peer
import torch
from gpu_bench import Bench, Row
from gpu_engine import Model, Prompts, Way, digest_bytes, greedy
from random_model import SHAPES, write_random_model
from workload import Recipe as WorkloadRecipe
from workload import make_workload

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.config import EngineOptions
from hpcinfer.data.tokenizer import Tokenizer
from hpcinfer.weights.conversion import Recipe, convert
from hpcinfer.weights.reader import Store

DEMO_MODEL = Path(__file__).resolve().parents[1] / "examples" / "demo_model"
_COMPARED = 8  # prompts that transformers gets
CLEAR_LEAD = {"float32": 1e-3, "bfloat16": 3e-2}  # of the largest logit: tokens that lead by less may differ
MAX_ERROR = 1e-3  # of a log-probability in float32
BFLOAT16_ERRORS = 2.0  # times the error of transformers' bfloat16 that ours may have
_NUMBERS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Subject(NamedTuple):
    """A model that is checked."""

    name: str
    folder: Path  # Hugging Face's layout
    store: Path
    tokenizer: Tokenizer
    prompts: Prompts
    output_tokens: int

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.prompts)) + self.output_tokens


def run(bench: Bench) -> Iterator[Row]:
    """Give a row for each model and type beside transformers, and one for each setting that must change no byte."""
    sizes = bench.sizes.check
    folders = {"random": write_random_model(bench.folder / "random", SHAPES[sizes.shape])}
    if sizes.has_demo_model:
        folders["demo"] = DEMO_MODEL
    subjects = [_subject(bench, name, folder) for name, folder in folders.items()]
    for subject in subjects:
        for dtype in _NUMBERS:
            about = {"check": "transformers", "model": subject.name, "dtype": dtype}
            yield bench.attempt(about, _beside_transformers, bench, subject, dtype)
    yield from _settings(bench, subjects[-1])


def _subject(bench: Bench, name: str, folder: Path) -> Subject:
    sizes, store = bench.sizes.check, bench.folder / f"{name}.store"
    convert(folder, store, SerialGroup(), Recipe(grains=sizes.grains))
    tokenizer = Tokenizer({"tokenizer.json": (folder / "tokenizer.json").read_bytes()})
    workload = make_workload(tokenizer, WorkloadRecipe(sizes.prompts, sizes.lengths, sizes.output_tokens))
    return Subject(name, folder, store, tokenizer, workload.prompts, sizes.output_tokens)


class _Outputs(NamedTuple):
    """What an engine says of the prompts that are compared."""

    token_ids: list[list[int]]
    log_probabilities: list[list[float]]  # of the prompts' own tokens


def _beside_transformers(bench: Bench, subject: Subject, dtype: str) -> Row:
    prompts = subject.prompts[:_COMPARED]
    runner = gpu_peer.runner()
    exact = gpu_peer.load(subject.folder, _NUMBERS[dtype], bench.device).float()  # the rounded weights, in float32
    with torch.inference_mode():
        expected = _ask_transformers(exact, runner, prompts, subject.output_tokens)
        leads = [runner.leads(exact, *row) for row in zip(prompts, expected.token_ids, strict=True)]
        allowed = MAX_ERROR
        if dtype != "float32":
            rounded = gpu_peer.load(subject.folder, _NUMBERS[dtype], bench.device)
            theirs = _ask_transformers(rounded, runner, prompts, 1)
            allowed = BFLOAT16_ERRORS * _error(theirs, expected, dtype) + MAX_ERROR
    with Store.open(subject.store) as store:
        found = _ask_hpcinfer(Model(store, Way(dtype), subject.max_len, subject.tokenizer), prompts, subject)
    clear, equal = _agreement(found, expected, leads, CLEAR_LEAD[dtype])
    error = _error(found, expected, dtype)
    return {"tokens": subject.output_tokens * len(prompts), "clear": clear, "clear_equal": equal, "error": error,
            "allowed": allowed, "is_right": 0 < clear == equal and error <= allowed}  # fmt: skip


def _ask_transformers(model: Any, runner: Any, prompts: list[list[int]], output_tokens: int) -> _Outputs:
    token_ids = runner.generate(model, prompts, output_tokens)
    return _Outputs(token_ids, [gpu_peer.log_probabilities(model, prompt) for prompt in prompts])


def _ask_hpcinfer(model: Model, prompts: Prompts, subject: Subject) -> _Outputs:
    with closing(model.replica(EngineOptions())) as replica:
        tokens = model.generate(replica, prompts, greedy(subject.output_tokens)).choices
        scored = model.generate(replica, prompts, replace(greedy(1), echo=True, logprobs=0)).choices
    scores = [[score.logprob for score in (choice.prompt_logprobs or ())[1:]] for choice in scored]
    return _Outputs([list(choice.token_ids) for choice in tokens], scores)  # type: ignore[arg-type]


def _agreement(found: _Outputs, expected: _Outputs, leads: list[list[float]], enough: float) -> tuple[int, int]:
    """Tokens up to the first in a row that leads too little, and how many of them are equal."""
    clear = equal = 0
    for mine, theirs, lead in zip(found.token_ids, expected.token_ids, leads, strict=True):
        count = next((i for i, each in enumerate(lead) if each <= enough), len(lead))
        clear += count
        equal += sum(a == b for a, b in zip(mine[:count], theirs[:count], strict=True))
    return clear, equal


def _error(found: _Outputs, expected: _Outputs, dtype: str) -> float:
    """Of log-probabilities: the largest in float32, the root of the mean square in other types."""
    pairs = zip(found.log_probabilities, expected.log_probabilities, strict=True)
    errors = [abs(a - b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True)]
    return max(errors) if dtype == "float32" else fmean(error**2 for error in errors) ** 0.5


def _settings(bench: Bench, subject: Subject) -> Iterator[Row]:
    """What no setting may change, in bytes: of rows that are greedy, sampled, and sampled with log-probabilities."""
    usual: dict[str, Any] = {"max_num_seqs": 64, "max_num_batched_tokens": 512, "block_size": 16, "graphs": True}
    longest = max(map(len, subject.prompts))
    changed: list[dict[str, Any]] = [
        {}, {"max_num_seqs": 1}, {"max_num_seqs": 7}, {"block_size": 8}, {"block_size": 64},
        {"max_num_batched_tokens": max(2, longest // 3)}, {"graphs": False}, {"graphs": False, "max_num_seqs": 7},
    ]  # fmt: skip
    first = ""
    for change in changed if bench.sizes.check.has_demo_model else changed[:3]:
        about = {"check": "bytes", "model": subject.name, **usual, **change}
        row = bench.attempt(about, _digest, subject, about)
        first = first or row.get("sha256", "")
        yield {**row, "is_right": row["sha256"] == first} if "sha256" in row else row


def _digest(subject: Subject, setting: dict[str, Any]) -> Row:
    names = ("max_num_seqs", "max_num_batched_tokens", "block_size")
    limits = EngineOptions(**{name: setting[name] for name in names})
    plain = greedy(subject.output_tokens)
    samplings = (plain, replace(plain, temperature=1.0, top_p=0.9), replace(plain, temperature=0.7, logprobs=2))
    with Store.open(subject.store) as store:
        model = Model(store, Way(graphs=setting["graphs"]), subject.max_len, subject.tokenizer)
        with closing(model.replica(limits)) as replica:
            choices = model.generate_each(replica, subject.prompts, samplings).choices
    return {"sha256": hashlib.sha256(digest_bytes(choices)).hexdigest()}
