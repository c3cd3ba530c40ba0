"""What was prepared can be given back: a rank that refills takes it from memory."""

import numpy as np
import pytest
from random_weights import DTYPES, random_weight
from stages import native_was_built

from hpcinfer.config import RopeScaling
from hpcinfer.dtypes import int4_codes, to_float32
from hpcinfer.kernels import create_kernels
from hpcinfer.kernels.protocol import AttentionShape, AttentionWeights, HeadLayout, Linear, MlpWeights

HIDDEN, WIDTH, HEAD = 72, 40, 24

native = pytest.mark.skipif(not native_was_built(), reason="the native kernels were not built")


def make(dtype):
    """The weights of a layer and a head, by name."""
    random = np.random.default_rng(3)
    shapes = {"q_proj": (3, 2 * HEAD, HIDDEN), "k_proj": (2, HEAD, HIDDEN), "v_proj": (2, HEAD, HIDDEN),
              "o_proj": (3, HIDDEN, 2 * HEAD), "gate_proj": (3, WIDTH, HIDDEN), "up_proj": (3, WIDTH, HIDDEN),
              "down_proj": (3, HIDDEN, WIDTH), "lm_head": (4, 35, HIDDEN), "embed_tokens": (4, 35, HIDDEN)}  # fmt: skip
    return {name: random_weight(random, dtype, *shape) for name, shape in shapes.items()}


def prepare(kernels, weights):
    """Prepared objects by the names of their parameters."""
    norm = np.ones(HIDDEN, np.float32)
    q, k, v, gate, up = (Linear(weights[f"{name}_proj"]) for name in ("q", "k", "v", "gate", "up"))
    layout = HeadLayout(HEAD, 2, (2, 2, 1), (0, 0, 0, 1, 1))
    shape = AttentionShape(layout, 1e-5, kernels.rope_table(8, HEAD, 1e4, RopeScaling()))
    attention = kernels.prepare_attention(AttentionWeights(norm, q, k, v, weights["o_proj"]), shape)
    mlp = kernels.prepare_mlp(MlpWeights(norm, gate, up, weights["down_proj"]), 1e-5)
    return {**dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), attention),
            **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), mlp),
            "lm_head": kernels.prepare_head(norm, weights["lm_head"], 1e-5),
            "embed_tokens": kernels.prepare_table(weights["embed_tokens"])}  # fmt: skip


@native
@pytest.mark.parametrize("units", [range(3), range(1, 3), range(1, 2), range(0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_units_come_back_as_they_were(dtype, units):
    kernels, weights = create_kernels("native"), make(dtype)
    for name, prepared in prepare(kernels, weights).items():
        weight, wanted = weights[name], units if name not in ("k_proj", "v_proj") else range(min(2, units.stop))
        found = kernels.give_back(prepared, name, wanted)
        if dtype == "float8_e4m3" or (dtype == "int4" and name == "embed_tokens"):
            assert found is None  # it is kept as float32
            continue
        rows = slice(wanted.start, wanted.stop)
        if dtype == "int4":
            num_in = HIDDEN if weight.values.shape[-1] * 2 >= HIDDEN else weight.values.shape[-1] * 2
            num_in = {"o_proj": 2 * HEAD, "down_proj": WIDTH}.get(name, num_in)
            assert (int4_codes(found.values)[..., :num_in] == int4_codes(weight.values[rows])[..., :num_in]).all()
        elif dtype == "int8":
            assert (found.values == weight.values[rows]).all()
        else:
            expected = to_float32(weight.values[rows], weight.dtype)
            assert (to_float32(found.values, found.dtype) == expected).all()
        if weight.scales is not None:
            assert (found.scales == weight.scales[rows]).all()


@native
@pytest.mark.parametrize("dtype", DTYPES)
def test_some_outputs_of_units_come_back(dtype):
    kernels = create_kernels("native")
    for name, prepared in prepare(kernels, make(dtype)).items():
        whole = kernels.give_back(prepared, name, range(1, 2))
        found = kernels.give_back(prepared, name, range(1, 2), range(7, 23))
        if whole is None:
            assert found is None
            continue
        assert (found.values == whole.values[:, 7:23]).all() and found.values.shape[1] == 16
        if whole.scales is not None:
            assert (found.scales == whole.scales[:, 7:23]).all()


def test_reference_kernels_keep_nothing_to_give_back():
    kernels = create_kernels("reference")
    assert kernels.give_back(object(), "q_proj", range(1)) is None
