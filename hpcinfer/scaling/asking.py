"""From the options to the study: a new one, one that goes on, or one that grows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hpcinfer.errors import ConfigError
from hpcinfer.scaling.auto import Room, choose_recipes, choose_shapes, read_limits
from hpcinfer.scaling.cores import threads_of
from hpcinfer.scaling.inputs import count_rows
from hpcinfer.scaling.options import StudyOptions
from hpcinfer.scaling.plan import STRONG, WEAK, Recipe, Shape, parse_numbers, parse_recipe, plan_points, plan_rows
from hpcinfer.scaling.site import Site
from hpcinfer.scaling.study import Study, load_study

_ANEW = "--no-prefix-reuse"


def ask(options: StudyOptions, model: str, flags: Sequence[str], site: Site) -> Study:
    """Make the study that the options describe; without a model and an input the one that is there.

    Args:
        options: of the command.
        model: that is run.
        flags: more options of `hpcinfer run`, for all runs.
        site: where this command runs.

    Raises:
        ConfigError: options out of range, or too few of them.
    """
    _check(options)
    folder = Path(options.output).absolute()
    there = load_study(folder)
    if not (model or options.input):
        if there is None:
            raise ConfigError(f"no study in {folder}", expected="--model and --input for a new one")
        return there
    if not (model and options.input):
        raise ConfigError("one of --model and --input is missing", expected="both, or none for a study that is there")
    wanted = _plan(options, model, [*flags, *options.run_option], site, there)
    return there.grown(wanted) if there else wanted


def _plan(options: StudyOptions, model: str, flags: Sequence[str], site: Site, there: Study | None) -> Study:
    """What the options alone describe; what they leave open is as in the study that is there."""
    folder = Path(options.output).absolute()
    shapes = _shapes(options, site, threads_of(flags))
    recipes = choose_recipes(shapes, read_limits(model)) if options.auto and not options.mesh else _recipes(options)
    source = Path(options.input).absolute()
    available = count_rows(source)
    rows = plan_rows(shapes, options.rows, available)
    if there and options.rows in (None, there.rows.strong):
        rows = there.rows
    points = plan_points(_scalings(options), shapes, recipes, rows)
    asked = _flags(folder, model, flags)
    if max(point.rows for point in points) > available or (there and _ANEW in there.flags):
        asked = tuple(dict.fromkeys([*asked, _ANEW]))  # else a prompt that comes again would cost less
    return Study(folder, _absolute(model), str(source), asked, rows, options.repeats, tuple(points))


def only_shape(study: Study, shape: Shape | None) -> Shape | None:
    """Check that a study has points of a shape.

    Raises:
        ConfigError: it has none.
    """
    if shape is not None and not study.runs(shape):
        shapes = ", ".join(map(str, sorted({point.shape for point in study.points})))
        raise ConfigError(f"--only {shape}: the study has no such points", expected=shapes)
    return shape


def _check(options: StudyOptions) -> None:
    if not options.output:
        raise ConfigError("--output is missing", expected="a folder for the study")
    for name in ("rows", "repeats"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}", expected="a number of at least 1")
    if options.run_timeout is not None and not options.run_timeout > 0:
        raise ConfigError(f"--run-timeout {options.run_timeout}", expected="a number above 0")


def _shapes(options: StudyOptions, site: Site, threads: int | None) -> list[Shape]:
    if options.auto and not options.nodes:
        asked = parse_numbers(options.ranks_per_node, "--ranks-per-node")[-1] if options.ranks_per_node else None
        ranks = asked or site.slots or (1 if site.hosts else _ranks_here(site, threads))
        return choose_shapes(Room(len(site.hosts) if site.hosts else 1, ranks))
    nodes = parse_numbers(options.nodes or "1", "--nodes")
    ranks_per_node = parse_numbers(options.ranks_per_node or str(site.slots or 1), "--ranks-per-node")
    return [Shape(count, ranks) for count in nodes for ranks in ranks_per_node]


def _ranks_here(site: Site, threads: int | None) -> int:
    """As many ranks as this host has cores for their threads."""
    from hpcinfer.engine.placement import resolve_threads
    from hpcinfer.kernels.native.library import available_cpus, cores_of

    return max(1, len(cores_of(available_cpus())) // resolve_threads(threads, site.environment))


def _recipes(options: StudyOptions) -> list[Recipe]:
    return list(dict.fromkeys(map(parse_recipe, options.mesh or ("dp",))))


def _scalings(options: StudyOptions) -> list[str]:
    return [STRONG, WEAK] if options.scaling == "both" else [options.scaling]


def _absolute(model: str) -> str:
    return str(Path(model).absolute()) if Path(model).exists() else model


def _flags(folder: Path, model: str, flags: Sequence[str]) -> tuple[str, ...]:
    """What all runs get; a store that has to be made first is made once."""
    is_named = "HPCINFER_CACHE" in os.environ or any(flag.startswith("--cache-dir") for flag in flags)
    is_store = (Path(model) / "index.h5").exists()
    return (*flags, *([] if is_named or is_store else [f"--cache-dir={folder / 'stores'}"]))
