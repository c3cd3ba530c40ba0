"""Studies on disk: they are found again, they grow, and another one in the same folder is refused."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_study import small_study

from hpcinfer.errors import ConfigError, ManifestError
from hpcinfer.scaling.asking import ask, only_shape
from hpcinfer.scaling.options import StudyOptions
from hpcinfer.scaling.plan import Point, Recipe, Rows, Shape
from hpcinfer.scaling.site import Site
from hpcinfer.scaling.study import Study, load_study

HERE = Site("auto", {})
points = st.builds(Point, st.sampled_from(["strong", "weak"]), st.builds(Shape, st.integers(1, 9), st.integers(1, 9)),
                   st.builds(Recipe, st.sampled_from(["1", "2", "nodes"]), st.sampled_from(["1", "node", "all"]),
                             st.just("")),
                   st.integers(1, 99))  # fmt: skip


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a"}\n' * 12)
    return path


def asked(source, tmp_path, model="m", flags=(), **options):
    wanted = StudyOptions(**{"input": str(source), "output": str(tmp_path / "study"), **options})
    return ask(wanted, model, list(flags), HERE)


@given(st.lists(points, max_size=8, unique=True), st.integers(1, 9))
def test_a_study_is_found_as_it_was(tmp_path_factory, points, repeats):
    study = Study(tmp_path_factory.mktemp("study"), "m", "i", ("--seed=3",), Rows(4, 2), repeats, tuple(points))
    study.save()
    assert load_study(study.folder) == study


def test_points_of_options(source, tmp_path):
    study = asked(source, tmp_path, nodes="1,2", ranks_per_node="2", mesh=("dp", "tp=node"), rows=6)
    assert study.rows == Rows(6, 3) and len(study.points) == 8 and study.repeats == 3
    assert {(point.scaling, point.shape.ranks, point.rows) for point in study.points} == {
        ("strong", 2, 6), ("strong", 4, 6), ("weak", 2, 6), ("weak", 4, 12)}  # fmt: skip
    assert study.flags == (f"--cache-dir={study.folder}/stores",)


def test_repeated_prompts_are_computed_whole(source, tmp_path):
    assert "--no-prefix-reuse" not in asked(source, tmp_path, nodes="1,4").flags
    assert asked(source, tmp_path, nodes="1,4", rows=6).flags[-1] == "--no-prefix-reuse"


def test_a_study_grows(source, tmp_path):
    first = asked(source, tmp_path, nodes="1", rows=2, repeats=2)
    first.save()
    grown = asked(source, tmp_path, nodes="2,4", mesh=("tp=all",), rows=2, repeats=1)
    assert grown.points[: len(first.points)] == first.points and grown.repeats == 2
    assert {point.shape.nodes for point in grown.points} == {1, 2, 4} and grown.rows == first.rows
    assert asked(source, tmp_path, nodes="2").rows == first.rows  # what was not said is as before
    grown.save()
    assert ask(StudyOptions(output=str(first.folder)), "", [], HERE) == grown


@pytest.mark.parametrize(("change", "words"), [
    ({"model": "other"}, "another model"), ({"flags": ("--seed=4",)}, "another flags"), ({"rows": 3}, "another rows"),
])  # fmt: skip
def test_another_study_in_the_folder_is_refused(source, tmp_path, change, words):
    asked(source, tmp_path, rows=2).save()
    with pytest.raises(ManifestError, match=words):
        asked(source, tmp_path, **{"rows": 2, **change})


@pytest.mark.parametrize(("options", "words"), [
    ({"output": ""}, "--output"), ({"rows": 0}, "--rows 0"), ({"repeats": 0}, "--repeats"), ({"nodes": "0"}, "--nodes"),
    ({"mesh": ("x",)}, "--mesh x"), ({"input": ""}, "--model and --input"), ({"run_timeout": 0.0}, "--run-timeout"),
    ({"input": "nowhere"}, "no input at"), ({"model": "", "input": ""}, "no study in"), ({"only": "9x9"}, "--only 9x9"),
])  # fmt: skip
def test_wrong_options_are_named(source, tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        study = asked(source, tmp_path, **options)
        only_shape(study, Shape(9, 9))


def test_damaged_study_is_named(source, tmp_path):
    study = small_study(tmp_path, source)
    study.save()
    values = json.loads((tmp_path / "study.json").read_text())
    del values["points"][0]["mesh"]
    for text in (json.dumps(values), "{"):
        (tmp_path / "study.json").write_text(text)
        with pytest.raises(ConfigError, match=r"study.json is damaged"):
            load_study(tmp_path)


def test_one_shape_of_a_study(source, tmp_path):
    study = replace(small_study(tmp_path, source), repeats=1)
    assert [run.point.shape for run in study.runs(Shape(1, 2))] == [Shape(1, 2)]
    assert only_shape(study, None) is None
