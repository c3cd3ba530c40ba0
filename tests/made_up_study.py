"""Studies without MPI: an mpiexec that is a script and writes the reports of runs that never were."""

import json
import sys
from pathlib import Path
from typing import Any

from hpcinfer.scaling.plan import Point, Recipe, Rows, Shape
from hpcinfer.scaling.study import Run, Study, write_json

# What it does is in behaviour.json beside it: cores, and by a word of the command line how a run fails.
_MPIEXEC = """#!{python} -S
import json, pathlib, sys, time
here = pathlib.Path(sys.argv[0]).parent
if sys.argv[1:] == ["--version"]:
    print("mpiexec (Open MPI) 5.0")
    raise SystemExit
behaviour = json.loads((here / "behaviour.json").read_text())
ranks = int(sys.argv[sys.argv.index("-n") + 1])
with open(here / "calls", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if "hpcinfer.scaling.cores" in sys.argv:
    print("\\n".join([json.dumps({{"machine": "m", "cores": list(range(behaviour["cores"])), "threads": 1}})] * ranks))
    raise SystemExit
for word, code in behaviour.get("fails", {{}}).items():
    if word in sys.argv:
        print("the reason, in words\\n" + 70 * "-" + "\\nprterun detected that one or more processes exited")
        raise SystemExit(code)
time.sleep(behaviour.get("sleeps", 0))
values = dict(arg[2:].split("=", 1) for arg in sys.argv if arg.startswith("--") and "=" in arg)
output = pathlib.Path(values["output"])
output.write_bytes(pathlib.Path(values["input"]).read_bytes())
reports = pathlib.Path(str(output) + ".job", "reports")
reports.mkdir(parents=True)
(reports / "1.json").write_text(json.dumps({{**behaviour["report"], "ranks": behaviour["report"]["ranks"] * ranks}}))
"""


def made_up_rank(run_s: float, *, computing: float = 0.5, tokens: int = 50, **place: int) -> dict[str, Any]:
    """Report of a rank that computes for a part of the time, and waits for work in the rest but a tenth."""
    return {
        "host": "h0",
        "place": {"replica": 0, "pp": 1, "tp": 1, **place},
        "seconds": {"forward": computing * run_s, "waiting for work": (0.9 - computing) * run_s, "scheduling": 0.0},
        "kernels": {"products": computing * run_s},
        "tokens": {"prompt": tokens, "output": tokens, "resumed": 0},
    }


def made_up_report(num_ranks: int, run_s: float, **rank: Any) -> dict[str, Any]:
    """Report of a run of so many ranks."""
    return {"run": {"seconds": {"load": 0.1, "run": run_s, "merge": 0.1}}, "files": {"output": {"digest": "ab" * 32}},
            "ranks": [made_up_rank(run_s, **rank) for _ in range(num_ranks)]}  # fmt: skip


def fake_mpiexec(folder: Path, **behaviour: Any) -> Path:
    """Write the script and what it does; returns its path. Its calls are in `calls` beside it."""
    folder.mkdir(exist_ok=True)
    path = folder / "mpiexec"
    path.write_text(_MPIEXEC.format(python=sys.executable))
    path.chmod(0o755)
    values = {"cores": 2, "report": made_up_report(1, 1.0), **behaviour}
    (folder / "behaviour.json").write_text(json.dumps(values))
    return path


def calls_of(mpiexec: Path, word: str) -> list[str]:
    """Calls of the script that have a word."""
    path = mpiexec.with_name("calls")
    return [line for line in path.read_text().splitlines() if word in line] if path.exists() else []


def small_study(folder: Path, source: Path, *recipes: Recipe, repeats: int = 2,
                shapes: tuple[Shape, ...] = (Shape(1, 1), Shape(1, 2))) -> Study:
    """Strong scaling over one and two ranks of one node, four rows each."""
    points = tuple(Point("strong", shape, recipe, 4) for recipe in recipes or (Recipe(),) for shape in shapes)
    return Study(folder, "model", str(source), ("--seed=3",), Rows(4, 4), repeats, points)


def write_run(run: Run, wall_s: float, report: dict[str, Any] | None, exit_code: int = 0, text: str = "a\n") -> None:
    """Write what a run leaves."""
    reports = Path(f"{run.output}.job", "reports")
    reports.mkdir(parents=True)
    run.output.write_text(text)
    run.log.write_text("one\ntwo\n")
    if report:
        write_json(reports / "1.json", report)
    write_json(run.ending, {"exit_code": exit_code, "seconds": wall_s, "started": "", "command": []})
