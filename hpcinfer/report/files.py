"""Reports and pages in the job directory: each appears whole, the newest under a name of its own too."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from hpcinfer.report.page import render_page


def write_report(job_directory: Path, report: dict[str, Any]) -> Path:
    """Keep the report of a run in the job directory, under a new name; the newest is report.json, and report.html.

    Returns:
        The path of the page.
    """
    folder = job_directory / "reports"
    folder.mkdir(exist_ok=True)
    text = json.dumps(report, indent=None, separators=(",", ": ")) + "\n"
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}.json"
    for path in (folder / name, job_directory / "report.json"):
        write_whole(path, lambda file: file.write(text))
    page = job_directory / "report.html"
    write_whole(page, lambda file: file.write(render_page(report)))
    return page


def write_whole(path: Path, write: Callable[[TextIO], Any]) -> None:
    """Write a file that appears whole, in the place of whatever has its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.time_ns() % 10**9}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            write(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
