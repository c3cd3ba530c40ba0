import json

import pytest

from hpcinfer.config import ModelConfig, RopeScaling
from hpcinfer.errors import ModelError
from hpcinfer.weights.families import FAMILIES, parse_config, read_config

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 1024,
}  # fmt: skip


def parse(architecture="LlamaForCausalLM", generation=None, **values):
    return parse_config({"architectures": [architecture], **SHAPE, **values}, generation or {})


def test_config_survives_json():
    config = parse(sliding_window=8, eos_token_id=[3, 4], rope_scaling={"type": "linear", "factor": 2})
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_families_differ_in_biases_norms_and_windows():
    qwen2, qwen3 = parse("Qwen2ForCausalLM"), parse("Qwen3ForCausalLM")
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm, qwen2.head_size) == (True, False, False, 16)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm, qwen3.head_size) == (False, False, True, 128)
    llama = parse(attention_bias=True, mlp_bias=True, sliding_window=8)
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias, llama.windows) == (True, True, True, (0, 0, 0, 0))
    assert parse("MistralForCausalLM", sliding_window=12, attention_bias=True).windows == (12,) * 4
    assert parse("MistralForCausalLM", sliding_window=None).windows == (0,) * 4


def test_qwen_windows_begin_after_max_window_layers():
    options = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3}
    assert parse("Qwen2ForCausalLM", **options).windows == (0, 0, 0, 32)
    assert parse("Qwen2ForCausalLM", **{**options, "use_sliding_window": False}).windows == (0,) * 4
    kinds = ["sliding_attention", "full_attention"] * 2
    assert parse("Qwen3ForCausalLM", **options, layer_types=kinds).windows == (32, 0, 32, 0)


def test_eos_ids_of_both_files_are_joined():
    assert parse(eos_token_id=7, generation={"eos_token_id": [9, 7]}).eos_token_ids == (7, 9)
    assert parse("Qwen2ForCausalLM", eos_token_id=None).eos_token_ids == ()
    assert (parse().bos_token_id, parse().eos_token_ids) == (1, (2,))


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind_key", ["type", "rope_type"])
def test_both_spellings_of_rope_scaling_are_read(key, kind_key):
    values = {kind_key: "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
              "original_max_position_embeddings": 512}  # fmt: skip
    beside = {"rope_theta": 5e5} if key == "rope_scaling" else {}
    inside = {"rope_theta": 5e5} if key == "rope_parameters" else {}
    config = parse(**{key: {**values, **inside}}, **beside)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 512)


YARNS = [
    {"factor": 4.0, "original_max_position_embeddings": 256},
    {"factor": 4.0, "attention_factor": 0.7, "beta_fast": 16, "beta_slow": 2},
    {"factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.3, "original_max_position_embeddings": 128},
    {"factor": 8.0, "mscale": 0.7, "original_max_position_embeddings": 128},
    {"factor": 1.0},
]


@pytest.mark.parametrize("yarn", YARNS)
def test_yarn_attention_factor_is_transformers(yarn):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = LlamaConfig(**SHAPE, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, **yarn})
    _, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    scaling = parse(rope_scaling={"rope_type": "yarn", **yarn}).rope_scaling
    assert scaling.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    assert scaling.original_max_position_embeddings == yarn.get("original_max_position_embeddings", 1024)


REFUSED = [
    ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
    ({"architectures": []}, "none named"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "truncate": False}}, "truncate"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "low_freq_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ({"num_attention_heads": 5, "num_key_value_heads": 1}, "hidden_size=64"),
    ({"head_dim": 15}, "head_dim=15"), ({"head_dim": 2048}, "head_dim=2048"),
    ({"vocab_size": -1}, "vocab_size=-1"),
    ({"architectures": ["Qwen2ForCausalLM"], "layer_types": ["sliding_attention"] * 4}, "layer_types"),
]


@pytest.mark.parametrize(("values", "named"), REFUSED)
def test_what_is_not_computed_is_refused_by_name(values, named):
    with pytest.raises(ModelError, match=named):
        parse(**values)


def test_refusal_lists_the_supported_architectures():
    with pytest.raises(ModelError) as refusal:
        parse(architectures=["T5"])
    assert all(name in str(refusal.value) for name in FAMILIES)


@pytest.mark.parametrize(
    "text", ["{", "[1]", "{}", '{"architectures": ["LlamaForCausalLM"], "hidden_size": "x"}', "\xff"]
)
def test_malformed_config_is_a_model_error_that_names_the_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path)


def test_missing_config_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_config(tmp_path)
