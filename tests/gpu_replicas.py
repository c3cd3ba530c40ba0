"""Replicas of random models in this process, on the kernels of a GPU or on the reference kernels."""

import zlib
from contextlib import closing

import numpy as np
from models import tiny_tokenizer
from random_weights import random_weight

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.config import EngineOptions, ModelConfig, SamplingParams
from hpcinfer.data.tokenizer import Tokenizer
from hpcinfer.engine.frontend import ListFrontend
from hpcinfer.engine.leader import Leader
from hpcinfer.engine.outputs import Outputs
from hpcinfer.engine.replica import ReplicaOptions, build_replica
from hpcinfer.engine.request import Request
from hpcinfer.kernels.protocol import Weight
from hpcinfer.partition.mesh import Mesh
from hpcinfer.weights.schema import param_specs


def llama(hidden=1024, head_size=128, num_layers=2, vocab_size=5000):
    """Describe a small model whose layers have the tiles of a large one: four query heads to a KV head."""
    return ModelConfig(
        architecture="LlamaForCausalLM", hidden_size=hidden, num_layers=num_layers, num_heads=hidden // head_size,
        num_kv_heads=max(1, hidden // head_size // 4), head_size=head_size, intermediate_size=3 * hidden,
        vocab_size=vocab_size, max_position_embeddings=2048, rms_norm_eps=1e-5, rope_theta=10000.0,
    )  # fmt: skip


class RandomStore:
    """A `WeightSource` of random weights of one type, the same in every process."""

    def __init__(self, config, dtype, grains=8):
        self.config, self.grains, self._dtype = config, grains, dtype
        self.specs = {spec.name: spec for spec in param_specs(config, grains)}
        self._weights = {}

    def read(self, name, units=None):
        """Norms: not quite ones."""
        return 1 + 0.1 * self._random(name).standard_normal(self.specs[name].shape, np.float32), "float32"

    def read_weight(self, name, units=None):
        """Values, type and scales of some units; tables of quantised types are int8, as in a store."""
        if name not in self._weights:
            is_table = name.split(".")[0] in ("embed_tokens", "lm_head")
            is_plain = self._dtype in ("float32", "bfloat16", "float16")
            dtype = "int8" if is_table and not is_plain else self._dtype
            self._weights[name] = random_weight(self._random(name), dtype, *self.specs[name].shape)
        whole = self._weights[name]
        units = range(len(whole.values)) if units is None else units
        part = slice(units.start, units.stop)
        return Weight(whole.values[part], whole.dtype, None if whole.scales is None else whole.scales[part])

    def _random(self, name):
        return np.random.default_rng(zlib.crc32(name.encode()))


def random_prompts(config, lengths):
    """Prompts of these lengths that share nothing."""
    random = np.random.default_rng(1)
    return [random.integers(0, config.vocab_size, length).tolist() for length in lengths]


def generate(kernels, store, prompts, params, *, dtype="auto", cache="float32", **limits):
    """What an engine makes of prompts: a choice for each."""
    max_len = max(map(len, prompts)) + params.max_tokens
    options = ReplicaOptions(EngineOptions(**limits), dtype, max_len, seed=3, cache_dtype=cache)
    with closing(build_replica(SerialGroup(), Mesh(1, 1, 1), store, kernels, options)) as replica:
        frontend = ListFrontend([Request(row, tuple(ids), params) for row, ids in enumerate(prompts)])
        tokenizer = Tokenizer({"tokenizer.json": tiny_tokenizer(adds_bos=False)[0].encode()})
        replica.engine.run(Leader(replica.scheduler, Outputs(tokenizer, ()), frontend, replica.runner))
    return [frontend.finished[row][0] for row in range(len(prompts))]


def log_probabilities(kernels, store, prompts, **options):
    """Log-probabilities of the tokens of prompts but the first of each, one after another."""
    params = SamplingParams(temperature=0.0, max_tokens=1, echo=True, logprobs=0, ignore_eos=True)
    choices = generate(kernels, store, prompts, params, **options)
    return np.array([score.logprob for choice in choices for score in choice.prompt_logprobs[1:]])
