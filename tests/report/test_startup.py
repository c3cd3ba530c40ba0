"""The start of a process is told in seconds since it began."""

import json
import subprocess
import sys
import time
from pathlib import Path

from hpcinfer.report.startup import FIRST_TOKEN, Startup


def test_seconds_count_from_the_start_of_the_process() -> None:
    code = (
        "import time; time.sleep(0.5)\n"
        "from hpcinfer.report.startup import STARTUP\n"
        "STARTUP.mark('world'); STARTUP.mark('first token')\n"
        "import json; print(json.dumps(STARTUP.to_json()))"
    )
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    report = json.loads(run.stdout)
    assert 0.45 < report["seconds"]["world"] <= report["seconds"][FIRST_TOKEN] < time.monotonic() - start + 0.1
    assert report["read_calls"] > 0 and report["bytes_read"] > report["read_calls"]


def test_only_the_first_of_each_counts_and_the_first_token_ends_it() -> None:
    startup = Startup()
    startup.mark("loaded")
    startup.mark(FIRST_TOKEN)
    before = startup.to_json()
    for event in ("loaded", FIRST_TOKEN, "set up"):
        startup.mark(event)
    assert startup.to_json() == before and list(before["seconds"]) == ["loaded", FIRST_TOKEN]


def test_where_the_system_tells_nothing_the_clock_starts_now(tmp_path: Path) -> None:
    startup = Startup(str(tmp_path / "no process"))
    startup.mark(FIRST_TOKEN)
    assert startup.to_json() == {"seconds": {FIRST_TOKEN: 0.0}}
