"""The paragraph for the methods section of a paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpcinfer.units import format_bytes

Report = dict[str, Any]

_OWN = ("hpcinfer", "kernels", "device", "probe")  # said elsewhere, or of no use to a reader


def methods(report: Report) -> str:
    """Say what was computed with what, so that others can do it again."""
    return " ".join([_software(report), _files(report), _sampling(report), _hardware(report), _cost(report)])


def _software(report: Report) -> str:
    versions, model = report["software"], report["model"]
    named = {name: version for name, version in versions.items() if version and name not in _OWN}
    others = ", ".join(f"{name} {version}" for name, version in named.items())
    precision = report["precision"]
    return (
        f"Completions were generated with hpcinfer {versions['hpcinfer']} ({others}) from the model"
        f" {Path(model['name']).name} ({model['architecture']}, {model['num_weights'] / 1e9:.3g} billion parameters,"
        f" weights {model['weights']}, store digest {model['digest']}), computed in {precision['dtype']} with a KV"
        f" cache in {precision['kv_cache']} by the {precision['kernels']} kernels ({versions['kernels']})."
    )


def _files(report: Report) -> str:
    source, target = report["files"]["input"], report["files"]["output"]
    run = report["run"]
    words = f"The input of {run['num_rows']} rows has the {_hash(source)}"
    if run["stopped"]:
        return f"{words}; the run was stopped ({run['stopped']}) when {run['num_done']} of them were finished."
    if not target["digest"]:
        return f"{words}."
    return f"{words}; the output, in which {run['num_failed']} rows are error records, has the {_hash(target)}."


def _hash(file: Report) -> str:
    if file["sha256"]:
        return f"SHA-256 {file['sha256']}"
    return f"SHA-256 {file['digest']} (over the SHA-256 of each 16 MiB)"


def _sampling(report: Report) -> str:
    values = report["run"]["sampling"]
    names = ("temperature", "top_p", "top_k", "min_p", "max_tokens")
    words = ", ".join(f"{name} {values[name]}" for name in names if name in values)
    return f"Rows that say nothing else were sampled with {words}; the seed is {report['seed']}."


def _hardware(report: Report) -> str:
    nodes, run = report["nodes"], report["run"]
    kinds: dict[str, int] = {}
    for node in nodes:
        memory = f", {format_bytes(node['memory_bytes'])}" if node["memory_bytes"] else ""
        kind = f"{node['cpu'] or 'processors that the system does not name'} ({node['cpus'] or '?'} CPUs{memory})"
        kinds[kind] = kinds.get(kind, 0) + 1
    words = "; ".join(f"{count} node{'s' * (count > 1)} with {kind}" for kind, count in kinds.items())
    launched, lost = len(run["placement"]), len(run["placement"]) - run["world_size"]
    ranks = f"{launched} MPI rank{'s' * (launched > 1)}"
    deaths = f"; {lost} rank{'s' * (lost > 1)} died" if lost else ""
    return f"The run took {ranks} as {run['mesh']} on {words}{deaths}."


def _cost(report: Report) -> str:
    used, energy = report["usage"], report["energy"]
    cost = (f"In this run it gave {used['output_tokens']} output tokens, {used['output_tokens_per_s']:.1f} per second"
            f" once all weights were there, in {used['node_hours']:.4g} node-hours")  # fmt: skip
    if energy["joules"] is None:
        return f"{cost}; its energy could not be measured."
    return f"{cost} and {energy['joules']:.4g} J of {energy['counted']}, others' work on these nodes included."
