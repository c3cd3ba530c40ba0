"""Table, CSV and plots of made-up runs."""

import csv
import re
from pathlib import Path

import pytest
from made_up_study import made_up_report, write_run

from hpcinfer import __version__
from hpcinfer.scaling.losses import SHARES
from hpcinfer.scaling.plan import Point, Recipe, Rows, Shape
from hpcinfer.scaling.results import collect, same_bytes, series_of
from hpcinfer.scaling.study import Study, read_json, write_json
from hpcinfer.scaling.table import CSV_COLUMNS, table, write_csv

TABLE = """\
MODEL, INPUT; hpcinfer VERSION
options: --seed=3
tokens/s: output tokens in the phase `run` from when all weights were there, median of the runs; ideal: rate
per core of the point on fewest cores (of several the fastest), times the cores; rank-seconds: of all ranks,
from the launcher's start to its end; slower: computing beyond what that point needs for as many tokens

strong scaling: the same rows everywhere
mesh  nodes  ranks  cores  rows  runs  tokens/s  least-most  ideal  efficiency  run s  wall s
dp        1      1      1     4   2/2       5.0     5.0-5.0    5.0       100 %  10.00   13.00
dp        1      2      2     4   2/2       8.0     8.0-8.0   10.0        80 %  12.50   15.50
dp        1     4*      2     4   1/2      10.0   10.0-10.0   10.0       100 %  20.00   23.00
* more threads than cores, from 1x4 on: the ideal is that of the cores at hand; \
computing lasts longer there because ranks take turns

% of rank-seconds
mesh  nodes  ranks  computing  slower  communication  bubbles  imbalance  I/O  other  start-up
dp        1      1       38.5     0.0            0.0      0.0       30.8  0.8    7.7      22.3
dp        1      2       32.3     8.1            0.0      0.0       32.3  0.6    8.1      18.7
dp        1     4*       21.7    21.7            0.0      0.0       34.8  0.4    8.7      12.6

strong, dp: Amdahl: rate 5.1/s, contention 0.3333; residual 3.1 % of 3 points; of this machine, whose cores ranks share
strong, dp: USL: rate 5.0/s, contention 0.1667, coherency 0.041667; residual 0.0 % of 3 points, \
as many as it has parameters; highest at 4 ranks; of this machine, whose cores ranks share

outputs of 4 rows: the same bytes in all runs, digest abababababababab
failed: 1x4-dp4-pp1-tp1-rows4, run 2: exit code 3 after 1.0 s, FOLDER/runs/1x4-dp4-pp1-tp1-rows4/1/log
    one
    two
failed: 1x4, tp=3: dp(1) * pp(1) * tp(3) = 3 != world size (4)"""


@pytest.fixture
def study(tmp_path):
    """One, two and four ranks on two cores; the last run of the last point has failed, and a mesh is wrong."""
    points = [Point("strong", Shape(1, ranks), Recipe(), 4) for ranks in (1, 2, 4)]
    points.append(Point("strong", Shape(1, 4), Recipe(tp="3"), 4))
    study = Study(tmp_path, "MODEL", "INPUT", ("--seed=3",), Rows(4, 4), 2, tuple(points))
    (tmp_path / "cores").mkdir()
    for ranks in (1, 2, 4):
        write_json(tmp_path / f"cores/1x{ranks}.json", {"num_cores": min(ranks, 2), "machines": 1, "threads": 1})
    for run in study.runs():
        ranks = run.point.shape.ranks
        run_s = {1: 10.0, 2: 12.5, 4: 20.0}[ranks]
        is_bad = (ranks, run.repeat) == (4, 1)
        write_run(run, 1.0 if is_bad else run_s + 3, made_up_report(ranks, run_s), exit_code=3 if is_bad else 0)
    return study


def test_table_is_as_it_was(study):
    text = "\n".join(table(study, collect(study)))
    assert text.replace(str(study.folder), "FOLDER").replace(__version__, "VERSION") == TABLE


