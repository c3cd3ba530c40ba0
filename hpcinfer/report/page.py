"""The page of a run: one file of HTML, CSS and SVG that opens without a network and without scripts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from hpcinfer.report.charts import Bar, Line, Span, class_bars, line_chart, tail_chart
from hpcinfer.report.classes import CLASSES
from hpcinfer.report.mesh_drawing import MOST_RANKS, draw_mesh, seats_of
from hpcinfer.report.series import Series, all_series, total_tokens_per_s
from hpcinfer.units import format_bytes, format_seconds

Report = dict[str, Any]

_FLAG = re.compile(r"(?<![\w-])--?[a-z][\w-]*")
_MOST_BARS = 64  # of ranks or replicas; of more the first
_CSS = """
body { font: 15px/1.5 Helvetica, Arial, sans-serif; color: #222; max-width: 900px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 2em 0 .5em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; width: 100%; font-size: .93em; } th { text-align: left; }
th, td { padding: .3em .7em .3em 0; border-bottom: 1px solid #eee; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.cards { display: flex; flex-wrap: wrap; gap: .6em; } .card { border: 1px solid #ddd; padding: .4em .9em; }
.card b { display: block; font-size: 1.25em; } .note { color: #666; font-size: .9em; }
svg { max-width: 100%; height: auto; }
span.flag, .bound { white-space: nowrap; } .bound { font-weight: bold; } summary { cursor: pointer; }
p, td { overflow-wrap: anywhere; }
"""


def render_page(report: Report) -> str:
    """Write the page of a report (see docs/report.md)."""
    run, ranks = report["run"], report["ranks"]
    series, run_s = all_series(ranks), report["balance"]["run_s"]
    faults = [event["time_s"] for event in report["events"]]
    title = f"{Path(report['model']['name']).name}: {run['num_rows']} rows as {run['mesh']}"
    sections = [
        f"<h1>{escape(title)}</h1>", _cards(report),
        "<h2>What bounds it</h2>", _bounds(report),
        "<h2>Mesh and placement</h2>", _mesh(run),
        "<h2>Output tokens per second</h2>", _tokens(series, run_s, faults),
        "<h2>Time by class</h2>", _classes(report),
        "<h2>Batches</h2>", _chart("Sequences in a batch", series, "batch_sequences", "sequences", run_s, faults),
        _chart("Tokens in a batch", series, "batch_tokens", "tokens", run_s, faults),
        "<h2>KV cache</h2>", _chart("KV blocks held", series, "kv_use", "share of the blocks", run_s, faults),
        "<h2>Load balance and tail</h2>", _balance(report),
        "<h2>Phases</h2>", _phases(report),
        "<h2>Faults and recoveries</h2>", _events(report),
        "<h2>Cost</h2>", _cost(report),
        "<h2>What was asked</h2>", _asked(report),
        "<h2>For a methods section</h2>", f"<p>{escape(report['methods'])}</p>",
    ]  # fmt: skip
    head = f'<head><meta charset="utf-8"><title>{escape(title)}</title><style>{_CSS}</style></head>'
    body = "\n".join(sections)
    return f'<!DOCTYPE html>\n<html lang="en">{head}\n<body>\n{body}\n</body></html>\n'


def _cards(report: Report) -> str:
    run, used = report["run"], report["usage"]
    values = {
        "output tokens/s": f"{used['output_tokens_per_s']:,.1f}", "output tokens": f"{used['output_tokens']:,}",
        "wall time": format_seconds(used["wall_s"]), "node-hours": f"{used['node_hours']:.4g}",
        "errors": f"{run['num_failed']} of {run['num_rows']} rows",
        "rows are finished" + (f": stopped early ({run['stopped']})" if run["stopped"] else ""): f"{run['num_done']}",
        "recoveries": str(len(report["events"])),
    }  # fmt: skip
    return f'<div class="cards">{"".join(_card(name, value) for name, value in values.items())}</div>'


def _card(name: str, value: str) -> str:
    return f'<div class="card"><b>{escape(value)}</b>{escape(name)}</div>'


def _bounds(report: Report) -> str:
    rows = [[each["phase"], _time(each["seconds"]), each["bound"], each["evidence"], each["hint"] or "–"]
            for each in report["bounds"]]  # fmt: skip
    names = ["phase", "time", "bound by", "evidence", "what would help most"]
    return _table(names, rows, classes=("", "number", "bound"))


def _mesh(run: Report) -> str:
    seats = seats_of(run["placement"])
    note = f"<p class='note'>The first {MOST_RANKS} of {len(seats)} ranks.</p>" if len(seats) > MOST_RANKS else ""
    return draw_mesh(seats) + note + "<p class='note'>As the run began; a row is a stage, colours are nodes.</p>"


def _tokens(series: Sequence[Series], run_s: float, faults: Sequence[float]) -> str:
    lines = [Line(f"replica {each.replica}", each.interval_s, each.tokens_per_s) for each in series]
    if 1 < len(lines) <= 7:
        lines = [*lines, Line("all", series[0].interval_s, total_tokens_per_s(series))]
    return line_chart("Output tokens per second", lines, "tokens/s", run_s, faults)


def _chart(title: str, series: Sequence[Series], field: str, unit: str, run_s: float, faults: Sequence[float]) -> str:
    lines = [Line(f"replica {each.replica}", each.interval_s, getattr(each, field)) for each in series]
    return line_chart(title, lines, unit, run_s, faults)


def _classes(report: Report) -> str:
    by_rank, ranks = report["time"]["by_rank"], report["ranks"]
    bars = [Bar(f"rank {rank['rank']} ({rank['host']})", [each[name] for name in CLASSES])
            for each, rank in zip(by_rank, ranks, strict=True)][:_MOST_BARS]  # fmt: skip
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in report["time"]["shares"].items())
    note = f" The first {_MOST_BARS} of {len(ranks)} ranks." if len(ranks) > _MOST_BARS else ""
    return class_bars(bars) + f"<p class='note'>All ranks: {shares}.{note}</p>"


def _balance(report: Report) -> str:
    work = report["balance"]
    spans = [Span(f"replica {each['replica']}", each["last_step_s"], f"{each['output_tokens']:,} tokens")
             for each in work["replicas"]][:_MOST_BARS]  # fmt: skip
    if not spans or work["run_s"] <= 0:
        return "<p>No replica has computed.</p>"
    words = (f"The tail is {_time(work['tail_s'])} long; {100 * work['tail_idle_share']:.0f} % of it was idle,"
             f" {100 * work['run_idle_share']:.1f} % of the whole run. The busiest replica gave"
             f" {work['token_spread']:.2f} times the mean of the output tokens.")  # fmt: skip
    return tail_chart(spans, work["run_s"]) + f"<p class='note'>{escape(words)}</p>"


def _phases(report: Report) -> str:
    run, ranks = report["run"], report["ranks"]
    longest = {name: max(rank["phases"].get(name, 0.0) for rank in ranks) for name in run["seconds"]}
    busy = {name: sum(rank["cpu_seconds"].get(name, 0.0) for rank in ranks) for name in run["seconds"]}
    rows = [[name, _time(seconds), _time(longest[name]), _time(busy[name])]
            for name, seconds in run["seconds"].items()]  # fmt: skip
    table = _table(["phase", f"rank {ranks[0]['rank']}", "longest of all ranks", "CPU time of all ranks"], rows,
                   classes=("", "number", "number", "number"))  # fmt: skip
    steps = ", ".join(f"{escape(name)} {_time(value)}" for name, value in ranks[0]["seconds"].items())
    return f"{table}<p class='note'>Inside the run, rank {ranks[0]['rank']}: {steps}.</p>"


def _events(report: Report) -> str:
    rows = [[f"{each['time_s']:.2f} s", f"replica {each['replica']}", each["text"]] for each in report["events"]]
    slow = "".join(f"<p>{escape(words)}</p>" for words in report["slow_ranks"])
    return (_table(["when", "where", "what"], rows, classes=("number",)) if rows else "<p>None.</p>") + slow


def _cost(report: Report) -> str:
    used, energy, read = report["usage"], report["energy"], report["bytes_read"]
    per_million = used["joules_per_million_output_tokens"]
    hours = used["node_hours_per_million_output_tokens"]
    rows = [
        ["wall time", format_seconds(used["wall_s"])],
        ["node-hours", f"{used['node_hours']:.4g} on {used['nodes']} node{'s' * (used['nodes'] > 1)}"],
        ["node-hours per million output tokens", f"{hours:.4g}" if hours is not None else "–"],
        [f"energy of {energy['counted'] or 'the nodes'}", _energy(energy)],
        ["joules per million output tokens", f"{per_million:,.0f} J" if per_million is not None else "not known"],
        ["read from the store", f"{format_bytes(read['store'])}, from the stage {format_bytes(read['stage'])}"],
        ["rows read from the input", format_bytes(read["input"])],
    ]
    return _table(["", ""], rows)


def _energy(energy: Report) -> str:
    words = f"{energy['joules']:,.0f} J" if energy["joules"] is not None else ""
    return "; others: ".join(filter(None, (words, energy["why_not"])))


def _asked(report: Report) -> str:
    files = [[f"{name} SHA-256", file["sha256"] or f"{file['digest']} (over the SHA-256 of each 16 MiB)"]
             for name, file in report["files"].items() if file["digest"]]  # fmt: skip
    rows = [["model", f"{report['model']['name']}, digest {report['model']['digest']}"], *files,
            *([name, value] for name, value in report["software"].items())]  # fmt: skip
    options = [[name, str(value)] for name, value in report["asked"].items()]
    return (f"{_table(['', ''], rows)}<details><summary>All options</summary>{_table(['option', 'value'], options)}"
            "</details>")  # fmt: skip


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> str:
    kinds = [*classes, *[""] * (len(names) - len(classes))]
    head = "".join(f'<th class="{kind}">{escape(name)}</th>' for name, kind in zip(names, kinds, strict=True))
    body = "".join(_row(row, kinds) for row in rows)
    return f"<table>{f'<tr>{head}</tr>' if any(names) else ''}{body}</table>"


def _row(cells: Sequence[str], kinds: Sequence[str]) -> str:
    inside = "".join(f'<td class="{kind}">{_cell(cell)}</td>' for cell, kind in zip(cells, kinds, strict=True))
    return f"<tr>{inside}</tr>"


def _cell(text: str) -> str:
    """Write a cell; flags are not broken."""
    return _FLAG.sub(r'<span class="flag">\g<0></span>', escape(text))


def _time(seconds: float) -> str:
    return format_seconds(seconds) if seconds >= 1 else f"{1e3 * seconds:.0f} ms"
