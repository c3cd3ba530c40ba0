"""Running: what is done stays done, what fails is told, and a run belongs to one process at a time."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from jobs import wait_until
from made_up_study import calls_of, fake_mpiexec, small_study, write_run

from hpcinfer.errors import ConfigError
from hpcinfer.recovery.leases import Holder
from hpcinfer.scaling import claim
from hpcinfer.scaling.cores import Cores, count_cores, threads_of
from hpcinfer.scaling.plan import Recipe, Shape
from hpcinfer.scaling.results import collect
from hpcinfer.scaling.running import TIMED_OUT, Runner, cores_file
from hpcinfer.scaling.site import Site, find_site
from hpcinfer.scaling.study import read_json

RUN = "hpcinfer.run"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a"}\n' * 3)
    return path


def site_of(mpiexec, **variables):
    return Site("mpiexec", {"PATH": os.defpath, "HPCINFER_MPIRUN": str(mpiexec), **variables})


def run_all(study, mpiexec, **how):
    Runner(study, site_of(mpiexec), **how).run_all(study.runs())


def test_rounds_go_over_all_points(source, tmp_path):
    mpiexec, study = fake_mpiexec(tmp_path / "bin"), small_study(tmp_path / "study", source)
    run_all(study, mpiexec)
    ranks = [call.split()[1] for call in calls_of(mpiexec, RUN)]
    assert ranks == ["1", "2", "1", "2"]
    assert all(run.is_done for run in study.runs())
    assert calls_of(mpiexec, RUN)[1].endswith("--seed=3 -dp=2 -pp=1 -tp=1")
    assert (tmp_path / "study/inputs/rows-4.jsonl").read_text().count("\n") == 4


def test_what_is_done_is_not_run_again(source, tmp_path):
    mpiexec, study = fake_mpiexec(tmp_path / "bin"), small_study(tmp_path / "study", source)
    run_all(study, mpiexec)
    first = study.runs()[0]
    first.ending.unlink()  # as if it had been killed: its output and reports are half there
    (first.folder / "output.jsonl").write_text("half")
    run_all(study, mpiexec)
    assert len(calls_of(mpiexec, RUN)) == 5 and first.is_done
    assert first.output.read_text() == '{"prompt": "a"}\n' * 4


def test_a_run_that_fails_is_told_and_the_others_go_on(source, tmp_path):
    mpiexec = fake_mpiexec(tmp_path / "bin", fails={"-tp=2": 3})
    study = small_study(tmp_path / "study", source, Recipe(tp="all"), Recipe(), repeats=1)
    run_all(study, mpiexec)
    results = collect(study)
    failures = [failure for result in results for failure in result.failures]
    assert [run.is_done for run in study.runs()] == [True, False, True]
    assert len(failures) == 1 and "exit code 3" in failures[0].reason
    assert failures[0].last_lines == ("the reason, in words",)
    run_all(study, fake_mpiexec(tmp_path / "bin"))  # the reason is gone
    assert all(run.is_done for run in study.runs())


def test_point_without_a_mesh_is_told_and_starts_nothing(source, tmp_path):
    mpiexec = fake_mpiexec(tmp_path / "bin")
    study = small_study(tmp_path / "study", source, Recipe(tp="2"), repeats=1)
    run_all(study, mpiexec)
    assert len(calls_of(mpiexec, RUN)) == 1
    bad, good = collect(study)
    assert "world size (1)" in bad.failures[0].reason and good.samples and not good.failures


def test_run_that_lasts_too_long_is_ended(source, tmp_path):
    mpiexec = fake_mpiexec(tmp_path / "bin", sleeps=60)
    study = small_study(tmp_path / "study", source, repeats=1, shapes=(Shape(1, 1),))
    run_all(study, mpiexec, timeout_s=0.5)
    ending = read_json(study.runs()[0].ending)
    assert ending["exit_code"] == TIMED_OUT and 0.5 <= ending["seconds"] < 10


def test_cores_that_ranks_share_are_counted_once(source, tmp_path):
    mpiexec = fake_mpiexec(tmp_path / "bin", cores=1)
    study = small_study(tmp_path / "study", source, repeats=1)
    run_all(study, mpiexec)
    assert read_json(cores_file(study, Shape(1, 2))) == {"num_cores": 1, "machines": 1, "threads": 1}
    alone, crowded = collect(study)
    assert (alone.is_crowded, crowded.is_crowded) == (False, True)
    assert (alone.used_cores, crowded.used_cores) == (1, 1)
    assert crowded.ideal == alone.rate


def test_nodes_that_are_not_here_are_left_out(source, tmp_path):
    mpiexec = fake_mpiexec(tmp_path / "bin")
    study = small_study(tmp_path / "study", source, repeats=1, shapes=(Shape(1, 1), Shape(3, 1)))
    site = Site("mpiexec", site_of(mpiexec).environment, ("a", "b"))
    Runner(study, site).run_all(study.runs())
    calls = calls_of(mpiexec, RUN)
    assert len(calls) == 1 and "--host a:1" in calls[0]
    assert not collect(study)[1].failures  # it can still be run elsewhere


def test_ranks_of_hosts_that_are_one_machine_yield(source, tmp_path):
    study = small_study(tmp_path / "study", source, repeats=1, shapes=(Shape(2, 1),))
    for cores, yields in ((1, True), (4, False)):
        mpiexec = fake_mpiexec(tmp_path / f"bin{cores}", cores=cores)
        runner = Runner(study, Site("mpiexec", site_of(mpiexec).environment, ("a", "b")))
        runner.run_all(study.runs())
        study.runs()[0].ending.unlink()
        environment = runner.command("step", study.runs()[0]).environment
        assert ("OMPI_MCA_mpi_yield_when_idle" in environment) == yields


def test_hosts_of_an_allocation_and_named_ones(tmp_path):
    named = find_site("auto", "n1,n2", {})
    assert named.hosts == ("n1", "n2") and named.slots is None
    assert find_site("auto", None, {}).hosts is None
    placement = named.placement(Shape(2, 3))
    assert [tuple(seat) for seat in placement] == [("n1", 3), ("n2", 3)]
    assert named.placement(Shape(3, 1)) is None
    for wrong, words in (("n1:4,n2:4", "--hosts n1:4,n2:4"), ("n1,n1", "--hosts n1,n1: a host is there twice")):
        with pytest.raises(ConfigError, match=words):
            find_site("auto", wrong, {})


def test_run_of_another_process_is_left_to_it(source, tmp_path):
    study = small_study(tmp_path / "study", source, repeats=1, shapes=(Shape(1, 1),))
    with study.runs()[0].claimed() as is_ours:
        assert is_ours
        mpiexec = fake_mpiexec(tmp_path / "bin")
        run_all(study, mpiexec)
        assert not calls_of(mpiexec, RUN)
    run_all(study, mpiexec)
    assert len(calls_of(mpiexec, RUN)) == 1


def test_claim_of_a_process_that_was_killed_is_free(tmp_path):
    code = f"""
        from pathlib import Path
        from hpcinfer.scaling.claim import claim
        with claim(Path({str(tmp_path)!r})) as is_ours:
            print(is_ours, flush=True)
            input()
    """
    other = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)  # fmt: skip
    assert other.stdout and other.stdout.readline() == b"True\n"
    with claim.claim(tmp_path) as is_ours:
        assert not is_ours
    other.kill()
    other.communicate()
    with claim.claim(tmp_path) as is_ours:
        assert is_ours


def test_claim_of_another_node_is_free_when_it_has_gone_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "_TIMEOUT_S", 1.0)
    monkeypatch.setattr(Holder, "is_gone", lambda self: False)
    for name in claim.KEPT:
        (tmp_path / name).mkdir()
    (tmp_path / "claims/1").write_text("other")
    (tmp_path / "leases/other").write_bytes(b"7\n{}\n")
    with claim.claim(tmp_path) as is_ours, claim.claim(tmp_path) as is_theirs:
        assert is_ours and not is_theirs


def test_launcher_dies_with_the_study(source, tmp_path):
    mpiexec = fake_mpiexec(tmp_path / "bin", sleeps=60)
    study = small_study(tmp_path / "study", source, repeats=1, shapes=(Shape(1, 1),))
    study.save()
    argv = [sys.executable, "-m", "hpcinfer", "study", "--output", str(study.folder), "--launcher", "mpiexec"]
    process = subprocess.Popen(argv, env={**os.environ, "HPCINFER_MPIRUN": str(mpiexec)}, stderr=subprocess.DEVNULL)
    wait_until(lambda: calls_of(mpiexec, RUN))
    process.terminate()
    process.wait(20)
    assert not study.runs()[0].ending.exists()  # what is left behind the session's fixture finds


def test_cores_are_those_of_machines_not_of_hosts():
    said = [{"machine": "m", "cores": [0, 1], "threads": 2}] * 3 + [{"machine": "k", "cores": [0, 3], "threads": 2}]
    text = "noise\n" + "\n".join(f"[1,0]: {json.dumps(each)}" for each in said)
    assert count_cores(text) == Cores(4, 2, 2) and count_cores("nothing\n") is None
    assert threads_of(["--threads=3", "--seed=1"]) == 3 and threads_of(["--seed=1"]) is None


def test_a_rank_says_its_cores():
    run = subprocess.run([sys.executable, "-m", "hpcinfer.scaling.cores", "3"], capture_output=True, text=True, cwd="/")
    found = count_cores(run.stdout)
    assert found is not None, run.stderr
    assert 1 <= found.num_cores <= len(os.sched_getaffinity(0)) and (found.machines, found.threads) == (1, 3)


def test_shared_runs_are_started_once(source, tmp_path):
    study = small_study(tmp_path / "study", source, Recipe(), Recipe(tp="node"), repeats=1)
    assert [run.point.shape for run in study.runs()] == [Shape(1, 1), Shape(1, 2), Shape(1, 2)]
    run = study.runs()[0]
    write_run(run, 2.0, None)
    assert not run.is_done and not collect(study)[0].samples  # no report: no result, told, and run again
    assert "no report" in collect(study)[0].failures[0].reason
