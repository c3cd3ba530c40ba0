"""A tiny random model, its store and its tokenizer, made once per session."""

import pytest
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
