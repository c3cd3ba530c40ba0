"""Hugging Face's config.json, read into a ModelConfig: what differs between the families, as data.

What the runtime does not compute is refused by name here, before any weight is read. Defaults of absent keys are those
of the transformers library.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from hpcinfer.config import ModelConfig
from hpcinfer.errors import ModelError
from hpcinfer.weights.rope import read_rope


class Family(NamedTuple):
    """What one architecture has, where config.json does not say it."""

    default_positions: int  # max_position_embeddings when absent
    head_dim: int | None = None  # when absent; None: hidden_size / num_attention_heads
    special_ids: tuple[int | None, int | None] = (None, None)  # bos and eos when absent
    always_qkv_bias: bool = False
    reads_attention_bias: bool = False  # of q, k, v and o
    reads_mlp_bias: bool = False
    qk_norm: bool = False
    window: str = "none"  # none, all (sliding_window on every layer) or per_layer (use_sliding_window)


_LARGEST_HEAD = 1024  # head_dim: kernels keep a few rows of it on the stack of each thread

FAMILIES = {
    "LlamaForCausalLM": Family(2048, special_ids=(1, 2), reads_attention_bias=True, reads_mlp_bias=True),
    "MistralForCausalLM": Family(131072, special_ids=(1, 2), window="all"),
    "Qwen2ForCausalLM": Family(32768, always_qkv_bias=True, window="per_layer"),
    "Qwen3ForCausalLM": Family(32768, head_dim=128, reads_attention_bias=True, qk_norm=True, window="per_layer"),
}


def read_config(folder: Path) -> ModelConfig:
    """Read config.json and generation_config.json of a Hugging Face folder.

    Not collective.

    Raises:
        ModelError: no or malformed config.json, or a model that is not supported.
    """
    path = folder / "config.json"
    values = _read_json(path)
    generation = folder / "generation_config.json"
    try:
        return parse_config(values, _read_json(generation) if generation.exists() else {})
    except ModelError as error:
        error.where = str(path)
        raise
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"config.json cannot be understood: {type(error).__name__}: {error}", where=str(path)
        ) from error


def parse_config(values: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    """Turn the contents of config.json and generation_config.json into a ModelConfig.

    Not collective.

    Raises:
        ModelError: a model that is not supported.
        KeyError: a size is missing.
    """
    architecture = _architecture(values)
    family = FAMILIES[architecture]
    _refuse_unsupported(values)
    num_heads = _size(values, "num_attention_heads")
    num_layers = _size(values, "num_hidden_layers")
    bos, eos = family.special_ids
    attention_bias = family.reads_attention_bias and bool(values.get("attention_bias"))
    max_positions = int(values.get("max_position_embeddings") or family.default_positions)
    theta, scaling = read_rope(values, max_positions)
    config = ModelConfig(
        architecture=architecture,
        hidden_size=_size(values, "hidden_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(values.get("num_key_value_heads") or num_heads),
        head_size=int(values.get("head_dim") or family.head_dim or _derived_head_size(values)),
        intermediate_size=_size(values, "intermediate_size"),
        vocab_size=_size(values, "vocab_size"),
        max_position_embeddings=max_positions,
        rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=family.always_qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family.reads_mlp_bias and bool(values.get("mlp_bias")),
        qk_norm=family.qk_norm,
        windows=_windows(values, family, num_layers),
        bos_token_id=values.get("bos_token_id", bos),
        eos_token_ids=_eos_ids(values.get("eos_token_id", eos), generation.get("eos_token_id")),
    )
    _check_heads(config)
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(
            f"no {path.name}", expected="a model in Hugging Face's layout", where=str(path.parent)
        ) from None
    except ValueError as error:
        raise ModelError(f"{path.name} is not JSON: {error}", where=str(path)) from error
    if not isinstance(values, dict):
        raise ModelError(f"{path.name} holds a {type(values).__name__}", expected="a JSON object", where=str(path))
    return values


def _architecture(values: dict[str, Any]) -> str:
    name = (values.get("architectures") or ["none named"])[0]
    if name not in FAMILIES:
        raise ModelError(f"architecture {name} is not supported", expected=", ".join(FAMILIES))
    return str(name)


def _refuse_unsupported(values: dict[str, Any]) -> None:
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"hidden_act {activation!r} is not supported", expected="silu")
    quantization = values.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
        raise ModelError(
            f"quantization_config: a checkpoint quantised with {method} is not supported",
            expected="weights in float32, float16 or bfloat16",
            hint="take the model's original checkpoint",
        )


def _size(values: dict[str, Any], name: str) -> int:
    size = values[name]
    if not isinstance(size, int) or size < 1:
        raise ModelError(f"{name}={size!r}", expected="a positive integer")
    return size


def _derived_head_size(values: dict[str, Any]) -> int:
    hidden, heads = _size(values, "hidden_size"), _size(values, "num_attention_heads")
    if hidden % heads:
        raise ModelError(
            f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}", expected="head_dim given"
        )
    return hidden // heads


def _check_heads(config: ModelConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"num_attention_heads={config.num_heads} is not a multiple of num_key_value_heads={config.num_kv_heads}",
            expected="the same number of query heads for each KV head",
        )
    if config.head_size % 2:
        raise ModelError(f"head_dim={config.head_size} is odd", expected="an even size, for rotary positions")
    if config.head_size > _LARGEST_HEAD:
        raise ModelError(f"head_dim={config.head_size}", expected=f"at most {_LARGEST_HEAD}, as in all known models")


def _windows(values: dict[str, Any], family: Family, num_layers: int) -> tuple[int, ...]:
    """Keys that a token sees, per layer; 0 is all."""
    window = 0 if family.window == "none" else int(values.get("sliding_window", 4096) or 0)
    if family.window != "per_layer":
        return (window,) * num_layers
    if not values.get("use_sliding_window"):
        window = 0
    first = int(values.get("max_window_layers", 28))
    by_default = ["sliding_attention" if window and i >= first else "full_attention" for i in range(num_layers)]
    types = values.get("layer_types") or by_default
    allowed = {"full_attention": 0, **({"sliding_attention": window} if window else {})}
    if len(types) != num_layers or not set(types) <= set(allowed):
        raise ModelError(
            f"layer_types={sorted(set(types))} of {len(types)} layers", expected=f"{num_layers} of {', '.join(allowed)}"
        )
    return tuple(allowed[kind] for kind in types)


def _eos_ids(*sources: int | list[int] | None) -> tuple[int, ...]:
    """Ids of all sources, each once, in the order in which they are named."""
    lists = [[ids] if isinstance(ids, int) else ids or [] for ids in sources]
    return tuple(dict.fromkeys(int(token_id) for ids in lists for token_id in ids))
