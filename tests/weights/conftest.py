"""Tiny models and their stores, made once per session. Tests that damage a store copy it first."""

import shutil

import pytest
from models import make_tiny_model

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.weights.conversion import convert


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A sharded bfloat16 Qwen2 with 14/2 heads and widths that 8 does not divide."""
    folder = tmp_path_factory.mktemp("models") / "tiny-qwen2"
    return make_tiny_model(folder, "qwen2", dtype="bfloat16", shards=True, hidden_size=56, intermediate_size=100,
                           num_attention_heads=14, num_hidden_layers=2)  # fmt: skip


@pytest.fixture(scope="session")
def tiny_store(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "tiny.store"
    convert(tiny_model, path, SerialGroup())
    return path


@pytest.fixture
def model_copy(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def store_copy(tiny_store, tmp_path):
    return shutil.copytree(tiny_store, tmp_path / "copy.store")
