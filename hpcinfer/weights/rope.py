"""Rotary scaling as config.json says it: `rope_scaling` with `rope_theta` beside it, or `rope_parameters` with both.

Source: transformers' modeling_rope_utils (names, defaults, and yarn's attention factor).
"""

import math
from typing import Any

from hpcinfer.config import RopeScaling
from hpcinfer.errors import ModelError

_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}


def read_rope(values: dict[str, Any], max_positions: int) -> tuple[float, RopeScaling]:
    """Read the rotary base and scaling of a config.json.

    Not collective.

    Raises:
        ModelError: a scaling that is not supported, or an incomplete one.
    """
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _REQUIRED:
        raise ModelError(f"rope_type {kind!r} is not supported", expected=", ".join(_REQUIRED))
    missing = [name for name in _REQUIRED[kind] if rope.get(name) is None]
    if missing:
        raise ModelError(f"rope_type {kind} without {', '.join(missing)}", expected=", ".join(_REQUIRED[kind]))
    if rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) not in (None, 1, 1.0):
        raise ModelError("partial_rotary_factor is not supported", expected="1.0 or absent")
    theta = float(rope.get("rope_theta") or values.get("rope_theta") or 10000.0)
    return theta, _READERS[kind](rope, _original_positions(values, rope, max_positions), max_positions)


def _original_positions(values: dict[str, Any], rope: dict[str, Any], max_positions: int) -> int:
    """Context length of pre-training; a value outside the rope dictionary comes first, as in transformers."""
    name = "original_max_position_embeddings"
    return int(values.get(name) or rope.get(name) or max_positions)


def _default(rope: dict[str, Any], original: int, max_positions: int) -> RopeScaling:
    return RopeScaling()


def _linear(rope: dict[str, Any], original: int, max_positions: int) -> RopeScaling:
    return RopeScaling("linear", factor=float(rope["factor"]))


def _llama3(rope: dict[str, Any], original: int, max_positions: int) -> RopeScaling:
    return RopeScaling(
        "llama3",
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=original,
    )


def _yarn(rope: dict[str, Any], original: int, max_positions: int) -> RopeScaling:
    if not rope.get("truncate", True):
        raise ModelError("rope_type yarn with truncate=false is not supported", expected="truncate true or absent")
    factor = float(rope.get("factor") or max_positions / original)
    given = rope.get("attention_factor")
    return RopeScaling(
        "yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        attention_factor=_yarn_attention_factor(rope, factor) if given is None else float(given),
    )


def _yarn_attention_factor(rope: dict[str, Any], factor: float) -> float:
    """Multiplier of cos and sin. Source: YaRN (arXiv 2309.00071), section 3.4; mscale as DeepSeek uses it."""
    mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and mscale_all:
        return _mscale(factor, mscale) / _mscale(factor, mscale_all)
    return _mscale(factor, 1.0)


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


_READERS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
