"""The report of a run: what was measured, and what follows from it. docs/report.md says what each key means."""

from __future__ import annotations

from typing import Any

from hpcinfer.report.balance import balance
from hpcinfer.report.bounds import bounds
from hpcinfer.report.classes import mean_shares, time_classes
from hpcinfer.report.events import happenings
from hpcinfer.report.methods import methods
from hpcinfer.report.series import all_series, total_tokens_per_s
from hpcinfer.report.slow_ranks import paces, slow_ranks
from hpcinfer.report.usage import energy, hosts_of, nodes, usage

FORMAT = 2

Report = dict[str, Any]


def complete_report(measured: Report, wall_s: float) -> Report:
    """Add to what was measured what follows from it.

    Args:
        measured: run, ranks, asked, software, precision, model, seed and files.
        wall_s: from the start of the processes until now.
    """
    run, ranks = measured["run"], measured["ranks"]
    hosts = hosts_of(run)
    used_energy = energy(hosts, ranks)
    report = {
        "format": FORMAT, **measured,
        "nodes": nodes(hosts, ranks),
        "energy": used_energy,
        "usage": usage(run, ranks, wall_s, used_energy["joules"]),
        "time": _time(ranks),
        "over_time": _over_time(ranks),
        "balance": balance(ranks).to_json(),
        "bounds": [each._asdict() for each in bounds(run, ranks)],
        "events": [each._asdict() for each in happenings(ranks)],
        "slow_ranks": [str(each) for each in slow_ranks(paces(ranks))],
        "bytes_read": {kind: sum(rank["bytes_read"][kind] for rank in ranks) for kind in ("store", "stage", "input")},
    }  # fmt: skip
    return {**report, "methods": methods(report)}


def _time(ranks: list[Report]) -> Report:
    """Seconds by class, of each rank and as shares of all."""
    by_rank = [time_classes(rank) for rank in ranks]
    rounded = [{name: round(seconds, 4) for name, seconds in each.items()} for each in by_rank]
    return {"by_rank": rounded, "shares": mean_shares(by_rank)}


def _over_time(ranks: list[Report]) -> Report:
    series = all_series(ranks)
    interval_s = series[0].interval_s if series else 0.0
    return {"interval_s": interval_s, "output_tokens_per_s": [round(v, 2) for v in total_tokens_per_s(series)]}
