"""Storage that fails: no finished row is lost, the message says what to do, the same command goes on."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from golden import DEMO_MODEL, Output, demo_prompts, read_output, run_to_output, write_rows
from jobs import CompletedRun, Job, run_job, start_mpi, wait_until

from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.leases import Holder, incarnation_name
from hpcinfer.recovery.progress import progress

NUM_ROWS = 40
SLOWLY = ("--max-num-seqs", "1")  # so that two jobs share the rows; changes no result
USERS, GROUP = (23451, 23452), 23450  # nobody needs to know them
RANK = Path(__file__).with_name("storage_rank.py")


@pytest.fixture(scope="module")
def prompts(folder: Path) -> Path:
    """A job of a second or two."""
    rows = [{"prompt": f"{i} {prompt}", "max_tokens": 8} for i, prompt in enumerate(demo_prompts(NUM_ROWS))]
    return write_rows(folder / "in.jsonl", rows)


@pytest.fixture(scope="module")
def whole(folder: Path, prompts: Path) -> Output:
    """The undisturbed run."""
    return run_to_output(folder / "whole", 0, DEMO_MODEL, prompts)


def arguments(place: Path, prompts: Path) -> list[str | Path]:
    """Arguments of a job in a folder."""
    place.mkdir(exist_ok=True)
    return ["--model", DEMO_MODEL, "--input", prompts, "--output", place / "out.jsonl"]


def start(event: str, cli: Sequence[str | Path], *, ranks: int = 0, prefix: Sequence[str] = ()) -> Job:
    """Start a job to which something happens."""
    return start_mpi(ranks, [*prefix, sys.executable, str(RANK), event, *map(os.fspath, cli)])


def rows_finished(place: Path) -> int:
    """Entries in the journal."""
    sizes = [path.stat().st_size for path in Path(place, "out.jsonl.job", "parts").glob("*.sidecar")]
    return sum(size // 32 - 1 for size in sizes if size)


def rows_computed(place: Path) -> int:
    """Rows that the last run has computed."""
    return sum(rank["rows"]["finished"] for rank in read_output(place / "out.jsonl").report["ranks"])


def assert_failed(run: CompletedRun, *words: str) -> None:
    """Check that a job ended with code 1 and said these words, in no traceback."""
    assert run.rc == 1, run.stderr
    for word in words:
        assert word in run.stderr, run.stderr
    assert "Traceback" not in run.stderr, run.stderr


def assert_goes_on(place: Path, prompts: Path, whole: Output, num_finished: int) -> None:
    """Check that the same command computes the other rows and writes the same output."""
    run = run_job(0, *arguments(place, prompts))
    assert run.rc == 0, run.stderr
    assert read_output(place / "out.jsonl").digest == whole.digest
    assert rows_computed(place) == NUM_ROWS - num_finished


class Mounts:
    """File systems that only the jobs of one test see; they end with it."""

    def __init__(self) -> None:
        if os.geteuid() or subprocess.run(["unshare", "--mount", "true"], stderr=subprocess.DEVNULL).returncode:
            pytest.skip("only root can mount file systems, and not in every container")
        command = ["unshare", "--mount", "sh", "-c", "echo; exec sleep 300"]
        self._holder = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._holder.stdout is not None
        self._holder.stdout.readline()  # it is there now
        self.prefix = ["nsenter", f"--target={self._holder.pid}", "--mount", "--"]

    def inside(self, path: Path) -> Path:
        """The path as the jobs see it."""
        return Path(f"/proc/{self._holder.pid}/root{path}")

    def run(self, *command: str | Path) -> None:
        """Run a command where the jobs run."""
        subprocess.run([*self.prefix, *map(str, command)], check=True)

    def new(self, place: Path, *options: str) -> None:
        """Mount an empty file system in the memory."""
        place.mkdir(exist_ok=True)
        self.run("mount", "-t", "tmpfs", "-o", ",".join(("size=16m", *options)), "none", place)

    def end(self) -> None:
        """Let all of them go."""
        self._holder.kill()
        self._holder.communicate()


@pytest.fixture
def mounts() -> Iterator[Mounts]:
    """Mounts of this test."""
    found = Mounts()
    yield found
    found.end()


def run_inside(mounts: Mounts, cli: Sequence[str | Path]) -> CompletedRun:
    """Run an ordinary job that sees these mounts."""
    return start_mpi(0, [*mounts.prefix, sys.executable, "-m", "hpcinfer.run", *map(os.fspath, cli)]).wait()


# --- a file system that goes away


def test_outage_of_seconds_is_waited_for(folder: Path, prompts: Path, whole: Output) -> None:
    place = folder / "away"
    run = start("away", [*arguments(place, prompts), "-dp", "2", *SLOWLY], ranks=2).wait()
    assert run.rc == 0, run.stderr
    assert read_output(place / "out.jsonl").digest == whole.digest
    assert "Input/output error; trying again" in run.stderr and "is back" in run.stderr
    assert len(list(place.glob("out.jsonl.job/parts/*.sidecar"))) > 2  # nobody trusts a file after a failure
    assert rows_computed(place) == NUM_ROWS


def test_outage_that_stays_ends_the_job(folder: Path, prompts: Path, whole: Output) -> None:
    place = folder / "gone"
    run = start("gone", arguments(place, prompts)).wait()
    assert_failed(run, "StorageError", "Input/output error, for ", "out.jsonl.job", "start the same command again")
    assert rows_finished(place) == 3
    assert_goes_on(place, prompts, whole, 3)


def test_directory_that_is_not_mounted_for_seconds_is_waited_for(
    folder: Path, prompts: Path, whole: Output, mounts: Mounts
) -> None:
    place = folder / "unmounted"
    mounts.new(place)
    job = start("nothing", [*arguments(place, prompts), *SLOWLY], prefix=mounts.prefix)
    wait_until(lambda: rows_finished(mounts.inside(place)) >= 3 or not job.is_running)
    mounts.new(place, "ro")  # nothing of the job can be seen below it
    time.sleep(2)
    mounts.run("umount", place)
    run = job.wait()
    assert run.rc == 0, run.stderr
    assert "trying again" in run.stderr and "is back" in run.stderr
    assert read_output(mounts.inside(place) / "out.jsonl").digest == whole.digest
    assert not list(mounts.inside(place).glob("out.jsonl.job/claims/*/*.g2"))


def test_sizes_that_a_node_remembers_are_waited_for(folder: Path, prompts: Path, whole: Output) -> None:
    place = folder / "old"
    run = start("old sizes", [*arguments(place, prompts), "-dp", "2"], ranks=2).wait()
    assert run.rc == 0, run.stderr
    output = read_output(place / "out.jsonl")
    assert output.digest == whole.digest and output.report["run"]["seconds"]["merge"] > 1.5


# --- no room, no permission


def test_full_disk_ends_the_job(folder: Path, prompts: Path, whole: Output, mounts: Mounts) -> None:
    place, cli = folder / "full", arguments(folder / "full", prompts)
    inside = mounts.inside(place)
    mounts.new(place)
    job = start("nothing", cli, prefix=mounts.prefix)
    wait_until(lambda: rows_finished(inside) >= 3 or not job.is_running)
    fill(inside / "ballast")
    assert_failed(job.wait(), "No space left on device", "out.jsonl.job", "make room")
    num_finished = rows_finished(inside)
    assert 3 <= num_finished < NUM_ROWS and not (inside / "out.jsonl").exists()
    assert_failed(run_inside(mounts, cli), "No space left on device", "out.jsonl", "make room")
    (inside / "ballast").unlink()
    run = run_inside(mounts, cli)
    assert run.rc == 0, run.stderr
    assert read_output(inside / "out.jsonl").digest == whole.digest
    assert rows_computed(inside) == NUM_ROWS - num_finished
    assert not list(inside.rglob(".*.tmp"))


def fill(ballast: Path) -> None:
    """Leave no room."""
    with ballast.open("wb", buffering=0) as file:
        for size_bytes in (1 << 20, 1 << 12):
            try:
                while file.write(bytes(size_bytes)) == size_bytes:
                    pass
            except OSError:
                continue


def test_read_only_directory_is_refused_at_once(
    folder: Path, prompts: Path, whole: Output, mounts: Mounts
) -> None:
    place, cli = folder / "read-only", arguments(folder / "read-only", prompts)
    mounts.new(place)
    mounts.run("mount", "-o", "remount,ro", place)
    assert_failed(run_inside(mounts, cli), "JobDirectoryError", "cannot make the job directory", "Read-only file")
    mounts.run("mount", "-o", "remount,rw", place)
    job = start("nothing", cli, prefix=mounts.prefix)
    wait_until(lambda: rows_finished(mounts.inside(place)) >= 3 or not job.is_running)
    job.kill()
    mounts.run("mount", "-o", "remount,ro", place)
    assert_failed(run_inside(mounts, cli), "JobDirectoryError", "cannot be written", "mounted read-only?")
    mounts.run("mount", "-o", "remount,rw", place)
    assert run_inside(mounts, cli).rc == 0
    mounts.run("mount", "-o", "remount,ro", place)
    assert run_inside(mounts, cli).rc == 0  # it is complete
    assert read_output(mounts.inside(place) / "out.jsonl").digest == whole.digest


def test_file_that_may_not_grow_ends_the_job(folder: Path, prompts: Path, whole: Output) -> None:
    place = folder / "small"
    run = start("small files", arguments(place, prompts)).wait()
    assert_failed(run, "JobDirectoryError", "File too large", "parts", "ulimit -f")
    num_finished = rows_finished(place)
    assert 0 < num_finished < NUM_ROWS
    assert_goes_on(place, prompts, whole, num_finished)


# --- damage


def unmerged_copy(folder: Path, place: Path) -> Path:
    """Copy the undisturbed job as it was before its merge; returns the job directory."""
    shutil.copytree(folder / "whole", place)
    (place / "out.jsonl").unlink()
    (place / "out.jsonl.job" / "complete.json").unlink()
    return place / "out.jsonl.job"


def flip(path: Path, position: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_damaged_parts_cost_their_rows(folder: Path, prompts: Path, whole: Output) -> None:
    place = folder / "damaged"
    job = unmerged_copy(folder, place)
    [data], [sidecar] = job.glob("parts/*.jsonl"), job.glob("parts/*.sidecar")
    os.truncate(data, data.stat().st_size - 3)  # the last line is torn
    flip(sidecar, 5 * 32 + 7)  # the fifth entry
    flip(data, 40)  # a line
    run = run_job(0, *arguments(place, prompts))
    assert_failed(run, "JobDirectoryError", "1 finished lines are not what was written", data.name, "same command")
    assert_goes_on(place, prompts, whole, NUM_ROWS - 1)
    assert rows_finished(place) == NUM_ROWS + 3


# --- other jobs


def test_lease_of_a_node_that_is_gone_becomes_stale(folder: Path, prompts: Path, whole: Output) -> None:
    place = folder / "stale"
    job = unmerged_copy(folder, place)
    shutil.rmtree(job / "parts")
    name, holder = incarnation_name(), {**dataclasses.asdict(Holder.this_process()), "boot_id": "of another node"}
    (job / "leases" / name).write_text(f"{17:020d}\n{json.dumps(holder)}\n")
    for claim in job.glob("claims/*/*.g1"):
        claim.write_text(json.dumps({"lease": name}))
    start_s = time.monotonic()
    assert run_job(0, *arguments(place, prompts), "--lease-timeout", "2").rc == 0
    assert time.monotonic() - start_s > 2
    assert read_output(place / "out.jsonl").digest == whole.digest
    assert len(list(job.glob("claims/*/*.g2"))) == len(list(job.glob("claims/*/*.g1")))


def test_clocks_that_are_half_an_hour_apart_decide_nothing(folder: Path, prompts: Path, whole: Output) -> None:
    place = folder / "clocks"
    cli = [*arguments(place, prompts), *SLOWLY, "--lease-timeout", "20"]
    early = start("early", cli)
    late = start("late", cli)
    parts = place / "out.jsonl.job" / "parts"
    wait_until(lambda: len(list(parts.glob("*.sidecar"))) > 1 and rows_finished(place) or not early.is_running)
    numbers = progress(JobPaths(place / "out.jsonl"))
    assert numbers and 0 < numbers.rows_per_s < NUM_ROWS and len(numbers.workers) == 2
    assert [job.wait().rc for job in (early, late)] == [0, 0]
    assert read_output(place / "out.jsonl").digest == whole.digest
    assert rows_finished(place) == NUM_ROWS
    assert not list(place.glob("out.jsonl.job/claims/*/*.g2"))


class Team:
    """Two users of one group, and a directory that is theirs."""

    def __init__(self, folder: Path, prompts: Path) -> None:
        if os.geteuid() or not shutil.which("setpriv"):
            pytest.skip("only root can become two other users, with setpriv")
        self.place = Path(tempfile.mkdtemp(prefix="hpcinfer-team-"))
        os.chown(self.place, USERS[0], GROUP)
        self.place.chmod(0o2770)
        self.prompts = Path(shutil.copy(prompts, self.place / "in.jsonl"))
        shutil.copytree(folder / "cache", self.place / "cache")
        self.environment = {"HOME": str(self.place), "HPCINFER_CACHE": str(self.place / "cache")}
        self._extra: list[str] = []  # where this Python lies in a closed home: they may read everything
        look = [*self.user(USERS[0], "022"), sys.executable, "-c", "import hpcinfer.run"]
        if subprocess.run(look, stderr=subprocess.DEVNULL, cwd="/").returncode:
            self._extra = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]

    def user(self, uid: int, umask: str) -> list[str]:
        """Become a user."""
        return ["setpriv", f"--reuid={uid}", f"--regid={uid}", f"--groups={GROUP}", *self._extra,
                "sh", "-c", f'umask {umask}; exec "$@"', "sh"]  # fmt: skip

    def start(self, uid: int, umask: str, event: str = "nothing") -> Job:
        """Start a job as a user."""
        cli = [*arguments(self.place, self.prompts), *SLOWLY]
        command = [*self.user(uid, umask), sys.executable, str(RANK), event, *map(os.fspath, cli)]
        return start_mpi(0, command, env=self.environment)


@pytest.fixture
def team(folder: Path, prompts: Path, whole: Output) -> Iterator[Team]:
    """Two users."""
    found = Team(folder, prompts)
    yield found
    shutil.rmtree(found.place)


def test_two_users_of_a_group_help_the_same_job(team: Team, whole: Output) -> None:
    first = team.start(USERS[0], "002", "company")
    wait_until(lambda: rows_finished(team.place) >= 1 or not first.is_running)  # it has made the directory
    second = team.start(USERS[1], "077", "company")  # who shares nothing by habit
    for job in (first, second):
        run = job.wait()
        assert run.rc == 0, run.stderr
    assert read_output(team.place / "out.jsonl").digest == whole.digest
    assert rows_finished(team.place) == NUM_ROWS
    files = [path for path in (team.place / "out.jsonl.job").rglob("*") if path.is_file()]
    assert {path.stat().st_uid for path in files} == set(USERS)
    assert {path.stat().st_gid for path in files} == {GROUP}
    assert all(path.stat().st_mode & 0o060 == 0o060 for path in files)


def test_job_that_its_owner_does_not_share_is_refused(team: Team, whole: Output) -> None:
    first = team.start(USERS[0], "022")
    wait_until(lambda: rows_finished(team.place) >= 1 or not first.is_running)
    second = team.start(USERS[1], "022").wait()
    assert_failed(second, "JobDirectoryError", "cannot be written", "chmod -R g+w", "umask 002")
    assert first.wait().rc == 0
    assert read_output(team.place / "out.jsonl").digest == whole.digest


@pytest.fixture
def sleeper(team: Team) -> Iterator[Holder]:
    """A living process of the first user."""
    process = subprocess.Popen([*team.user(USERS[0], "022"), "sleep", "100"])
    wait_until(lambda: b"sleep" in Path(f"/proc/{process.pid}/cmdline").read_bytes())
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    yield dataclasses.replace(Holder.this_process(), pid=process.pid, start_time=int(fields[19]))
    process.kill()
    process.wait()


def test_process_of_another_user_lives_where_proc_hides_it(team: Team, mounts: Mounts, sleeper: Holder) -> None:
    mounts.run("mount", "-t", "proc", "-o", "hidepid=2", "proc", "/proc")

    def is_alive(holder: Holder) -> str:
        lease = team.place / "lease"
        lease.write_text(f"{1:020d}\n{json.dumps(dataclasses.asdict(holder))}\n")
        code = f"print(LeaseObserver(Path({str(team.place)!r}), 1000).is_alive('lease'))"
        code = f"from pathlib import Path; from hpcinfer.recovery.leases import LeaseObserver; {code}"
        look = [*mounts.prefix, *team.user(USERS[1], "022"), sys.executable, "-c", code]
        return subprocess.run(look, capture_output=True, text=True, cwd="/").stdout.strip()

    assert is_alive(sleeper) == "True"
    assert is_alive(dataclasses.replace(sleeper, pid=2**22 + 1)) == "False"
