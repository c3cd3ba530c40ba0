"""Loading as a job does it: each byte once, used as it arrives, and complete though ranks die meanwhile."""

import json
import shutil
import time
from math import inf
from pathlib import Path

import pytest
from golden import DEMO_MODEL, Output, demo_prompts, read_output, run_to_output, varied_rows, write_rows
from jobs import Job, fault_tolerance, run_job, start_job, wait_until

from hpcinfer.weights.reader import Store

HERE = Path(__file__).parent
FLAGS = ("--seed", "3")
READ_S = 0.2  # of each read where the store is slow
SLOW_READ_S = 0.5  # so that there is time to die
AGREE_S = 0.6  # loading takes more from the death on


@pytest.fixture(scope="module")
def prompts(folder: Path) -> Path:
    """A few rows of every kind."""
    return write_rows(folder / "in.jsonl", varied_rows(demo_prompts(16)))


@pytest.fixture(scope="module")
def whole(folder: Path, prompts: Path) -> Output:
    """What one rank makes of them."""
    return run_to_output(folder / "whole", 1, DEMO_MODEL, prompts, *FLAGS)


@pytest.fixture(scope="module")
def store(folder: Path) -> Path:
    """The store of the demo model."""
    assert run_job(0, DEMO_MODEL, folder / "demo.store", module="hpcinfer.convert").rc == 0
    return folder / "demo.store"


def num_bytes(store: Path) -> int:
    """Of all units."""
    with Store.open(store) as opened:
        return sum(opened.empty(name, opened.spec(name).shape[0]).nbytes for name in opened.parameters)


def start_slowly(
    folder: Path, store: Path, prompts: Path, mesh: str, *options: str, read_s: float = READ_S, tolerant: bool = False,
    dying: int | None = None,
) -> Job:  # fmt: skip
    """Start a job on a slow file system, of which a rank may be to die; a mesh is `dp pp tp`."""
    dp, pp, tp = map(int, mesh.split())
    folder.mkdir()
    sizes = ("-dp", str(dp), "-pp", str(pp), "-tp", str(tp))
    return start_job(dp * pp * tp, str(read_s), "--model", store, "--input", prompts, "--output", folder / "out.jsonl",
                     *sizes, *FLAGS, *options, module="slow_store_rank", cwd=HERE,
                     flags=fault_tolerance() if tolerant else (),
                     env={} if dying is None else {"DYING_RANK": str(dying)})  # fmt: skip


@pytest.mark.parametrize("mesh", ["2 1 1", "1 1 2", "1 2 1", "2 1 2"])
def test_each_byte_is_read_once(folder: Path, store: Path, prompts: Path, whole: Output, mesh: str) -> None:
    place = folder / f"once {mesh}"
    run = start_slowly(place, store, prompts, mesh, read_s=0.0).wait(60)
    assert run.rc == 0, run.stderr
    output = read_output(place / "out.jsonl")
    assert output.digest == whole.digest
    loading = [rank["loading"] for rank in output.report["ranks"]]
    read = sum(each["bytes_read"] for each in loading)
    assert num_bytes(store) <= read < 1.02 * num_bytes(store)  # requests are whole pages
    assert sum(each["bytes_received"] for each in loading) == sum(each["bytes_sent"] for each in loading)
    assert all(each["bytes_received"] > 0 for each in loading) == (mesh != "1 2 1")


def test_what_is_staged_is_not_read_again_by_any_mesh(
    folder: Path, store: Path, prompts: Path, whole: Output
) -> None:
    stage, read = folder / "stage", list[int]()
    for number, mesh in enumerate(["2 1 1", "1 1 2"]):
        place = folder / f"staged {number}"
        run = start_slowly(place, store, prompts, mesh, "--stage", str(stage), read_s=0.0).wait(60)
        assert run.rc == 0, run.stderr
        output = read_output(place / "out.jsonl")
        assert output.digest == whole.digest
        read.append(sum(rank["loading"]["bytes_read"] for rank in output.report["ranks"]))
    assert read[0] >= num_bytes(store) and read[1] == 0


