"""Reports of runs that never were: like those of ranks, with numbers that a test chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SECONDS = {"input and output": 5.0, "scheduling": 5.0, "forward": 70.0, "sampling": 10.0, "waiting for results": 1.0}
BEGAN = 1000.0
RUN_S = 100.0


def made_up_timeline(tokens_per_s: float, until_s: float, interval_s: float = 1.0, blocks: int = 50) -> dict[str, Any]:
    """The timeline of a leader that worked evenly, then not at all."""
    count = int(until_s / interval_s)
    return {
        "start_time": BEGAN, "interval_s": interval_s, "last_step_time": BEGAN + until_s, "steps": [10] * count,
        "tokens": [int(tokens_per_s * interval_s)] * count, "longest_s": [0.1] * count, "sequences": [320] * count,
        "batch_tokens": [400] * count, "blocks": [blocks] * count,
    }  # fmt: skip


def made_up_rank(
    replica: int = 0, pp_rank: int = 0, tp_rank: int = 0, *, rank: int = 0, host: str = "n0", until_s: float = 98.0,
    seconds: Mapping[str, float] = SECONDS, **sections: Any,
) -> dict[str, Any]:  # fmt: skip
    """A rank; the first of a replica leads it."""
    is_leader = pp_rank == tp_rank == 0
    output = 40 * int(until_s) if is_leader else 0
    report = {
        "rank": rank, "host": host, "began": BEGAN, "seconds": dict(seconds),
        "place": {"replica": replica, "pp": 1, "tp": 1, "pp_rank": pp_rank, "tp_rank": tp_rank, "share": 1.0},
        "phases": {"load": 2.0, "run": RUN_S, "merge": 1.0}, "cpu_seconds": {"load": 0.5, "run": 90.0, "merge": 0.2},
        "kernels": {"products": 60.0, "attention": 10.0, "other kernels": 5.0},
        "traffic": {"calls": 0, "num_bytes": 0, "seconds": 0.0},
        "counts": {"steps": 1000, "tokens": 40_000}, "peaks": {"batch_sequences": 64}, "num_blocks": 100,
        "loading": {"bytes_read": 500 << 20, "bytes_received": 100 << 20, "bytes_sent": 0, "began": BEGAN - 2.0,
                    "last_read_s": 1.9, "last_byte_s": 1.9, "last_layer_s": 2.0},
        "bytes_read": {"store": 500 << 20, "stage": 0, "input": 10_000}, "finish_reasons": {"stop": 10}, "errors": {},
        "rows": {"finished": 10 if is_leader else 0, "cut_by_default": 0, "kept": 0},
        "tokens": {"prompt": 5 * output, "output": output, "resumed": 0}, "recoveries": [],
        "node": {"cpu": "Made-up CPU", "cpus": 64, "memory_bytes": 256 << 30},
        "energy": {"joules": None, "parts": {}, "why_not": "not readable here (no /sys/class/powercap)"},
    }  # fmt: skip
    if is_leader:
        report["timeline"] = made_up_timeline(40.0, until_s)
    return {**report, **sections}


def made_up_run(num_ranks: int = 2, hosts: Sequence[str] | None = None, **values: Any) -> dict[str, Any]:
    """What is known of the run as a whole."""
    hosts = [f"n{rank // 2}" for rank in range(num_ranks)] if hosts is None else hosts
    placement = [{"rank": rank, "host": host, "node": hosts.index(host), "socket": 0, "switches": [], "dp": rank,
                  "pp": 0, "tp": 0} for rank, host in enumerate(hosts)]  # fmt: skip
    return {
        "mesh": f"dp={num_ranks} pp=1 tp=1", "world_size": num_ranks, "placement": placement, "input_kind": "jsonl",
        "num_rows": 1000, "num_failed": 3, "num_mergers": num_ranks,
        "num_done": 1000, "stopped": "",
        "output_bytes": 50 << 20, "bytes_per_weight": 2.0, "kv_cache_bytes": 1 << 30,
        "num_blocks": 100, "threads": 1, "has_stage": False, "loaded_s": 0.0,
        "seconds": {"load": 2.0, "run": RUN_S, "merge": 1.0},
        "sampling": {"temperature": 0.5, "top_p": 0.9, "top_k": 0, "min_p": 0.0, "max_tokens": 256},
        "origins": dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "max_tokens"), "hpcinfer"),
        "options": {"max_num_seqs": 64}, **values,
    }  # fmt: skip


def made_up_measured(ranks: Sequence[dict[str, Any]] | None = None, **values: Any) -> dict[str, Any]:
    """What `complete_report` takes."""
    ranks = [made_up_rank(replica, host=f"n{replica // 2}") for replica in range(2)] if ranks is None else list(ranks)
    return {
        "asked": {"model": "models/tiny", "output": "out.jsonl", "stop": ("<end>",)},
        "model": {"name": "models/tiny", "digest": "d1" * 32, "architecture": "TinyForCausalLM",
                  "num_weights": 125_000_000, "bytes_per_weight": 2.0, "weights": "bfloat16"},
        "software": {"hpcinfer": "1.2.3", "MPI": "Open MPI 5.0.11", "kernels": "native-1", "numpy": "2.0", "torch": ""},
        "precision": {"dtype": "float32", "kv_cache": "int8", "kernels": "native"}, "seed": 11,
        "files": {"input": {"path": "in.jsonl", "size_bytes": 9, "digest": "ab" * 32, "sha256": "cd" * 32},
                  "output": {"path": "out.jsonl", "size_bytes": 9, "digest": "ef" * 32, "sha256": None}},
        "run": made_up_run(len(ranks), [rank["host"] for rank in ranks]), "ranks": ranks, **values,
    }  # fmt: skip
