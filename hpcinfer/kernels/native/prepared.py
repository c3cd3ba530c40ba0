"""Weights of the native kernels: C structs of the halves of layers and of the output head, made and given back."""

from typing import Any, NamedTuple

import numpy as np

from hpcinfer.dtypes import dequantise
from hpcinfer.kernels.fp8_weights import FP8
from hpcinfer.kernels.native.library import Library
from hpcinfer.kernels.native.packing import Packer, biases, cut
from hpcinfer.kernels.parts import Part, side_by_side
from hpcinfer.kernels.protocol import AttentionShape, AttentionWeights, MlpWeights, Weight


class Prepared(NamedTuple):
    """A C struct, what its pointers point to, and which parameters it was prepared from."""

    struct: Any
    held: tuple[Any, ...]
    parts: dict[str, Part] = {}  # noqa: RUF012  # never changed


class Table(NamedTuple):
    """A vocabulary table as stored; one of int4 or fp8 as float32."""

    weight: Weight
    stored: str  # dtype


class NativeWeights:
    """What native kernels do with weights.

    Args:
        library: which packs them.
        threads: that pack, each what it will compute with.
    """

    def __init__(self, library: Library, threads: int) -> None:
        self._ffi, self._lib, self._library = library.ffi, library.lib, library
        self._pointer, self._kind, self._owned = library.pointer, library.kind, library.owned
        self._packer = Packer(library, threads)

    def keeps_table(self, dtype: str) -> bool:
        """Whether `prepare_table` makes no copy."""
        return dtype not in ("int4", FP8)

    def prepare_table(self, table: Weight) -> Table:
        """Keep a vocabulary table [G, U, D] as stored."""
        if not self.keeps_table(table.dtype):
            return Table(Weight(dequantise(table.values, table.dtype, table.scales), "float32"), table.dtype)
        return Table(table._replace(values=np.ascontiguousarray(table.values)), table.dtype)

    def prepare_attention(self, weights: AttentionWeights, shape: AttentionShape) -> Prepared:
        """Pack the attention half of a layer: q, k and v side by side."""
        layout, hidden = shape.layout, len(weights.norm)
        columns = layout.heads_per_grain * layout.head_size
        inputs = (weights.q, weights.k, weights.v)
        prepared = self._prepare(
            "hpc_attention_layer *",
            {"window": shape.window, "head_size": layout.head_size, "eps": shape.eps, "grains": len(layout.grain_heads),
             "num_heads": len(layout.kv_of_head), "grain_columns": columns,
             "num_kv_heads": weights.k.weight.values.shape[0]},
            qkv=self._packer.columns([linear.weight for linear in inputs], hidden),
            o=self._packer.rows(weights.o, columns), norm=_float32(weights.norm), qkv_bias=biases(inputs),
            q_norm=_float32(weights.q_norm), k_norm=_float32(weights.k_norm), rope=_float32(shape.rope),
            head_columns=_head_columns(layout.grain_heads, layout.head_size, columns),
            kv_of_head=np.array(layout.kv_of_head, np.int64),
        )  # fmt: skip
        lists = self._packer.leave_padding_out(prepared.struct.qkv, prepared.struct.o, layout)
        parts = side_by_side(prepared.struct.qkv, ("q_proj", "k_proj", "v_proj"), [each.weight for each in inputs])
        parts["o_proj"] = Part(prepared.struct.o, hidden, is_row=True)
        return prepared._replace(parts=_kept(parts, weights.o), held=(*prepared.held, *lists))

    def prepare_mlp(self, weights: MlpWeights, eps: float) -> Prepared:
        """Pack the MLP half of a layer: gate and up side by side."""
        grains, width = weights.up.weight.values.shape[:2]
        inputs = (weights.gate, weights.up)
        prepared = self._prepare(
            "hpc_mlp_layer *", {"eps": eps, "grains": grains, "width": width},
            gate_up=self._packer.gated(weights.gate.weight, weights.up.weight, len(weights.norm)),
            down=self._packer.rows(weights.down, width), norm=_float32(weights.norm),
            gate_up_bias=biases(inputs, multiple=self._lib.HPC_PANEL),
        )  # fmt: skip
        gate_up = prepared.struct.gate_up
        parts = {"gate_proj": Part(gate_up, width), "up_proj": Part(gate_up, width, gate_up.num_out // 2)}
        down = Part(prepared.struct.down, len(weights.norm), is_row=True)
        return prepared._replace(parts=_kept({**parts, "down_proj": down}, weights.down))

    def prepare_head(self, norm: np.ndarray, table: Weight, eps: float) -> Prepared:
        """Pack the output head, with the last norm."""
        prepared = self._prepare(
            "hpc_head *", {"eps": eps, "grains": table.values.shape[0]},
            weight=self._packer.columns([table], len(norm)), norm=_float32(norm),
        )  # fmt: skip
        return prepared._replace(parts=_kept({"lm_head": Part(prepared.struct.weight, table.values.shape[1])}, table))

    def give_back(self, prepared: Any, name: str, units: range, outs: range | None = None) -> Weight | None:
        """Units of a prepared weight as they were; None of what is kept in another precision."""
        if isinstance(prepared, Prepared):
            part = prepared.parts.get(name)
            return None if part is None else self._packer.give_back(part, units, outs)
        return cut(prepared.weight, units, outs) if prepared.weight.dtype == prepared.stored else None

    def _prepare(self, kind: str, numbers: dict[str, Any], **held: Any) -> Prepared:
        struct = self._ffi.new(kind, numbers)
        for name, value in held.items():
            if isinstance(value, np.ndarray):
                setattr(struct, name, self._pointer("int64_t[]" if value.dtype == np.int64 else "float[]", value))
            elif value is not None:
                setattr(struct, name, value)
        return Prepared(struct, tuple(held.values()))

    def vector(self, values: np.ndarray) -> np.ndarray:
        """Prepare a norm weight or bias."""
        return np.array(values, np.float32)


def _kept(parts: dict[str, Part], weight: Weight) -> dict[str, Part]:
    """Where parameters lie, unless they are not kept as they were; `weight` is one of them."""
    return {} if weight.dtype == FP8 else parts


def _float32(values: np.ndarray | None) -> np.ndarray | None:
    return None if values is None else np.ascontiguousarray(values, np.float32)


def _head_columns(grain_heads: tuple[int, ...], head_size: int, columns: int) -> np.ndarray:
    """First column of each head in [G, U]."""
    firsts = [grain * columns + i * head_size for grain, count in enumerate(grain_heads) for i in range(count)]
    return np.array(firsts, np.int64)
