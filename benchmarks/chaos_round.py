"""A round of the chaos benchmark: drawn from its seed, played, judged."""

import contextlib
import hashlib
import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

from chaos_journal import Again
from chaos_kinds import Kind
from chaos_recoveries import recoveries
from chaos_scene import MESHES, Places, Scene, Workload

_SLOW_S = 30.0  # of a start


def play(kind: Kind, seed: int, workload: Workload, places: Places, keep: Path) -> dict[str, Any]:
    """Play one round and say what came of it, as JSON values; what a wrong or a slow one wrote is kept."""
    rng = random.Random(seed)
    home = places.disk.folder if kind.is_on_small_disk and places.disk else places.folder
    mesh = rng.choice([mesh for mesh in MESHES if mesh.ranks >= kind.min_ranks])
    options = ["--max-num-seqs", str(rng.choice([2, 4, 8])), "--lease-timeout", "5", *kind.options]
    with places.opened(home / f"round-{seed}") as folder:
        scene = Scene(workload, places, kind.launch, mesh, options, rng, folder)
        with contextlib.closing(scene):
            try:
                scene.start()
                if scene.wait_for(rng.choice(kind.moments)):
                    kind.inflict(scene)
                scene.finish()
            except (OSError, subprocess.TimeoutExpired) as error:  # of the benchmark: the next rounds may be luckier
                scene.problems.append(f"the round broke off: {error!r}")
        result = _judge(kind, seed, str(mesh), scene)
        if not result["is_right"] or max((start.seconds for start in scene.starts), default=0) > _SLOW_S:
            shutil.copytree(folder, keep / folder.name, dirs_exist_ok=True)
    return result


def count_rows(output: bytes, num_rows: int) -> tuple[int, int]:
    """Rows that the output lacks, and rows that it has more than once."""
    rows = []
    for line in output.splitlines():
        with contextlib.suppress(ValueError, KeyError):  # what cannot be read is lost
            rows.append(json.loads(line)["row"])
    return num_rows - len(set(rows)), len(rows) - len(set(rows))


def _judge(kind: Kind, seed: int, mesh: str, scene: Scene) -> dict[str, Any]:
    output = scene.paths.output.read_bytes() if scene.paths.output.exists() else b""
    lost, twice = count_rows(output, len(scene.workload.tokens))
    again = scene.journal.again([fault.time for fault in scene.faults], scene.damaged)
    if kind.may_overlap:
        again = Again(0, again.num_again + again.num_overlaps)
    is_equal = hashlib.sha256(output).digest() == hashlib.sha256(scene.workload.output).digest()
    problems = list(scene.problems)
    if kind.goes_on and len(scene.starts) > 1:
        problems.append("was started again, although it should have gone on")
    exit_codes = [start.exit_code for start in scene.starts[:1]]
    if scene.faults and kind.exit_codes and not set(exit_codes) <= set(kind.exit_codes):
        problems.append(f"ended with {exit_codes[0]}, expected one of {kind.exit_codes}")
    reports = sorted(scene.paths.root.glob("reports/*.json"))
    return {
        "kind": kind.name, "seed": seed, "mesh": mesh, "moment": scene.moment, "begin": scene.begin,
        "faults": [fault._asdict() for fault in scene.faults],
        "starts": [start._asdict() for start in scene.starts],
        "is_equal": is_equal, "rows_lost": lost, "rows_twice": twice,
        "rows_again": again.num_again, "rows_overlapping": again.num_overlaps, "rows_damaged": len(scene.damaged),
        "recoveries": list(recoveries([fault.time for fault in scene.faults], reports)),
        "next_row_s": [_since(fault.time, scene.journal.first_after(fault.time)) for fault in scene.faults],
        "growth": [(round(when, 3), tokens) for when, tokens in scene.journal.growth],
        "problems": problems,
        "is_right": is_equal and lost == twice == again.num_again == 0 and not problems,
    }  # fmt: skip


def _since(moment: float, later: float | None) -> float | None:
    return None if later is None else later - moment
