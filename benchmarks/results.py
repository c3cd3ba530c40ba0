"""What the rounds come to: rates, ratios to the best peer, fractions of the roofline; for JSON and for the tables."""

from statistics import median
from typing import Any

from contenders import Contender, PeerContender
from operations import PEAK_OF, LinearSize
from roofline import Peaks
from rounds import Rounds
from workload import Workload


def contender_results(rounds: Rounds, workload: Workload, size: LinearSize) -> list[dict[str, Any]]:
    """One entry for each contender, peers first; rates and fractions are medians over the rounds."""
    contenders = sorted(rounds.runs, key=lambda one: not isinstance(one, PeerContender))
    return [_result(contender, rounds, workload, size) for contender in contenders]


def _result(contender: Contender, rounds: Rounds, workload: Workload, size: LinearSize) -> dict[str, Any]:
    seconds = [run.seconds for run in rounds.runs[contender]]
    return {
        "engine": contender.engine,
        "precision": contender.precision,
        "threads": contender.threads,
        "seconds": seconds,
        "output_tokens_per_s": workload.all_output_tokens / median(seconds),
        "total_tokens_per_s": (workload.prompt_tokens + workload.all_output_tokens) / median(seconds),
        "to_best_peer": _ratio(contender, rounds),
        "roofline": _roofline(contender, rounds, workload, size),
        "peak_bytes": max(run.peak_bytes for run in rounds.runs[contender]),
    }


def _ratio(contender: Contender, rounds: Rounds) -> float | None:
    """Median over the rounds of how much faster it is than the best peer with its precision and threads."""
    alike = (contender.precision, contender.threads)
    peers = [
        [run.seconds for run in runs]
        for peer, runs in rounds.runs.items()
        if isinstance(peer, PeerContender) and (peer.precision, peer.threads) == alike
    ]
    if not peers:
        return None
    own = [run.seconds for run in rounds.runs[contender]]
    return median(other / mine for other, mine in zip(min(peers, key=median), own, strict=True))


def _roofline(contender: Contender, rounds: Rounds, workload: Workload, size: LinearSize) -> float:
    """Median over the rounds of the fraction of the better of what the machine could do just before and after."""
    around = zip(rounds.peaks, rounds.peaks[1:], strict=False)
    pairs = [(before[contender.threads], after[contender.threads]) for before, after in around]
    least = [min(least_seconds(peaks, contender.precision, workload, size) for peaks in pair) for pair in pairs]
    own = [run.seconds for run in rounds.runs[contender]]
    return median(bound / mine for bound, mine in zip(least, own, strict=True))


def least_seconds(peaks: Peaks, precision: str, workload: Workload, size: LinearSize) -> float:
    """Seconds that a workload needs at least: of its operations, or of reading weights, for one sequence alone."""
    operations = size.operations(workload) / getattr(peaks, PEAK_OF[precision])
    if len(workload.prompts) > 1:
        return operations
    return max(operations, workload.output_tokens * size.bytes_per_token(precision) / peaks.read)
