"""What bounds each phase of a run, with the numbers that say so, and the option that would help most.

The rules are simple on purpose: each compares shares of measured time, and says them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from hpcinfer.report.balance import Balance, balance
from hpcinfer.report.classes import (
    COMMUNICATION,
    COMPUTE,
    INPUT_OUTPUT,
    RESULTS,
    SCHEDULING,
    WAITING,
    mean_shares,
    time_classes,
)
from hpcinfer.report.metrics import IDLE, WEIGHTS
from hpcinfer.units import format_bytes, format_seconds

ON_COMPUTE, ON_MEMORY, ON_NETWORK = "compute", "memory", "network"
ON_LATENCY, ON_STORAGE, ON_IMBALANCE = "latency", "storage", "imbalance"

_RIDGE_FLOP_PER_BYTE = 16.0  # of CPU nodes of this decade, within a factor of two
_SMALL_BYTES = 64 << 10  # messages below are bound by latency
_ARRIVED = 0.7  # of the loading: who has all bytes sooner computes
_READ = 0.7  # of the time until all bytes were there: who has read all sooner waits for other ranks
_BUSY = 0.7  # of a core: a phase with more CPU time than that computes
_STARVED = 0.7  # of the time inside kernels: with less CPU time per thread, somebody else has the cores
_UNEVEN = 0.5  # of communication: more than that is waiting for a slower peer
_FULL = 0.9  # of batches or KV blocks
_TAIL_SHARE = 0.05  # of the run: a shorter tail is not worth an option

Report = dict[str, Any]


class Bound(NamedTuple):
    """What bounds one phase."""

    phase: str  # load, run, merge, tail
    seconds: float
    bound: str
    evidence: str
    hint: str  # "" if nothing would help


def bounds(run: Report, ranks: Sequence[Report]) -> list[Bound]:
    """Judge all phases of a run that took time."""
    found = [_load(run, ranks), _run(run, ranks), _merge(run, ranks), _tail(run, balance(ranks))]
    return [each for each in found if each is not None]


def main_bound(found: Sequence[Bound]) -> Bound | None:
    """The bound of the phase that takes longest; the tail is a part of the run."""
    phases = [each for each in found if each.phase != "tail"]
    return max(phases, key=lambda each: each.seconds, default=None)


def _load(run: Report, ranks: Sequence[Report]) -> Bound | None:
    """Judge the loading, from its start until the last layer of the last rank was ready to compute."""
    loads = [rank["loading"] for rank in ranks if rank["loading"].get("last_layer_s")]
    seconds = max((load["last_layer_s"] for load in loads), default=0.0)
    if seconds <= 0:
        return None
    read, received = (sum(load[name] for load in loads) for name in ("bytes_read", "bytes_received"))
    arrived_s, read_s = (max(load.get(name) or 0.0 for load in loads) for name in ("last_byte_s", "last_read_s"))
    evidence = (f"{format_bytes(read)} read, {format_bytes(received)} received from other ranks,"
                f" {format_bytes((read + received) / (arrived_s or seconds))}/s; all bytes were there after"
                f" {format_seconds(arrived_s)}, all layers after {format_seconds(seconds)}")  # fmt: skip
    if arrived_s < _ARRIVED * seconds:
        hint = "a store in the precision that is computed with (hpcinfer convert); --threads"
        return Bound("load", seconds, ON_COMPUTE, evidence, hint)
    most = max(load["bytes_read"] for load in loads)
    if most > 2 * read / len(loads):
        is_staged = any((rank.get("place") or {}).get("pp", 1) > 1 for rank in ranks)
        return Bound("load", seconds, ON_IMBALANCE, f"{evidence}; one rank read {format_bytes(most)}",
                     "like layers for all stages: a -pp that divides the layers" if is_staged else "")  # fmt: skip
    if received and 0 < read_s < _READ * arrived_s:
        evidence += f"; all was read after {format_seconds(read_s)}"
        return Bound("load", seconds, ON_NETWORK, evidence, _stage(run))
    return Bound("load", seconds, ON_STORAGE, evidence, _stage(run))


def _stage(run: Report) -> str:
    """The advice to keep copies on the nodes, where there are several and they keep none."""
    is_on_one = len({place["node"] for place in run["placement"]}) < 2
    return "" if run["has_stage"] or is_on_one else "--stage DIR on the node's own disk, for the next start"


def _run(run: Report, ranks: Sequence[Report]) -> Bound | None:
    """Judge the run by its leaders: what the others wait for is what these do."""
    leaders = [rank for rank in ranks if "timeline" in rank] or list(ranks)
    seconds = _longest(ranks, "run")
    if seconds <= 0:
        return None
    shares, busy = mean_shares(map(time_classes, leaders)), _cpu_share(leaders, "run") / run["threads"]
    first = max(shares, key=lambda name: shares[name])
    words = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items() if share >= 0.005)
    if busy < _STARVED * shares[COMPUTE]:
        evidence = (f"{words}; {busy:.2f} cores busy per thread of a leader, less than its kernels alone could use:"
                    " others share them")  # fmt: skip
        hint = "cores of its own for each rank (hpcinfer doctor looks at binding; sbatch --exclusive)"
        return Bound("run", seconds, ON_COMPUTE, evidence, hint)
    judge = {COMPUTE: _computing, COMMUNICATION: _communicating, WAITING: _waiting, INPUT_OUTPUT: _handling,
             SCHEDULING: _scheduling}[first]  # fmt: skip
    bound, evidence, hint = judge(run, ranks, leaders)
    return Bound("run", seconds, bound, f"{words}; {evidence}", hint)


class _Verdict(NamedTuple):
    bound: str
    evidence: str
    hint: str


def _computing(run: Report, ranks: Sequence[Report], leaders: Sequence[Report]) -> _Verdict:
    kernels, tokens = _sum_of(ranks, "kernels"), _tokens_per_step(leaders)
    whole = sum(kernels.values()) or 1.0
    if (attention := kernels.get("attention", 0.0)) > 0.5 * whole:
        evidence = f"attention, which reads the KV cache, is {100 * attention / whole:.0f} % of the kernels"
        return _Verdict(ON_MEMORY, evidence, "--kv-cache-dtype int8 or bfloat16 (other results); a larger -tp")
    ridge = run.get("bytes_per_weight", 4.0) * _RIDGE_FLOP_PER_BYTE / 2
    evidence = f"{tokens:.1f} tokens per step, where {ridge:.0f} would keep the arithmetic as busy as the memory"
    if tokens >= ridge:
        hint = "more ranks (-dp); an int8 store (convert --quantize int8, other results)"
        return _Verdict(ON_COMPUTE, evidence, hint)
    return _Verdict(ON_MEMORY, evidence, _larger_batches(run, leaders))


def _larger_batches(run: Report, leaders: Sequence[Report]) -> str:
    """What keeps batches small."""
    limit, peak = run["options"]["max_num_seqs"], max(r["peaks"].get("batch_sequences", 0) for r in leaders)
    if _kv_use(leaders) >= _FULL or sum(rank["counts"].get("preemptions", 0) for rank in leaders):
        return "--kv-cache-memory, or fewer replicas (-dp) with a larger -tp: the KV cache is full"
    if peak >= _FULL * limit:
        return f"--max-num-seqs above {limit}: batches are full"
    return "fewer replicas (-dp), or more rows in a job: there are too few for full batches"


def _communicating(run: Report, ranks: Sequence[Report], leaders: Sequence[Report]) -> _Verdict:
    traffic = _sum_of(leaders, "traffic")
    pipeline_s = sum(rank["seconds"].get("pipeline", 0.0) for rank in leaders)
    if pipeline_s > traffic.get("seconds", 0.0):
        hint = "a smaller -pp with a larger -tp or -dp; --max-num-seqs, so that all micro-batches are full"
        return _Verdict(ON_IMBALANCE, f"{format_seconds(pipeline_s)} between the stages of the pipeline", hint)
    size, each_s = traffic["num_bytes"] / traffic["calls"], traffic["seconds"] / traffic["calls"]
    evidence = (f"{traffic['calls']:.0f} sums of {format_bytes(size)} on average, {1e6 * each_s:.0f} us each,"
                f" {format_bytes(size / each_s)}/s")  # fmt: skip
    least, mean = _reducing_by_group(ranks)
    if mean > 0 and 1 - least / mean > _UNEVEN:
        evidence += f"; the quickest ranks of the groups spend {100 * least / mean:.0f} % of the mean in them"
        return _Verdict(ON_IMBALANCE, evidence, "like nodes and cores for the ranks of a replica (hpcinfer doctor); -tp"
                        " that divides heads and grains evenly")  # fmt: skip
    if size < _SMALL_BYTES:
        return _Verdict(ON_LATENCY, evidence, "a smaller -tp with a larger -dp; --max-num-seqs; hpcinfer calibrate")
    return _Verdict(ON_NETWORK, evidence, "a -tp that stays inside a node, -pp across nodes; hpcinfer calibrate")


def _reducing_by_group(ranks: Sequence[Report]) -> tuple[float, float]:
    """Seconds in sums of the quickest rank, and of the mean one, of each tensor-parallel group; of all together."""
    groups: dict[tuple[int, int], list[float]] = {}
    for rank in ranks:
        if rank.get("place") and rank.get("traffic"):
            place = rank["place"]
            groups.setdefault((place["replica"], place["pp_rank"]), []).append(rank["traffic"]["seconds"])
    return sum(map(min, groups.values())), sum(sum(each) / len(each) for each in groups.values())


def _waiting(run: Report, ranks: Sequence[Report], leaders: Sequence[Report]) -> _Verdict:
    idle_s, results_s = (sum(rank["seconds"].get(name, 0.0) for rank in leaders) for name in (IDLE, RESULTS))
    if idle_s >= results_s:
        rows = sum(rank["rows"]["finished"] for rank in leaders)
        return _Verdict(ON_IMBALANCE, f"leaders had no rows for {format_seconds(idle_s)} in all, {rows} rows in all",
                        "fewer ranks, or more rows in a job")  # fmt: skip
    return _Verdict(ON_LATENCY, f"leaders waited {format_seconds(results_s)} for the last stage of their pipelines",
                    "a smaller -pp; a larger --max-num-seqs, so that all micro-batches are full")  # fmt: skip


def _handling(run: Report, ranks: Sequence[Report], leaders: Sequence[Report]) -> _Verdict:
    weights_s, handling_s = (sum(rank["seconds"].get(name, 0.0) for rank in leaders)
                             for name in (WEIGHTS, INPUT_OUTPUT))  # fmt: skip
    if weights_s > handling_s:
        return _Verdict(ON_STORAGE, f"leaders waited {format_seconds(weights_s)} for weights", _stage(run))
    busy, each_s = _cpu_share(leaders, "run"), _per_step(leaders, INPUT_OUTPUT)
    evidence = f"{1e3 * each_s:.2f} ms of each step for rows and texts, {busy:.2f} cores busy per leader"
    if busy >= _BUSY:
        return _Verdict(ON_COMPUTE, evidence, "more replicas (-dp), each with its own leader")
    return _Verdict(ON_STORAGE, evidence, "input and output on a faster file system (hpcinfer doctor tries it out)")


def _scheduling(run: Report, ranks: Sequence[Report], leaders: Sequence[Report]) -> _Verdict:
    seconds = sum(time_classes(rank)[SCHEDULING] for rank in leaders)
    steps = sum(rank["counts"].get("steps", 0) for rank in leaders)
    evidence = f"{1e3 * seconds / max(1, steps):.2f} ms of each step, {_tokens_per_step(leaders):.1f} tokens per step"
    return _Verdict(ON_LATENCY, evidence, "--max-num-seqs: fewer and larger steps; a larger model would hide it")


def _merge(run: Report, ranks: Sequence[Report]) -> Bound | None:
    mergers = ranks[: run["num_mergers"]]
    seconds, size, busy = _longest(ranks, "merge"), run.get("output_bytes", 0), _cpu_share(mergers, "merge")
    if seconds <= 0 or not size:  # left to `hpcinfer merge`
        return None
    evidence = f"{format_bytes(size)} at {format_bytes(size / seconds)}/s; {busy:.2f} cores busy per rank that merges"
    if busy >= _BUSY:
        more = "more ranks; " if run["num_mergers"] == len(ranks) else ""
        return Bound("merge", seconds, ON_COMPUTE, evidence, f"{more}--no-merge, and hpcinfer merge later")
    return Bound("merge", seconds, ON_STORAGE, evidence, "--no-merge, and hpcinfer merge later, outside the allocation")


def _tail(run: Report, work: Balance) -> Bound | None:
    if len(work.replicas) < 2 or work.tail_s <= 0:
        return None
    evidence = (f"{100 * work.tail_idle_share:.0f} % of it idle, {100 * work.run_idle_share:.1f} % of the whole run;"
                f" the busiest replica had {work.token_spread:.2f} times the mean of the output tokens")  # fmt: skip
    is_long = work.tail_s > _TAIL_SHARE * work.run_s
    hint = "a smaller -dp with a larger -tp; more rows in a job; a smaller --max-num-seqs" if is_long else ""
    return Bound("tail", work.tail_s, ON_IMBALANCE, evidence, hint)


def _longest(ranks: Sequence[Report], phase: str) -> float:
    return max((float(rank["phases"].get(phase, 0.0)) for rank in ranks), default=0.0)


def _cpu_share(ranks: Sequence[Report], phase: str) -> float:
    """Cores that a rank keeps busy in a phase, on average."""
    seconds = sum(rank["phases"].get(phase, 0.0) for rank in ranks)
    return sum(rank["cpu_seconds"].get(phase, 0.0) for rank in ranks) / seconds if seconds else 0.0


def _sum_of(ranks: Sequence[Report], section: str) -> dict[str, float]:
    total: dict[str, float] = {}
    for rank in ranks:
        for name, value in rank.get(section, {}).items():
            total[name] = total.get(name, 0.0) + value
    return total


def _tokens_per_step(leaders: Sequence[Report]) -> float:
    counts = _sum_of(leaders, "counts")
    return counts.get("tokens", 0.0) / max(1.0, counts.get("steps", 0.0))


def _per_step(leaders: Sequence[Report], phase: str) -> float:
    return _sum_of(leaders, "seconds").get(phase, 0.0) / max(1.0, _sum_of(leaders, "counts").get("steps", 0.0))


def _kv_use(leaders: Sequence[Report]) -> float:
    """Largest share of KV blocks that were held at once."""
    return max((max(rank["timeline"]["blocks"], default=0) / max(1, rank["num_blocks"])
                for rank in leaders if "timeline" in rank), default=0.0)  # fmt: skip
