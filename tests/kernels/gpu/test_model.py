"""A whole tiny model on the kernels of GPUs: generation as transformers does it, and one answer."""

import threading

import numpy as np
import pytest
import stages
import torch
from models import make_tiny_model
from recordings import Again

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.config import EngineOptions, SamplingParams
from hpcinfer.data.tokenizer import Tokenizer
from hpcinfer.engine.frontend import ListFrontend
from hpcinfer.engine.leader import Leader
from hpcinfer.engine.options import ReplicaOptions
from hpcinfer.engine.outputs import Outputs
from hpcinfer.engine.replica import build_replica
from hpcinfer.engine.request import Request
from hpcinfer.kernels import create_kernels
from hpcinfer.partition.mesh import Mesh
from hpcinfer.weights.conversion import Recipe, convert
from hpcinfer.weights.reader import Store

PROMPTS = [np.random.default_rng(i).integers(4, 390, length).tolist() for i, length in enumerate((3, 18, 1))]
NUM_TOKENS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_model(folder / "model", "qwen3", num_hidden_layers=2, hidden_size=32, intermediate_size=64)
    convert(folder / "model", folder / "store", SerialGroup(), Recipe(grains=4))
    return folder


def generate(kernels, folder, params, **limits):
    """What an engine makes of the prompts, all sampled in one way or each in its own: choices by row."""
    params = params if isinstance(params, list) else [params] * len(PROMPTS)
    with Store.open(folder / "store") as store:
        options = ReplicaOptions(EngineOptions(kv_cache_memory="1 MB", **limits), "float32", 64, seed=3)
        replica = build_replica(SerialGroup(), Mesh(1, 1, 1), store, kernels, options)
        prompts = zip(PROMPTS, params, strict=True)
        frontend = ListFrontend([Request(row, tuple(ids), each) for row, (ids, each) in enumerate(prompts)])
        outputs = Outputs(Tokenizer(store.tokenizer_files), replica.runner.eos_ids)
        replica.engine.run(Leader(replica.scheduler, outputs, frontend, replica.runner))
    return frontend.finished


@pytest.mark.parametrize("reproducible", [True, False])
def test_greedy_tokens_are_those_of_transformers(make, folder, reproducible):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    found = generate(make(reproducible=reproducible), folder, params)
    for row, ids in enumerate(PROMPTS):
        expected = model.generate(torch.tensor([ids]), max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS,
                                  do_sample=False)  # fmt: skip
        assert list(found[row][0].token_ids) == expected[0, len(ids) :].tolist()


def test_no_limit_changes_a_sampled_token(make, folder):
    params = SamplingParams(max_tokens=2, temperature=1.0, logprobs=1)
    found = generate(make(dtype="float16"), folder, params, max_num_batched_tokens=9, block_size=8)
    assert found == generate(make(dtype="float16"), folder, params)


def test_tokens_are_drawn_as_on_cpus_from_several_batches_in_flight(make, folder):
    kinds = [{"top_k": 20, "top_p": 0.9}, {"min_p": 0.02, "repetition_penalty": 1.3, "logit_bias": ((7, 2.0),)},
             {"temperature": 0.0, "frequency_penalty": 1.5, "echo": True, "logprobs": 2}]  # fmt: skip
    params = [SamplingParams(max_tokens=4, ignore_eos=True, seed=11, **kind) for kind in kinds]
    found = generate(make(), folder, params, micro_batches=2)
    expected = generate(create_kernels("reference"), folder, params)
    for row in range(len(PROMPTS)):
        assert found[row][0].token_ids == expected[row][0].token_ids
    found, expected = ((*each[2][0].prompt_logprobs[1:], *each[2][0].logprobs) for each in (found, expected))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [token_id for token_id, _ in ours.top] == [token_id for token_id, _ in theirs.top]


@pytest.mark.parametrize("is_recorded", [False, True])
def test_tokens_that_the_device_alone_knows_are_drawn_as_on_cpus(make, folder, is_recorded, monkeypatch):
    from hpcinfer.kernels.gpu import gpu

    again, ahead = Again(), []
    monkeypatch.setattr(gpu, "graphs_of", lambda device: (lambda: again) if is_recorded else None)
    kernels = make()
    run_layers = kernels.run_layers

    def note(step, *args, **kwargs):
        ahead.append((len(step.token_ids), int((step.token_ids < 0).sum())))
        return run_layers(step, *args, **kwargs)

    monkeypatch.setattr(kernels, "run_layers", note)
    kinds = [{"temperature": 0.0}, {"top_k": 20, "top_p": 0.9, "logprobs": 1}, {"temperature": 0.7, "min_tokens": 4}]
    params = [SamplingParams(max_tokens=5, ignore_eos=True, seed=11, **kind) for kind in kinds]
    found = generate(kernels, folder, params, micro_batches=2)
    assert ahead == [(sum(map(len, PROMPTS)), 0), *[(3, 3)] * 4]
    assert again.num_launched == (3 if is_recorded else 0)
    expected = generate(create_kernels("reference"), folder, params)
    assert [found[row][0].token_ids for row in range(3)] == [expected[row][0].token_ids for row in range(3)]


class OneAtATime:
    """Kernels of one of several threads: the interpreter is not made for more than one."""

    lock = threading.RLock()

    def __init__(self, kernels):
        self._kernels = kernels

    def __getattr__(self, name):
        def call(*args, **kwargs):
            with self.lock:
                return getattr(self._kernels, name)(*args, **kwargs)

        return call


def test_logits_have_the_same_bits_on_every_mesh(make, folder, device, monkeypatch):
    if device.type != "cpu":
        pytest.skip("ranks that are threads exchange what is in the host's memory")
    monkeypatch.setattr(stages, "create_kernels", lambda *args, **kwargs: OneAtATime(make()))
    monkeypatch.setattr(stages, "poison", lambda cache, num_blocks: [part.fill_(torch.nan) for part in cache[:2]])
    store = stages.MemoryStore(folder / "model", grains=4)
    prompts = [np.array(ids) for ids in PROMPTS[:2]]
    types = {"dtype": "bfloat16", "cache": "bfloat16"}
    whole = stages.run_replica(store, prompts, **types)
    for tp, chunk in ((2, 1000), (3, 12)):
        found = stages.run_replica(store, prompts, **types, tp=tp, chunk=chunk, block_size=7)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(found, whole, strict=True)), f"{tp = }"