def test_csv_has_a_line_for_each_point_and_says_what_the_table_says(study):
    rows = list(csv.DictReader(write_csv(collect(study)).splitlines()))
    assert [row["ranks"] for row in rows] == ["1", "2", "4"] and tuple(rows[0]) == CSV_COLUMNS
    assert [float(row["efficiency"]) for row in rows] == [1.0, 0.8, 1.0]
    assert [(row["runs"], row["tokens_per_s"], row["ideal_tokens_per_s"]) for row in rows][1] == ("2", "8", "10")
    for row in rows:
        shares = [float(value) for name, value in row.items() if name.startswith("share_")]
        assert sum(shares) == pytest.approx(1, abs=1e-4)
    assert len([name for name in CSV_COLUMNS if name.startswith("share_")]) == len(SHARES)


def test_outputs_that_differ_are_told(study):
    path = study.runs()[0].report
    write_json(path, {**read_json(path), "files": {"output": {"digest": "cd" * 32}}})
    results = collect(study)
    assert len(same_bytes(results)[4]) == 2 and "outputs of 4 rows: THE OUTPUTS DIFFER" in table(study, results)


def test_rate_is_that_since_the_weights_were_there(study):
    path = study.runs()[0].report
    report = read_json(path)
    write_json(path, {**report, "run": {**report["run"], "loaded_s": 5.0}})
    first, second = collect(study)[0].samples
    assert (first.rate, first.run_s) == (2 * second.rate, second.run_s)


def test_outputs_that_are_deleted_keep_their_results(study):
    text = table(study, collect(study))
    for run in study.runs():
        run.output.unlink()
    assert table(study, collect(study)) == text


def test_points_with_cores_of_their_own_are_fitted_alone_where_they_are_enough(study):
    assert [series.fits_crowded for series in series_of(collect(study))] == [True]
    write_json(study.folder / "cores/1x4.json", {"num_cores": 4, "machines": 1, "threads": 1})
    assert [series.fits_crowded for series in series_of(collect(study))] == [False]


def test_too_few_points_are_told(study):
    for run in study.runs(Shape(1, 4)):
        run.ending.unlink()
    text = "\n".join(table(study, collect(study)))
    assert "strong, dp: no USL, it takes 3 numbers of ranks" in text and "Amdahl: rate" in text
    for run in study.runs(Shape(1, 2)):
        run.ending.unlink()
    assert "strong, dp: no fit, 1 number of ranks is too few" in "\n".join(table(study, collect(study)))


def test_unknown_cores_are_told(study):
    (study.folder / "cores/1x2.json").unlink()
    lines = table(study, collect(study))
    assert any(re.fullmatch(r"dp +1 +2 +\? .*", line) for line in lines)
    assert "? the cores of the ranks are not known: the ideal takes one for each thread" in lines


def test_a_study_without_runs_has_a_table(tmp_path):
    study = Study(tmp_path, "m", "i", (), Rows(1, 1), 1, (Point("weak", Shape(1, 1), Recipe(), 1),))
    assert any(line.startswith("weak scaling") for line in table(study, collect(study)))
    assert write_csv(collect(study)) == ",".join(CSV_COLUMNS) + "\n"


def test_plots_have_their_words(study):
    pytest.importorskip("matplotlib", reason="no matplotlib: the extra plot")
    from hpcinfer.scaling.plots import draw

    paths = draw(collect(study), study.folder, "svg")
    assert [path.name for path in paths] == ["scaling.svg", "losses.svg"]
    scaling, losses = (_words(path) for path in paths)
    for word in ("USL fit, extrapolated", "ideal of the cores at hand", "hollow: ranks share cores", "efficiency, %",
                 "output tokens/s", "strong scaling, 4 rows", "ranks (nodes x ranks on each)"):  # fmt: skip
        assert word in scaling, word
    for word in (*SHARES, "strong, dp, 1x4*"):
        assert word in losses, word
    assert not list(study.folder.glob("*.tmp.*"))


def test_nothing_is_drawn_where_nothing_was_measured(tmp_path):
    pytest.importorskip("matplotlib", reason="no matplotlib: the extra plot")
    from hpcinfer.scaling.plots import draw

    assert draw([], tmp_path, "png") == [] and not list(tmp_path.iterdir())


def _words(path: Path) -> str:
    """The texts of an SVG: matplotlib draws their letters as shapes, and says them in comments."""
    return "\n".join(re.findall(r"<!-- (.*?) -->", path.read_text()))
