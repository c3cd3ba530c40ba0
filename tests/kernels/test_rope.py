import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hpcinfer.config import RopeScaling
from hpcinfer.errors import ModelError
from hpcinfer.kernels.rope import rope_table, sin_cos

LENGTH = 2048
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 512}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": 1.1,
        "beta_fast": 32.0, "beta_slow": 1.0}  # fmt: skip


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 3.0}, LLAMA3, YARN],
                         ids=lambda scaling: scaling["rope_type"])  # fmt: skip
@pytest.mark.parametrize("head_size", [16, 64, 80])
def test_tables_are_those_of_transformers(scaling, head_size):
    import torch

    config = LlamaConfig(hidden_size=4 * head_size, num_attention_heads=4, max_position_embeddings=LENGTH,
                         rope_parameters={"rope_theta": 10000.0, **scaling})  # fmt: skip
    cosine, sine = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(LENGTH)[None])
    table = rope_table(LENGTH, head_size, 10000.0, RopeScaling(**scaling))
    half = head_size // 2
    # An ulp of a frequency is up to 2048 * 6e-8 radians at the last position.
    np.testing.assert_allclose(table[:, 0], cosine[0, :, :half], atol=4e-4)
    np.testing.assert_allclose(table[:, 1], sine[0, :, :half], atol=4e-4)
    np.testing.assert_allclose(table[:100, 1], sine[0, :100, :half], atol=2e-5)


def test_a_row_does_not_depend_on_the_length_of_the_table():
    scaling = RopeScaling()
    long = rope_table(5001, 16, 10000.0, scaling)
    assert all((rope_table(n, 16, 10000.0, scaling) == long[:n]).all() for n in (1, 7, 4096, 4097))


def test_sine_and_cosine_round_from_float64():
    angles = (np.random.default_rng(0).random(100_000) * 131072).astype(np.float32)
    sine, cosine = sin_cos(angles)
    np.testing.assert_array_max_ulp(sine, np.sin(angles.astype(np.float64)).astype(np.float32), 1)
    np.testing.assert_array_max_ulp(cosine, np.cos(angles.astype(np.float64)).astype(np.float32), 1)


def test_an_unknown_scaling_is_named():
    with pytest.raises(ModelError, match="longrope"):
        rope_table(4, 16, 10000.0, RopeScaling("longrope"))
