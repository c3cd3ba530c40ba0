"""The summary of a run, from the reports of its ranks."""

from collections import Counter
from pathlib import Path
from typing import Any

from hpcinfer.report.bounds import bounds, main_bound
from hpcinfer.report.rates import rates_of
from hpcinfer.report.slow_ranks import paces, slow_ranks
from hpcinfer.units import format_bytes, format_seconds

_COMMON = ("temperature", "top_p", "max_tokens")
_MANY = 0.5  # of the rows or choices: the summary warns from here on


def merge_counts(reports: list[dict[str, Any]], section: str) -> Counter[str]:
    """Add up one section of counts over all ranks."""
    total: Counter[str] = Counter()
    for report in reports:
        total.update(report.get(section, {}))
    return total


def summary_lines(run: dict[str, Any], ranks: list[dict[str, Any]], page: Path | None = None) -> list[str]:
    """Write the summary.

    Args:
        run: of the whole run: mesh, seconds by phase, seconds until it was loaded, rows of the output.
        ranks: reports of ranks: rank, seconds, counts, finish_reasons, errors, tokens, place, kernels.
        page: where the page of the run is, if there is one.
    """
    tokens, rates = merge_counts(ranks, "tokens"), rates_of(run, ranks)
    lines = [
        f"output    {run['num_rows']} rows, {run['num_failed']} of them errors",
        f"this run  {merge_counts(ranks, 'rows')['finished']} rows of a {run['input_kind']} input;"
        f" finish reasons: {_list(merge_counts(ranks, 'finish_reasons'))};"
        f" errors: {_list(merge_counts(ranks, 'errors'))}",
        f"tokens    {tokens['prompt']} prompt, {tokens['output']} output;"
        f" {rates.output:.1f} output tokens/s, {rates.total:.1f} total tokens/s",
        f"mesh      {run['mesh']}, {run['world_size']} ranks; KV cache {format_bytes(run['kv_cache_bytes'])} per rank",
        f"time      {_times(run['seconds'])}",
        f"steps     {_times(ranks[0]['seconds'])} (rank {ranks[0]['rank']})",
        f"defaults  {_defaults(run)}",
        *_bound(run, ranks),
    ]
    if page is not None:
        lines.append(f"report    {page}")
    return lines + _warnings(ranks, run)


def _warnings(ranks: list[dict[str, Any]], run: dict[str, Any]) -> list[str]:
    num_choices = merge_counts(ranks, "finish_reasons").total()
    num_cut = merge_counts(ranks, "rows")["cut_by_default"]
    examples = {code: text for rank in ranks for code, text in rank.get("examples", {}).items()}
    warnings = [f"error     {code}, {text}" for code, text in sorted(examples.items())]
    if run["num_failed"] > _MANY * run["num_rows"]:
        warnings.append("warning   most rows are error records (--fail-on-error makes that an exit code)")
    if num_cut > _MANY * max(1, num_choices):
        warnings.append(
            f"warning   {num_cut} of {num_choices} completions were cut at the default max_tokens"
            f" ({run['sampling']['max_tokens']}); raise --max-tokens if they should end by themselves"
        )
    return warnings + [f"warning   {slow}" for slow in slow_ranks(paces(ranks))]


def _bound(run: dict[str, Any], ranks: list[dict[str, Any]]) -> list[str]:
    """What bounds the longest phase."""
    found = main_bound(bounds(run, ranks))
    if found is None:
        return []
    hint = f"; what would help most: {found.hint}" if found.hint else ""
    return [f"bound     {found.bound} in the {found.phase} ({found.evidence}){hint}"]


def _defaults(run: dict[str, Any]) -> str:
    """Sampling values of rows that say nothing: the common ones, and those that somebody has set."""
    origins = run["origins"]
    names = [name for name in run["sampling"] if name in _COMMON or origins[name] != "hpcinfer"]
    return ", ".join(f"{name}={run['sampling'][name]} ({origins[name]})" for name in names)


def _list(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"


def _times(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {format_seconds(value)}" for name, value in seconds.items())
