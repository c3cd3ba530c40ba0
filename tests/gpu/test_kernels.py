"""Models with tiles as large ones have: near the reference kernels, and the same bits every time."""

import numpy as np
import pytest
from gpu_replicas import RandomStore, generate, llama, log_probabilities, random_prompts

from hpcinfer.config import SamplingParams
from hpcinfer.kernels import create_kernels

CONFIG = llama()
LENGTHS = (1300, 200, 65, 7, 2)  # the first has more than one split of keys
# of log-probabilities, root of the mean square; the reference multiplies in float32
TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 6e-3, "int8": 6e-2, "int4": 6e-2, "float8_e4m3": 0.15}
CACHE_TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 6e-3, "int8": 4e-2, "fp8": 0.15}
CASES = [
    *((dtype, "bfloat16" if dtype != "float32" else "float32", reproducible)
      for dtype in TOLERANCE for reproducible in (True, False)),
    *(("bfloat16", cache, True) for cache in CACHE_TOLERANCE if cache != "bfloat16"),
]  # fmt: skip


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(CONFIG, LENGTHS)


@pytest.fixture(scope="module")
def expected(prompts):
    """What the reference kernels say of a type of weights, asked once."""
    answers = {}

    def ask(dtype):
        if dtype not in answers:
            answers[dtype] = log_probabilities(create_kernels("reference"), RandomStore(CONFIG, dtype), prompts)
        return answers[dtype]

    return ask


@pytest.mark.time_limit(300)
@pytest.mark.parametrize("dtype, cache, reproducible", CASES)
def test_log_probabilities_are_near_the_reference_s(make, prompts, expected, dtype, cache, reproducible):
    kernels = make(reproducible=reproducible, dtype="auto")
    found = log_probabilities(kernels, RandomStore(CONFIG, dtype), prompts, cache=cache, max_num_batched_tokens=512)
    error = np.sqrt(np.mean((found - expected(dtype)) ** 2))
    assert error <= max(TOLERANCE[dtype], CACHE_TOLERANCE[cache])
    assert expected(dtype).std() > 0.5  # random answers would be off by more than any tolerance


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4", "float8_e4m3"])
def test_every_run_and_every_batch_has_the_same_bits(make, prompts, dtype):
    store, kernels = RandomStore(CONFIG, dtype), make()
    first = log_probabilities(kernels, store, prompts, cache="bfloat16")
    for limits in ({}, {}, {"max_num_seqs": 1}, {"max_num_batched_tokens": 100}, {"block_size": 64}):
        assert log_probabilities(kernels, store, prompts, cache="bfloat16", **limits).tobytes() == first.tobytes()


def test_recorded_steps_give_the_tokens_of_launched_ones(make):
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    prompts = random_prompts(CONFIG, (1000, 30, 5, 400, 1, 64, 3))  # the first crosses a split while it decodes
    store = RandomStore(CONFIG, "bfloat16")
    choices = [
        generate(make(graphs=graphs), store, prompts, params, cache="bfloat16",
                 max_num_seqs=5)
        for graphs in (True, False)
    ]  # fmt: skip
    assert [choice.token_ids for choice in choices[0]] == [choice.token_ids for choice in choices[1]]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4", "float8_e4m3"])
def test_a_token_does_not_depend_on_its_company(make, dtype):
    params = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=12, ignore_eos=True)
    prompts = random_prompts(CONFIG, range(1, 70))
    store, kernels = RandomStore(CONFIG, dtype), make()
    together = generate(kernels, store, prompts, params, cache="bfloat16", max_num_seqs=64)
    for size in (1, 7):
        few = generate(kernels, store, prompts[:20], params, cache="bfloat16", max_num_seqs=size)
        assert few == together[:20], f"{size = }"
