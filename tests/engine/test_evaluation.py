import math

import numpy as np
import pytest
import torch
from models import make_tiny_model
from thread_group import run_ranks
from transformers import AutoModelForCausalLM

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.config import EngineOptions
from hpcinfer.data.tokenizer import Tokenizer
from hpcinfer.engine.evaluation import Likelihood, measure
from hpcinfer.engine.options import ReplicaOptions
from hpcinfer.engine.replica import build_replica, join_replica
from hpcinfer.kernels import create_kernels
from hpcinfer.partition.mesh import Mesh
from hpcinfer.weights.conversion import convert
from hpcinfer.weights.reader import Store

WINDOWS = [tuple(np.random.default_rng(i).integers(0, 300, 2 + 9 * i).tolist()) for i in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    convert(make_tiny_model(folder / "model", "qwen3", num_hidden_layers=2), folder / "store", SerialGroup())
    return folder


def likelihood(folder, group, dp=1, **engine):
    """Measure on the replicas of a group of threads; each rank has its own kernels."""
    store, mesh = Store.open(folder / "store"), Mesh(dp=dp, pp=1, tp=1)
    options = ReplicaOptions(EngineOptions(**engine), "float32", 64, seed=0)
    replica = build_replica(join_replica(group, mesh), mesh, store, create_kernels("reference"), options)
    return measure(group, mesh, replica, Tokenizer(store.tokenizer_files), WINDOWS)


def test_nats_are_those_of_transformers(model):
    theirs = AutoModelForCausalLM.from_pretrained(model / "model", dtype=torch.float32).eval()
    nats = 0.0
    with torch.no_grad():
        for window in WINDOWS:
            scores = torch.log_softmax(theirs(torch.tensor([window])).logits[0, :-1].double(), -1)
            nats -= float(scores.gather(1, torch.tensor(window[1:])[:, None]).sum())
    found = likelihood(model, SerialGroup())
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.num_tokens == sum(map(len, WINDOWS)) - len(WINDOWS) and found.num_windows == len(WINDOWS)
    assert found.perplexity == pytest.approx(math.exp(nats / found.num_tokens), rel=1e-4)


@pytest.mark.parametrize("engine", [{"max_num_seqs": 2}, {"max_num_batched_tokens": 7}, {"block_size": 8}])
def test_batches_change_no_bit(model, engine):
    assert likelihood(model, SerialGroup(), **engine) == likelihood(model, SerialGroup())


def test_replicas_share_the_windows_and_change_no_bit(model):
    assert run_ranks(2, lambda group: likelihood(model, group, dp=2)) == [likelihood(model, SerialGroup())] * 2


def test_bytes_are_those_of_the_scored_tokens(model):
    tokenizer = Tokenizer(Store.open(model / "store").tokenizer_files)
    expected = sum(len(tokenizer.token_bytes(token)) for window in WINDOWS for token in window[1:])
    assert likelihood(model, SerialGroup()).num_bytes == expected


def test_measures_follow_from_nats():
    found = Likelihood(nats=20 * math.log(2), num_tokens=10, num_bytes=40, num_windows=1)
    assert found.nats_per_token == pytest.approx(2 * math.log(2)) and found.perplexity == pytest.approx(4)
    assert found.bits_per_byte == pytest.approx(0.5)
    assert math.isnan(Likelihood(math.nan, 10, 40, 1).perplexity)
    assert Likelihood(1e6, 10, 0, 1).perplexity == Likelihood(1e6, 10, 0, 1).bits_per_byte == math.inf
