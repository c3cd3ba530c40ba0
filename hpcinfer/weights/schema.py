"""The parameters of a model as the store names and shapes them: first axis = units (grains, KV heads, or 1).

Shape letters: G grains, K KV heads, H head size, D hidden size, Q head columns of the largest grain, F padded MLP
grain, V padded vocabulary grain. What is padded is zero, and always at the end of a unit.
"""

from typing import NamedTuple

from hpcinfer.config import ModelConfig
from hpcinfer.dtypes import GROUP
from hpcinfer.partition.grains import grain_ranges, padded_grain

UNQUANTISED = "none"
QUANTISED_TYPES = {"int8": "int8", "fp8": "float8_e4m3", "int4": "int4"}  # of matrices, by kind of store
QUERY_HEADS, KV_HEADS, MLP, VOCAB, WHOLE = "query_heads", "kv_heads", "mlp", "vocab", "whole"
_TABLES = ("embed_tokens.weight", "lm_head.weight")
_MATRICES = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down"))
_BLOCKS = {**dict.fromkeys("qkvo", "self_attn"), **dict.fromkeys(("gate", "up", "down"), "mlp")}


class ParamSpec(NamedTuple):
    """One stored parameter."""

    name: str
    axis: str  # what the units are: query_heads, kv_heads, mlp, vocab (grains or heads of it) or whole (one unit)
    shape: tuple[int, ...]  # as stored; the first axis counts units


def param_specs(config: ModelConfig, grains: int) -> tuple[ParamSpec, ...]:
    """List every parameter of a model: the outer ones, then those of each layer. Not collective."""
    layers = (spec for layer in range(config.num_layers) for spec in layer_specs(config, layer, grains))
    return (*outer_specs(config, grains), *layers)


def stored_specs(config: ModelConfig, grains: int, quantization: str) -> tuple[ParamSpec, ...]:
    """List what a store holds: `param_specs`, where quantised weights have their scales after them. Not collective."""
    return tuple(part for spec in param_specs(config, grains) for part in quantised_specs(spec, quantization))


def quantised_specs(spec: ParamSpec, quantization: str) -> tuple[ParamSpec, ...]:
    """What a parameter becomes in a quantised store: codes and scales, or what it is. Not collective."""
    kind = quantised_type(spec.name, quantization)
    if not kind:
        return (spec,)
    units, outputs, inputs = spec.shape
    if kind != "int4":
        return (spec, ParamSpec(scale_name(spec.name), spec.axis, (units, outputs)))
    groups = -(-inputs // GROUP)
    codes = ParamSpec(spec.name, spec.axis, (units, outputs, groups * GROUP // 2))
    return (codes, ParamSpec(scale_name(spec.name), spec.axis, (units, outputs, groups)))


def quantised_type(name: str, quantization: str) -> str:
    """Type of a parameter's codes; empty if it stays as it is. Tables are int8 in every store. Not collective."""
    if quantization != UNQUANTISED and name.endswith(_TABLES):
        return "int8"
    return QUANTISED_TYPES[quantization] if quantization != UNQUANTISED and name.endswith(_MATRICES) else ""


def scale_name(name: str) -> str:
    """Name of a quantised weight's scales. Not collective."""
    return f"{name}_scale"


def outer_specs(config: ModelConfig, grains: int) -> tuple[ParamSpec, ...]:
    """List what stands outside the layers: embedding, last norm, output head unless tied. Not collective."""
    table = (grains, padded_grain(config.vocab_size, grains), config.hidden_size)
    head = () if config.tie_word_embeddings else (ParamSpec("lm_head.weight", VOCAB, table),)
    norm = ParamSpec("norm.weight", WHOLE, (1, config.hidden_size))
    return (ParamSpec("embed_tokens.weight", VOCAB, table), norm, *head)


def layer_specs(config: ModelConfig, layer: int, grains: int) -> tuple[ParamSpec, ...]:
    """List the parameters of one layer. Not collective."""
    specs = (*_norm_specs(config), *_attention_specs(config, grains), *_mlp_specs(config, grains))
    return tuple(ParamSpec(f"layers.{layer}.{name}", axis, shape) for name, axis, shape in specs)


def unit_ranges(config: ModelConfig, axis: str, grains: int) -> list[range]:
    """Rows or columns of the whole parameter that each unit holds, without padding. Not collective.

    The axis "whole" has no split dimension: its one unit is range(0).
    """
    if axis == QUERY_HEADS:
        return [_scaled(heads, config.head_size) for heads in grain_ranges(config.num_heads, grains)]
    if axis == KV_HEADS:
        return [_scaled(range(head, head + 1), config.head_size) for head in range(config.num_kv_heads)]
    if axis == WHOLE:
        return [range(0)]
    return grain_ranges(config.vocab_size if axis == VOCAB else config.intermediate_size, grains)


def _norm_specs(config: ModelConfig) -> list[ParamSpec]:
    names = ("input_layernorm.weight", "post_attention_layernorm.weight")
    specs = [ParamSpec(name, WHOLE, (1, config.hidden_size)) for name in names]
    if config.qk_norm:
        specs += [ParamSpec(name, WHOLE, (1, config.head_size)) for name in ("q_norm.weight", "k_norm.weight")]
    return specs


def _attention_specs(config: ModelConfig, grains: int) -> list[ParamSpec]:
    hidden, head, kv = config.hidden_size, config.head_size, config.num_kv_heads
    columns = -(-config.num_heads // grains) * head
    specs = [
        ParamSpec("q_proj.weight", QUERY_HEADS, (grains, columns, hidden)),
        ParamSpec("k_proj.weight", KV_HEADS, (kv, head, hidden)),
        ParamSpec("v_proj.weight", KV_HEADS, (kv, head, hidden)),
        ParamSpec("o_proj.weight", QUERY_HEADS, (grains, hidden, columns)),
    ]
    if config.qkv_bias:
        specs.append(ParamSpec("q_proj.bias", QUERY_HEADS, (grains, columns)))
        specs += [ParamSpec(name, KV_HEADS, (kv, head)) for name in ("k_proj.bias", "v_proj.bias")]
    if config.o_bias:
        specs.append(ParamSpec("o_proj.bias", WHOLE, (1, hidden)))
    return specs


def _mlp_specs(config: ModelConfig, grains: int) -> list[ParamSpec]:
    hidden, width = config.hidden_size, padded_grain(config.intermediate_size, grains)
    specs = [ParamSpec(name, MLP, (grains, width, hidden)) for name in ("gate_proj.weight", "up_proj.weight")]
    specs.append(ParamSpec("down_proj.weight", MLP, (grains, hidden, width)))
    if config.mlp_bias:
        specs += [ParamSpec(name, MLP, (grains, width)) for name in ("gate_proj.bias", "up_proj.bias")]
        specs.append(ParamSpec("down_proj.bias", WHOLE, (1, hidden)))
    return specs


def _scaled(units: range, size: int) -> range:
    return range(units.start * size, units.stop * size)


def source_name(name: str) -> str:
    """Name of a stored parameter in Hugging Face's checkpoint. Not collective."""
    if name == "lm_head.weight":
        return name
    *layer, module, kind = name.split(".")
    block = _BLOCKS.get(module.split("_")[0])
    if not layer or block is None:
        return f"model.{name}"
    return ".".join(["model", *layer, block, module, kind])
