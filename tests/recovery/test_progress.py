import json
import os
import subprocess
import sys

import pytest

from hpcinfer import merge as merge_command
from hpcinfer import status as status_command
from hpcinfer.errors import ConfigError
from hpcinfer.recovery.claims import Claimer
from hpcinfer.recovery.describe import describe, describe_progress, is_job_directory
from hpcinfer.recovery.journal import PartWriter
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.leases import Lease, read_lease
from hpcinfer.recovery.progress import progress

TOOLS = "import sys; from hpcinfer.__main__ import main; code = main(sys.argv[1:]); " \
        "assert not {'torch', 'mpi4py'} & set(sys.modules); sys.exit(code)"


def _work(paths, index, num_blocks):
    lease = Lease(paths.leases, 100).start()
    claimer = Claimer(paths, index, lease)
    with PartWriter(paths, "part") as writer:
        for _ in range(num_blocks):
            claim = claimer.claim()
            for row in claim.rows.tolist():
                writer.append(row, 1, b'{"row": %d}' % row, is_error=row == int(index.block_rows(0)[0]))
    return lease


@pytest.fixture
def running(make_job):
    paths, index = make_job(100)
    lease = _work(paths, index, 10)
    yield paths
    lease.close()


def test_progress_counts_rows_and_names_workers(running):
    numbers = progress(running)
    assert 10 <= numbers.num_done < 100 and numbers.num_failed == 1
    assert numbers.num_unfinished == 100 - numbers.num_done
    assert [worker.pid for worker in numbers.workers] == [os.getpid()]
    assert 0 <= numbers.workers[0].sign_of_life_s < 60
    assert numbers.rows_per_s > 0 and numbers.time_left_s > 0 and not numbers.is_merged


def test_stopped_job_has_no_rate(make_job):
    paths, index = make_job(100)
    _work(paths, index, 3).close()
    numbers = progress(paths)
    assert (numbers.workers, numbers.rows_per_s, numbers.time_left_s) == ([], 0.0, None)


def test_job_without_a_sign_of_life_is_not_called_running(running):
    lease = next(running.leases.iterdir())
    holder = read_lease(lease)[1]
    lease.write_text(f"{1:020d}\n" + json.dumps({**holder.__dict__, "boot_id": "of another host"}))
    os.utime(lease, (0, 0))
    numbers = progress(running)
    assert len(numbers.workers) == 1 and numbers.rows_per_s == 0
    assert "no sign of life for" in "\n".join(describe_progress(numbers))


def test_description_tells_state_manifest_and_files(running):
    assert is_job_directory(running.root) and not is_job_directory(running.root.parent)
    text = "\n".join(describe(running.root))
    for expected in ("rows       100", "failed     1", "state      running", "seed: 1", "index.h5", "parts"):
        assert expected in text


def test_job_whose_index_is_not_there_yet(tmp_path, make_job):
    paths, _ = make_job(5)
    paths.index.unlink()
    assert progress(paths) is None
    assert "no index yet" in "\n".join(describe(paths.root))


def test_status_of_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no job directory"):
        progress(JobPaths(tmp_path / "nothing"))


def _run_tool(*arguments):
    return subprocess.run([sys.executable, "-c", TOOLS, *map(str, arguments)], capture_output=True, text=True,
                          timeout=60)


def test_status_and_merge_work_beside_a_running_job_without_mpi_and_torch(running):
    status = _run_tool("status", "--json", running.output)
    assert status.returncode == 0, status.stderr
    numbers = json.loads(status.stdout)
    merged = _run_tool("merge", "--partial", running.output)
    assert merged.returncode == 0, merged.stderr
    lines = running.output.with_name("completions.jsonl.partial").read_text().splitlines()
    assert len(lines) == numbers["num_done"] and lines == sorted(lines, key=lambda line: json.loads(line)["row"])
    assert not running.output.exists()


def test_merge_never_overwrites_a_file_that_is_named(running, tmp_path):
    (tmp_path / "prompts").write_text("precious")
    for target in (tmp_path / "prompts", tmp_path / "nowhere" / "file", tmp_path):
        result = _run_tool("merge", "--partial", running.output, "--to", target)
        assert result.returncode == 2 and "ConfigError" in result.stderr and "Traceback" not in result.stderr
    assert (tmp_path / "prompts").read_text() == "precious"


def test_job_directory_names_the_job_too(running):
    shown = _run_tool("status", running.root)
    assert shown.returncode == 0 and "done" in shown.stdout


def test_merge_of_an_unfinished_job_fails_with_a_hint(running):
    result = _run_tool("merge", running.output)
    assert result.returncode == 1 and "--partial" in result.stderr and not result.stdout


def test_commands_declare_help_and_example():
    for module in (merge_command, status_command):
        assert module.HELP and module.EXAMPLE.startswith("hpcinfer ")
