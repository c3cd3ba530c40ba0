"""A short probe of a kernel set: the digest of small layers over fixed numbers, equal where bits are equal."""

import hashlib
from collections.abc import Sequence

import numpy as np

from hpcinfer.config import RopeScaling
from hpcinfer.dtypes import round_to
from hpcinfer.kernels.protocol import (
    AttentionShape,
    AttentionWeights,
    HeadLayout,
    Kernels,
    Linear,
    MlpWeights,
    StepInput,
    Weight,
)

_TOKENS, _HIDDEN, _GRAINS, _HEAD = 70, 64, 2, 32


def probe_digest(kernels: Kernels, precisions: Sequence[tuple[str, str]]) -> str:
    """Hash what a layer makes of fixed numbers, in some precisions of weights and of the cache."""
    digest, spans = hashlib.sha256(), [(0, _GRAINS)]
    rope = kernels.rope_table(_TOKENS, _HEAD, 1e4, RopeScaling())
    shape = AttentionShape(HeadLayout(_HEAD, 1, (1, 1), (0, 0)), 1e-5, rope)
    norm = _numbers(_HIDDEN)
    for dtype, cached in precisions:
        o, q, k = (_weight(dtype, *sizes) for sizes in ((2, _HIDDEN, _HEAD), (2, _HEAD, _HIDDEN), (1, _HEAD, _HIDDEN)))
        attention = kernels.prepare_attention(AttentionWeights(norm, Linear(q), Linear(k), Linear(k), o), shape)
        mlp = kernels.prepare_mlp(MlpWeights(norm, Linear(q), Linear(q), o), 1e-5)
        cache = kernels.kv_cache(5, 16, 1, _HEAD, cached)
        x = kernels.device(_numbers(_TOKENS, _HIDDEN))
        for nodes in (kernels.attention(x, attention, _step(), cache, spans), kernels.mlp(x, mlp, spans)):
            digest.update(kernels.host(nodes[0]).tobytes())
        logits = kernels.logits(x, np.arange(3), kernels.prepare_head(norm, q, 1e-5))
        digest.update(kernels.host(kernels.grain_stats(logits, (_HEAD, _HEAD - 3)).exp_sums).tobytes())
    return digest.hexdigest()[:16]


def _numbers(*shape: int) -> np.ndarray:
    """Numbers from -1 to 1 that depend on their place alone."""
    places = np.arange(np.prod(shape), dtype=np.int64)
    return (places * 7919 % 65537 / np.float32(32768) - 1).astype(np.float32).reshape(shape)


def _weight(dtype: str, units: int, num_out: int, num_in: int) -> Weight:
    values = _numbers(units, num_out, num_in)
    if dtype in ("float32", "bfloat16", "float16"):
        return Weight(round_to(values, dtype), dtype)
    if dtype == "int8":
        return Weight(np.rint(values * 127).astype(np.int8), dtype, np.abs(_numbers(units, num_out)))
    codes = (values[..., : num_in // 2] * 127 + 128).astype(np.uint8)
    return Weight(codes, dtype, np.full((units, num_out, num_in // 32), 0x3C00, np.uint16))


def _step() -> StepInput:
    places = np.arange(_TOKENS)
    return StepInput(
        token_ids=places, positions=places, slots=places, query_starts=np.array([0, _TOKENS]),
        context_lens=np.array([_TOKENS]), block_tables=np.arange(5), table_starts=np.array([0, 5]), logit_tokens=places,
    )  # fmt: skip
