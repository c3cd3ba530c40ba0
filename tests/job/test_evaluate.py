"""`hpcinfer evaluate` as a user starts it, and what quantising the demo model costs."""

import json
import math
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from golden import DEMO_MODEL, EXAMPLES, assert_refused
from jobs import run_job
from models import make_tiny_model

from hpcinfer.engine.evaluation import Likelihood
from hpcinfer.evaluate import _as_json, _Result

TEXT = "Return a new string.\n\nIf the argument is not given, the list of files is read line by line.\n" * 3
TEXT_BYTES = 24_000  # of the held-out documents
TIMEOUT_S = 100


def evaluate(ranks: int, *flags: str | os.PathLike[str]) -> dict[str, Any]:
    """Evaluate and read what is printed."""
    run = run_job(ranks, *flags, "--json", module="hpcinfer.evaluate", timeout=TIMEOUT_S)
    assert run.rc == 0, run.stderr
    return json.loads(run.stdout)


def convert(store: Path, *flags: str | os.PathLike[str]) -> Path:
    """Make a store of the demo model."""
    run = run_job(0, DEMO_MODEL, store, *flags, module="hpcinfer.convert", timeout=TIMEOUT_S)
    assert run.rc == 0, run.stderr
    return store


@pytest.fixture(scope="module")
def documents() -> tuple[str, str]:
    """Documents that the demo model was trained on, and such that it was not."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        corpus = runpy.run_path(str(EXAMPLES / "demo_corpus.py"))["load_corpus"]()
    finally:
        sys.path.remove(str(EXAMPLES))
    known = [document for document in corpus if not document.is_held_out][::40]
    held_out = [document for document in corpus if document.is_held_out]
    texts = ("\n\n".join(f"{each.name}\n\n{each.text}" for each in each_kind) for each_kind in (known, held_out))
    return tuple(text.encode()[:TEXT_BYTES].decode(errors="ignore") for text in texts)  # type: ignore[return-value]


@pytest.mark.parametrize("quantize", ["none", "fp8", "int4"])
def test_ranks_change_no_bit(tmp_path: Path, quantize: str) -> None:
    store = convert(tmp_path / "store", "--quantize", quantize)
    (tmp_path / "text").write_text(TEXT)
    flags = ("--model", store, "--text", tmp_path / "text", "--max-model-len", "50")
    alone = evaluate(0, *flags)
    assert alone["models"][0]["quantization"] == quantize and alone["models"][0]["num_bytes"] == len(TEXT)
    for mesh in ("-tp", "-pp", "-dp"):
        assert evaluate(2, *flags, mesh, "2") == alone


def test_limits_of_quantised_stores(tmp_path: Path, documents: tuple[str, str]) -> None:
    (tmp_path / "calibration.txt").write_text(documents[0])
    (tmp_path / "text.txt").write_text(documents[1])
    stores = {
        "int8": convert(tmp_path / "int8", "--quantize", "int8"),
        "fp8": convert(tmp_path / "fp8", "--quantize", "fp8"),
        "int4": convert(tmp_path / "int4", "--quantize", "int4"),
        "calibrated": convert(
            tmp_path / "calibrated", "--quantize", "int4", "--calibration", tmp_path / "calibration.txt"
        ),
    }
    plain = convert(tmp_path / "plain")
    losses = {
        name: evaluate(0, "--model", plain, "--compare", store, "--text", tmp_path / "text.txt")["difference_percent"]
        for name, store in stores.items()
    }
    assert abs(losses["int8"]) < 0.5 and abs(losses["fp8"]) < 1.5
    assert losses["calibrated"] < losses["int4"] < 4


def test_lines_name_the_models_and_the_difference(tmp_path: Path) -> None:
    stores = convert(tmp_path / "a"), convert(tmp_path / "b", "--quantize", "int8")
    (tmp_path / "text").write_text(TEXT)
    flags = ("--model", stores[0], "--compare", stores[1], "--text", tmp_path / "text")
    run = run_job(0, *flags, module="hpcinfer.evaluate")
    assert run.rc == 0, run.stderr
    for words in (f"{stores[0]}\n", f"{stores[1]} (int8)\n", "perplexity", "difference", "% in perplexity"):
        assert words in run.stdout


def test_wrong_jobs_are_refused_once(tmp_path: Path) -> None:
    store, text = convert(tmp_path / "store"), tmp_path / "text"
    text.write_text(TEXT)
    other = tmp_path / "other"
    model = make_tiny_model(tmp_path / "model", "llama")
    assert run_job(0, model, other, module="hpcinfer.convert").rc == 0
    refused = [
        (("--text", text, "--compare", other), "another tokenizer.json"),
        (("--text", tmp_path / "none"), "cannot be read"),
        (("--text", text, "--max-model-len", "1"), "windows of at least 2 tokens"),
        (("--text", text, "--max-model-len", "5000"), "--max-model-len 5000"),
        (("--text", text, "--max-num-batched-tokens", "0"), "--max-num-batched-tokens 0"),
    ]
    for flags, words in refused:
        run = run_job(2, "--model", store, *flags, "-tp", "2", module="hpcinfer.evaluate")
        assert_refused(run, "ConfigError", words)


def test_json_has_no_number_that_json_does_not_know() -> None:
    likelihoods = Likelihood(1.0, 10, 40, 1), Likelihood(math.nan, 10, 40, 1), Likelihood(math.inf, 10, 40, 1)
    for second in likelihoods[1:]:
        results = [_Result("a", "", "none", likelihoods[0]), _Result("b", "", "none", second)]
        found = json.loads(json.dumps(_as_json(results), allow_nan=False))
        assert found["difference_percent"] is None and found["models"][0]["nats"] == 1
        assert [found["models"][1][name] for name in ("nats", "nats_per_token", "perplexity")] == [None] * 3


@pytest.mark.parametrize(("content", "words"), [(None, "cannot be read"), ("", "0 tokens")])
def test_calibration_without_a_text_is_refused_before_anything_is_written(
    tmp_path: Path, content: str | None, words: str
) -> None:
    text = tmp_path / "text"
    if content is not None:
        text.write_text(content)
    flags = ("--quantize", "int4", "--calibration", text)
    run = run_job(2, DEMO_MODEL, tmp_path / "new" / "store", *flags, module="hpcinfer.convert")
    assert_refused(run, "ConfigError", words, f"where: {text}", "hint: ")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("quantize", ["none", "int8", "fp8"])
def test_calibration_belongs_to_int4(tmp_path: Path, quantize: str) -> None:
    (tmp_path / "text").write_text(TEXT)
    flags = ("--quantize", quantize, "--calibration", tmp_path / "text")
    run = run_job(2, DEMO_MODEL, tmp_path / "store", *flags, module="hpcinfer.convert")
    assert_refused(run, "ConfigError", "--quantize int4")


def test_ranks_share_the_calibration_and_change_no_byte(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT * 40)
    flags = (DEMO_MODEL, tmp_path / "store", "--quantize", "int4", "--calibration", tmp_path / "text")
    alone = run_job(0, *flags, module="hpcinfer.convert")
    (tmp_path / "store").rename(tmp_path / "alone")
    shared = run_job(2, *flags, module="hpcinfer.convert")
    assert alone.rc == shared.rc == 0, alone.stderr + shared.stderr
    assert alone.stdout == shared.stdout
