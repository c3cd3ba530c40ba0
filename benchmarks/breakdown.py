"""Where the time of a job goes, from a run with stopwatches inside (benchmarks/timed_run.py)."""

from statistics import mean

from engines import JobResult

_KINDS = {  # phases of a rank
    "products": ("products",),
    "attention": ("attention",),
    "other kernels": ("other kernels",),
    "sampling": ("sampling",),
    "communication": ("communication", "pipeline", "waiting for the leader", "waiting for results"),
    "scheduling": ("scheduling",),
    "Python around kernels": ("forward",),
    "input and output": ("input and output",),
}
_REST = "other Python, start, end"


def breakdown(result: JobResult) -> dict[str, float]:
    """Seconds of a timed run by kind, means over the ranks; they add up to the run."""
    ranks = [rank["seconds"] for rank in result.report["ranks"]]
    kinds = {
        kind: mean(sum(rank.get(phase, 0.0) for phase in phases) for rank in ranks) for kind, phases in _KINDS.items()
    }
    return {**kinds, _REST: result.seconds - sum(kinds.values())}
