"""A tiny random model, its store and its tokenizer, made once per session."""

import pytest
from engine_runs import REQUESTS, run_engine
from models import make_tiny_model

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.data.tokenizer import Tokenizer
from hpcinfer.kernels import create_kernels
from hpcinfer.weights.conversion import convert
from hpcinfer.weights.reader import Store


@pytest.fixture(scope="session")
def kernels():
    return create_kernels("reference")


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    convert(make_tiny_model(folder / "model", "llama", num_hidden_layers=2), folder / "tiny.store", SerialGroup())
    with Store.open(folder / "tiny.store") as store:
        yield store


@pytest.fixture(scope="session")
def tokenizer(tiny_store):
    return Tokenizer(tiny_store.tokenizer_files)


@pytest.fixture(scope="session")
def expected(tiny_store, tokenizer):
    """One sequence at a time, whole prompts: nothing shared, cut or preempted."""
    runs = [run_engine(tiny_store, tokenizer, [each], max_num_seqs=1) for each in REQUESTS]
    assert not any(run.counts[name] for run in runs for name in ("preemptions", "chunks", "mixed_batches"))
    return {row: choices for run in runs for row, choices in run.finished.items()}
