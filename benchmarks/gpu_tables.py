"""The result of the GPU benchmark as text.

    python benchmarks/gpu_tables.py gpu.json
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_results import (
    Row,
    bulk_ratio,
    decode_bound,
    decode_fraction,
    loading_fraction,
    peaks,
    prefill_fraction,
    rows_of,
    way,
)

_KINDS = {"memory": "memory", "bf16": "products, bfloat16", "fp16": "products, float16", "int8": "products, int8",
          "fp8": "products, fp8", "pcie": "host to device"}  # fmt: skip


def main() -> None:
    """Print what gpu.py has written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="what gpu.py --json wrote")
    print("\n".join(lines(json.loads(parser.parse_args().result.read_text()))))


def lines(result: dict[str, Any]) -> list[str]:
    """Write all tables."""
    tables = (_checks, _rooflines, _decode, _gaps, _prefill, _bulk, _loading, _left_out, _targets)
    return [*_head(result), *(line for table in tables for line in table(result))]


def _head(result: dict[str, Any]) -> list[str]:
    machine = dict(result["machine"])
    versions = ", ".join(f"{name} {version}" for name, version in machine.pop("versions", {}).items())
    return [", ".join(f"{name} {value}" for name, value in machine.items()), versions]


def _checks(result: dict[str, Any]) -> list[str]:
    table = ["", "checks"] if rows_of(result["parts"], "correctness") else []
    for row in rows_of(result["parts"], "correctness"):
        verdict = "right" if row["is_right"] else "WRONG"
        if row["check"] == "transformers":
            what = (f"{row['clear_equal']} of {row['clear']} clear tokens ({row['tokens']} in all) are transformers',"
                    f" error {row['error']:.2g}, allowed {row['allowed']:.2g}")  # fmt: skip
            table.append(f"  {row['model']}, {row['dtype']}: {what}: {verdict}")
        else:
            what = f"batch {row['max_num_seqs']}, {row['max_num_batched_tokens']} tokens a step, {_graphs(row)}"
            table.append(f"  {row['model']}, {what}, blocks of {row['block_size']}: {row['sha256'][:16]} {verdict}")
    return table


def _rooflines(result: dict[str, Any]) -> list[str]:
    best = peaks(result["parts"])
    table = ["", "measured at most"] if best else []
    for kind, rate in best.items():
        amount = f"{rate / 1e9:>9.1f} GB/s" if kind in ("memory", "pcie") else f"{rate / 1e12:>9.1f} TOP/s"
        table.append(f"  {_KINDS[kind]:<20} {amount}")
    return table


def _decode(result: dict[str, Any]) -> list[str]:
    best, rows = peaks(result["parts"]), rows_of(result["parts"], "decode")
    head = f"{'decode':<44} batch  output tokens/s   ms a step  of memory  of the bound  J a token"
    return _table(head, rows, lambda row: (
        f"{_about(row):<44} {row['batch']:>5} {row['output_tokens_per_s']:>16,.0f} {1e3 * row['step_s']:>11.3f}"
        f" {_percent(decode_fraction(row, best)):>10} {_percent(decode_bound(row, best)):>13}"
        f" {_number(row['joules_per_token'], '.3f'):>10}"
    ))  # fmt: skip


def _gaps(result: dict[str, Any]) -> list[str]:
    rows = rows_of(result["parts"], "gaps")
    table = _table(f"{'between kernels of decode steps':<44} batch  of the time  gaps  kernels", rows, lambda row: (
        f"{_about(row):<44} {row['batch']:>5} {_percent(row['between']):>12} {row['gaps']:>5} {row['events']:>8}"
    ))  # fmt: skip
    for row in rows:
        table += ["", f"  kernels at batch {row['batch']}, {_graphs(row)}: share, times, name"]
        table += [f"  {_percent(us / row['total_us']):>8} {count:>6}  {name}" for name, us, count in row["top"]]
    return table


def _prefill(result: dict[str, Any]) -> list[str]:
    best, rows = peaks(result["parts"]), rows_of(result["parts"], "prefill")
    return _table(f"{'prefill':<44} length  prompts     tokens/s   TOP/s  of products", rows, lambda row: (
        f"{_about(row):<44} {row['length']:>6} {row['prompts']:>8} {row['tokens_per_s']:>12,.0f}"
        f" {row['operations_per_s'] / 1e12:>7.1f} {_percent(prefill_fraction(row, best)):>12}"
    ))  # fmt: skip


def _bulk(result: dict[str, Any]) -> list[str]:
    rows = rows_of(result["parts"], "bulk")
    head = f"{'bulk':<44} prompts  output tokens/s  total tokens/s  to transformers  J a token  seconds by round"
    return _table(head, rows, lambda row: (
        f"{', batch '.join([row['engine'], *([str(row['batch'])] if 'batch' in row else [])]):<44} {row['prompts']:>7}"
        f" {row['output_tokens_per_s']:>16,.0f} {row['total_tokens_per_s']:>15,.0f}"
        f" {_number(bulk_ratio(row, result['parts']), '.2f'):>16} {_number(row['joules_per_token'], '.3f'):>10}"
        f"  {' '.join(f'{s:.2f}' for s in row['seconds'])}"
    ))  # fmt: skip


def _loading(result: dict[str, Any]) -> list[str]:
    best, rows = peaks(result["parts"]), rows_of(result["parts"], "loading")
    return _table(f"{'loading from the page cache':<44}      GB    GB/s  files GB/s  of the slower", rows, lambda row: (
        f"{row['store'][-44:]:<44} {row['bytes'] / 1e9:>7.2f} {row['rate'] / 1e9:>7.2f}"
        f" {row['file_rate'] / 1e9:>11.2f} {_percent(loading_fraction(row, best)):>14}"
    ))  # fmt: skip


def _left_out(result: dict[str, Any]) -> list[str]:
    table = ["", "left out"]
    for name, part in result["parts"].items():
        table += [f"  {name}: {part['ended']}"] if part["ended"] else []
        for row in part["rows"]:
            reason = row.get("failed") or row.get("skipped")
            verdict = "FAILED: " if "failed" in row else ""
            table += [f"  {', '.join([name, *_values(row)])}: {verdict}{reason}"] if reason else []
    return table if len(table) > 2 else []


def _targets(result: dict[str, Any]) -> list[str]:
    table = ["", "targets"] if result["targets"] else []
    for each in result["targets"]:
        verdict = "hit" if each["is_hit"] else "MISSED"
        table.append(f"  {each['what']:<50} wanted {each['wanted']:.2f}  found {each['found']:.2f}  {verdict}")
    return table


def _values(row: Row) -> list[str]:
    """What a row that was left out is about."""
    names = ("reproducible", "graphs")
    hidden = ("failed", "skipped", "dtype", "in_flight", *names)
    values = [str(value) for key, value in row.items() if key not in hidden]
    return [*values, *(name for name in names if row.get(name))]


def _table(head: str, rows: list[Row], line: Callable[[Row], str]) -> list[str]:
    return ["", head, *map(line, rows)] if rows else []


def _about(row: Row) -> str:
    return f"{row['shape']}, {row['precision']}{way(row)}{'' if row['graphs'] else ', no graphs'}"


def _graphs(row: Row) -> str:
    return "graphs" if row["graphs"] else "no graphs"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    main()
