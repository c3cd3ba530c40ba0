"""The result of the throughput benchmark as text."""

from typing import Any

from agreement import CLEAR_MARGIN


def lines(result: dict[str, Any]) -> list[str]:
    """Write all tables."""
    return [*_head(result), *_roofline(result), *_rates(result), *_breakdown(result), *_verdict(result)]


def _head(result: dict[str, Any]) -> list[str]:
    machine = result["machine"]
    return [
        f"model     {result['model']}; {result['workload']}: {result['prompts']} prompts, "
        f"{result['prompt_tokens']} prompt tokens, {result['output_tokens']} output tokens, {result['sampling']}"
        + "".join(f" {option}" for option in result["job_options"]),
        f"machine   {machine['cpu']}, {machine['cores']} cores, load {machine['load']:.1f}",
        "versions  " + ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        f"needed    {result['operations'] / 1e12:.2f} TOP in linear layers",
    ]


def _roofline(result: dict[str, Any]) -> list[str]:
    """The least and the most that was measured around the rounds."""
    table = ["", f"{'roofline':<34} threads  float32 GFLOP/s     int8 GOP/s  read GB/s"]
    for threads in result["roofline"][0]:
        ranges = []
        for name in ("f32", "int8", "read"):
            values = [peaks[threads][name] / 1e9 for peaks in result["roofline"]]
            ranges.append(f"{min(values):.0f}-{max(values):.0f}")
        table.append(f"{'':<34} {threads:>7} {ranges[0]:>16} {ranges[1]:>14} {ranges[2]:>10}")
    return table


def _rates(result: dict[str, Any]) -> list[str]:
    names = "threads  output tokens/s  total tokens/s  to best peer  roofline  peak MiB  seconds by round"
    table = ["", f"{'':<34} {names}"]
    for item in result["contenders"]:
        ratio = "" if item["to_best_peer"] is None else f"{item['to_best_peer']:.2f}"
        table.append(
            f"{item['engine'] + ', ' + item['precision']:<34} {item['threads']:>7} {item['output_tokens_per_s']:>16.1f}"
            f" {item['total_tokens_per_s']:>15.1f} {ratio:>13} {100 * item['roofline']:>7.1f} %"
            f" {item['peak_bytes'] / 2**20:>9.0f}  " + " ".join(f"{s:.2f}" for s in item["seconds"])
        )
    return table


def _breakdown(result: dict[str, Any]) -> list[str]:
    table: list[str] = []
    for item in result["breakdowns"]:
        total = sum(item["seconds"].values())
        table += ["", f"seconds of {item['engine']}, {item['precision']}, {item['threads']} threads"]
        table += [f"  {kind:<26} {s:>9.2f} ({100 * s / total:4.1f} %)" for kind, s in item["seconds"].items()]
        table.append(f"  {'all':<26} {total:>9.2f}")
    return table


def _verdict(result: dict[str, Any]) -> list[str]:
    table = [""]
    for answer, num_outputs in result["num_outputs"].items():
        table.append(f"outputs of all {answer} jobs: {'the same bytes' if num_outputs == 1 else 'THEY DIFFER'}")
    table += [f"{peer} is not installed: left out" for peer in result["missing_peers"]]
    agreement = result["agreement"]
    if agreement is None:
        return [*table, "nothing to compare with transformers'"]
    equal = "{equal} of {rows} float32 rows equal transformers'; {clear_equal} of {clear}".format(**agreement)
    return [*table, f"{equal} whose every token leads by more than {CLEAR_MARGIN:g} of the largest logit"]
