"""A job directory in words, for `hpcinfer inspect` and `hpcinfer status`."""

from pathlib import Path

from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.manifest import Manifest, read_manifest
from hpcinfer.recovery.progress import SILENT_S, Progress, Worker, progress
from hpcinfer.units import format_bytes, format_seconds


def is_job_directory(path: Path) -> bool:
    """Whether a path is a job directory. Not collective."""
    return path.name.endswith(".job") and (path / "manifest.json").is_file()


def describe(path: Path) -> list[str]:
    """Tell what a job directory holds, a line each. Not collective."""
    paths = JobPaths(path.with_name(path.name.removesuffix(".job")))
    numbers = progress(paths)
    lines = [f"job directory {paths.root}", *describe_progress(numbers), "manifest:"]
    lines += [f"  {line}" for line in _tree(read_manifest(paths))]
    lines += ["files:"]
    for item in sorted(paths.root.iterdir()):
        if not item.name.startswith("."):
            lines.append(f"  {item.name:<14} {_size(item)}")
    return lines


def describe_progress(numbers: Progress | None) -> list[str]:
    """Tell how far a job is, a line each. Not collective."""
    if numbers is None:
        return ["rows       not known: the job has no index yet"]
    share = 100 * numbers.num_done / numbers.num_rows
    lines = [f"rows       {numbers.num_rows}",
             f"done       {numbers.num_done} ({share:.1f} %)",
             f"failed     {numbers.num_failed}"]
    if numbers.attempt:
        lines.append(f"retry      {numbers.attempt}, {numbers.num_unfinished} rows left")
    lines.append(f"state      {_state(numbers)}")
    if numbers.rows_per_s and numbers.time_left_s is not None and numbers.num_unfinished:
        lines.append(f"rate       {numbers.rows_per_s:.2f} rows/s, {format_seconds(numbers.time_left_s)} left")
    return lines + [f"worker     {_worker(worker)}" for worker in numbers.workers]


def _state(numbers: Progress) -> str:
    if numbers.is_merged:
        return "complete, the output is written"
    if numbers.num_unfinished == 0:
        return "all rows finished, not merged yet"
    if not numbers.workers:
        return "stopped; the same command goes on with it"
    silence_s = min(worker.sign_of_life_s for worker in numbers.workers)
    return "running" if silence_s < SILENT_S else f"no sign of life for {format_seconds(silence_s)}"


def _worker(worker: Worker) -> str:
    job = f", Slurm job {worker.slurm_job_id}" if worker.slurm_job_id else ""
    return f"{worker.host} pid {worker.pid}{job}: last sign of life {format_seconds(worker.sign_of_life_s)} ago"


def _tree(values: Manifest) -> list[str]:
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += [f"{name}:", *(f"  {line}" for line in _tree(value))]
        else:
            lines.append(f"{name}: {value}")
    return lines


def _size(item: Path) -> str:
    if item.is_file():
        return format_bytes(item.stat().st_size)
    files = [path for path in item.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return f"{len(files)} files, {format_bytes(sum(path.stat().st_size for path in files))}"