def test_first_token_comes_before_the_last_layer(folder: Path, store: Path, prompts: Path, whole: Output) -> None:
    place = folder / "early"
    run = start_slowly(place, store, prompts, "1 1 1").wait(60)
    assert run.rc == 0, run.stderr
    output = read_output(place / "out.jsonl")
    assert output.digest == whole.digest
    [rank] = output.report["ranks"]
    times = [rank["loading"][name] for name in ("first_layer_s", "last_byte_s", "last_layer_s", "first_token_s")]
    assert times == sorted(times) and times[1] > 2 * times[0]
    assert rank["seconds"]["waiting for weights"] > 0.5 * (times[2] - times[0])


def test_damage_that_is_found_late_ends_all_with_a_word(folder: Path, store: Path, prompts: Path) -> None:
    damaged = shutil.copytree(store, folder / "damaged.store")
    file = sorted(damaged.glob("layer*"))[-1]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    run = start_slowly(folder / "damaged", damaged, prompts, "2 1 1", read_s=0.05).wait(60)
    assert run.rc == 1
    assert run.stderr.count("StoreError") == 1 and "Traceback" not in run.stderr
    assert file.name in run.stderr and "convert the model again" in run.stderr


def test_what_is_found_wrong_while_others_load_ends_all_at_once(folder: Path, store: Path, prompts: Path) -> None:
    job = start_slowly(folder / "no room", store, prompts, "2 1 1", "--kv-cache-memory", "4KiB", read_s=1.0)
    wait_until(lambda: "the KV cache holds" in job.stderr or not job.is_running)
    start = time.monotonic()
    run = job.wait(60)
    assert run.rc == 2 and "Traceback" not in run.stderr, run.stderr
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(("mesh", "victim", "when_s"), [
    ("2 1 1", 1, 0.1), ("2 1 1", 0, 0.9), ("1 1 2", 1, 1.2), ("1 2 1", 0, 1.0), ("1 2 1", 1, 0.8), ("2 1 2", 3, 1.0),
])  # fmt: skip
def test_a_death_costs_what_the_dead_rank_was_to_read(
    folder: Path, store: Path, prompts: Path, whole: Output, mesh: str, victim: int, when_s: float
) -> None:
    place = folder / f"death {mesh} {victim}"
    job = start_slowly(place, store, prompts, mesh, read_s=SLOW_READ_S, tolerant=True)
    wait_until(lambda: (place / "out.jsonl.job" / "index.h5").exists() or not job.is_running)
    time.sleep(when_s)
    killed = time.time()
    assert job.kill_rank(victim), job.stderr
    run = job.wait(60)
    assert run.rc == 0, run.stderr
    assert "Traceback" not in run.stderr, run.stderr
    output = read_output(place / "out.jsonl")
    assert output.digest == whole.digest
    merged = json.loads((place / "out.jsonl.job" / "complete.json").read_text())
    assert (merged["num_overlaps"], merged["num_conflicts"]) == (0, 0)
    for rank in output.report["ranks"]:
        loading = rank["loading"]
        assert killed < loading["began"] + (loading["last_layer_s"] or inf), "the death came too late"
        for recovery in rank["recoveries"]:
            found_s = recovery["found_time"] - killed if mesh[0] == "1" else 0.0  # who waits for rows loses nothing
            assert found_s + recovery["agree_s"] < AGREE_S, recovery
            assert recovery["bytes_own"] > recovery["bytes_store"], recovery


@pytest.mark.parametrize(("mesh", "victim"), [("1 1 2", 1), ("1 2 1", 0), ("2 1 2", 0)])
def test_a_death_before_the_replica_is_built_throws_nothing_away(
    folder: Path, store: Path, prompts: Path, whole: Output, mesh: str, victim: int
) -> None:
    place = folder / f"early death {mesh}"
    job = start_slowly(place, store, prompts, mesh, read_s=SLOW_READ_S, tolerant=True, dying=victim)
    run = job.wait(60)
    assert run.rc == 0 and "Traceback" not in run.stderr, run.stderr
    output = read_output(place / "out.jsonl")
    assert output.digest == whole.digest
    found = [(rank["loading"], each) for rank in output.report["ranks"] for each in rank["recoveries"]]
    assert found
    for loading, recovery in found:
        assert recovery["agree_s"] < AGREE_S and recovery["bytes_own"] > recovery["bytes_store"], recovery
        agreed = recovery["found_time"] + recovery["agree_s"]
        assert agreed < loading["began"] + (loading["last_layer_s"] or inf), "it came too late"
