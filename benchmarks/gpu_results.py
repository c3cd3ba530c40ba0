"""What the rows of all parts come to: fractions of the measured rooflines, ratios to transformers, targets."""

from collections.abc import Iterator
from typing import Any, NamedTuple

Row = dict[str, Any]
Parts = dict[str, Any]  # by name: {"rows": [...], ...}

DECODE_FRACTION, PREFILL_FRACTION, BULK_RATIO, LOADING_FRACTION, REPRODUCIBLE_COST = 0.75, 0.65, 5.0, 0.8, 0.15
DECODE_BATCHES = (1, 64)
_PEAK_OF = {"bf16": "bf16", "int4": "bf16", "int8": "int8", "fp8": "fp8"}  # arithmetic of products with such weights


class Target(NamedTuple):
    """Something that was wanted, and what came."""

    what: str
    wanted: float
    found: float
    is_hit: bool


def rows_of(parts: Parts, name: str) -> list[Row]:
    """Rows of a part that were measured."""
    return [row for row in parts.get(name, {}).get("rows", []) if "skipped" not in row and "failed" not in row]


def peaks(parts: Parts) -> dict[str, float]:
    """The best rate of each kind."""
    best: dict[str, float] = {}
    for row in rows_of(parts, "rooflines"):
        best[row["kind"]] = max(row["rate"], best.get(row["kind"], 0.0))
    return best


def decode_fraction(row: Row, best: dict[str, float]) -> float | None:
    """What reading weights and KV cache would take, of what a step took."""
    return row["step_bytes"] / best["memory"] / row["step_s"] if "memory" in best else None


def decode_bound(row: Row, best: dict[str, float]) -> float | None:
    """The same, where the arithmetic of large batches counts if it takes longer."""
    memory, peak = decode_fraction(row, best), best.get(_PEAK_OF[row["precision"]])
    return max(memory, row["step_operations"] / peak / row["step_s"]) if memory and peak else memory


def prefill_fraction(row: Row, best: dict[str, float]) -> float | None:
    """Operations per second, of those of the library's products."""
    peak = best.get(_PEAK_OF[row["precision"]])
    return row["operations_per_s"] / peak if peak else None


def loading_fraction(row: Row, best: dict[str, float]) -> float | None:
    """Bytes per second, of what the slower of file and bus can."""
    return row["rate"] / min(row["file_rate"], best["pcie"]) if "pcie" in best else None


def bulk_ratio(row: Row, parts: Parts) -> float | None:
    """Output tokens per second, as multiples of transformers'."""
    for other in rows_of(parts, "bulk"):
        if other["engine"] == "transformers" and other is not row:
            return float(row["output_tokens_per_s"] / other["output_tokens_per_s"])
    return None


def targets(parts: Parts, shape: str) -> list[Target]:
    """All targets whose rows were measured, for the shape that has them, in bfloat16."""
    best, found = peaks(parts), list[Target]()
    for row in _of(parts, "decode", shape):
        if row["batch"] in DECODE_BATCHES and row["graphs"] and (fraction := decode_fraction(row, best)) is not None:
            found.append(_at_least(f"decode, batch {row['batch']}{way(row)}", DECODE_FRACTION, fraction))
    for row in _of(parts, "prefill", shape):
        if (fraction := prefill_fraction(row, best)) is not None:
            found.append(_at_least(f"prefill of {row['length']} tokens{way(row)}", PREFILL_FRACTION, fraction))
    for row in _of(parts, "bulk", shape):
        if row["engine"] != "transformers" and (ratio := bulk_ratio(row, parts)) is not None:
            found.append(_at_least(f"bulk to transformers, {row['engine']}", BULK_RATIO, ratio))
    found += [_at_least("loading", LOADING_FRACTION, fraction) for row in rows_of(parts, "loading")
              if (fraction := loading_fraction(row, best)) is not None]  # fmt: skip
    return found + list(_costs(parts, shape))


def way(row: Row) -> str:
    """How the kernels and the engine worked, for a table."""
    one = ", one in flight" if row["in_flight"] == 1 else ""
    return f"{', reproducible' if row['reproducible'] else ''}{one}"


def is_right(parts: Parts) -> bool:
    """Whether no check failed, and no part broke."""
    rows = [row for part in parts.values() for row in part["rows"]]
    return (all(row.get("is_right", True) and "failed" not in row for row in rows)
            and not any(part["ended"] for part in parts.values()))  # fmt: skip


def _costs(parts: Parts, shape: str) -> Iterator[Target]:
    """What reproducible kernels cost, as part of the time."""
    rates = {(row["batch"], row["reproducible"]): row["output_tokens_per_s"]
             for row in _of(parts, "decode", shape) if row["graphs"] and row["in_flight"] > 1}  # fmt: skip
    for batch in sorted({batch for batch, _ in rates}):
        if (batch, True) in rates and (batch, False) in rates:
            cost = 1 - rates[batch, True] / rates[batch, False]
            yield Target(f"cost of reproducible kernels, batch {batch}", REPRODUCIBLE_COST, cost,
                         cost <= REPRODUCIBLE_COST)  # fmt: skip


def _of(parts: Parts, name: str, shape: str) -> list[Row]:
    return [row for row in rows_of(parts, name) if row["shape"] == shape and row["precision"] == "bf16"]


def _at_least(what: str, wanted: float, found: float) -> Target:
    return Target(what, wanted, found, found >= wanted)
