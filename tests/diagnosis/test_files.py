from dataclasses import replace

import pytest
from made_up_ranks import cluster, levels, place, rank_facts

from hpcinfer.diagnosis.devices import Devices
from hpcinfer.diagnosis.files import Shared, check_files, check_shared, is_network
from hpcinfer.diagnosis.finding import ERROR, OK, WARNING, fold
from hpcinfer.diagnosis.places import Mount
from hpcinfer.diagnosis.trial import Trial

MIB = 1 << 20


def of(*places, trial=None, **more):
    return check_files([rank_facts(places=places, trial=trial, **more)])


def test_a_healthy_cluster_has_nothing_but_ok():
    findings = fold(check_files(cluster(125, 8)))
    assert set(levels(findings)) == {OK} and len(findings) == 3
    assert "never mapped" in findings[0].found and "1000.0 GiB free" in findings[1].found


@pytest.mark.parametrize(("kind", "is_far"), [
    ("nfs4", True), ("lustre", True), ("fuse.sshfs", True), ("GPFS", True), ("fuseblk", False), ("ext4", False),
    ("fuse.squashfuse", False),
    ("xfs", False), ("tmpfs", False), ("overlay", False),
])  # fmt: skip
def test_types_behind_a_network_are_known(kind, is_far):
    assert is_network(kind) == is_far


@pytest.mark.parametrize(("changes", "level", "words"), [
    ({"free_bytes": 10 * MIB}, ERROR, "64.0 MiB are needed"),
    ({"free_bytes": 3 << 30, "needed_bytes": 4 << 30}, ERROR, "4.0 GiB are needed"),
    ({"free_bytes": 500 * MIB}, WARNING, "only 500.0 MiB"),
    ({"free_files": 10}, WARNING, "10 more files"),
    ({"quota": "over /home"}, WARNING, "over /home"),
    ({"mount": Mount("/", "ext4", True)}, ERROR, "read-only"),
    ({"mount": Mount("/", "tmpfs")}, WARNING, "gone with the node"),
    ({"problem": "no permission"}, ERROR, "no permission"),
    ({"problem": "no answer within 4 s"}, ERROR, "no answer"),
    ({"free_bytes": -1, "free_files": -1}, OK, "room unknown"),
])  # fmt: skip
def test_what_is_wrong_where_a_job_writes(changes, level, words):
    for use in ("output", "store"):
        (finding,) = of(place(use, "ext4")._replace(**changes))
        assert finding.level == level and finding.check == use and words in finding.found
        assert bool(finding.hint) == (level != OK)


def test_several_troubles_of_one_place_are_all_said():
    assert levels(of(place("output", "tmpfs")._replace(free_files=0, quota="over"))) == [WARNING] * 3


def test_a_model_that_some_nodes_do_not_see_names_them():
    def unmounted(fact):
        gone = place("model", "ext4", problem="no model at /lustre/model")
        return replace(fact, places=(gone,)) if fact.host in ("node003", "node004") and fact.places else fact

    findings = [finding for finding in fold(check_files(cluster(20, 4, unmounted))) if finding.level == ERROR]
    assert len(findings) == 1 and findings[0].ranks == (12, 16)


def test_a_model_that_differs_between_nodes_is_an_error():
    facts = cluster(4, 1, lambda fact: replace(
        fact, places=(place("model", "xfs", identity=f"index.h5:{fact.rank // 3}"),)))  # fmt: skip
    (finding,) = [finding for finding in check_files(facts) if finding.level == ERROR]
    assert finding.ranks == (3,) and finding.check == "model"


def test_caches_behind_a_network_matter_with_gpus():
    cache = place("Triton's cache", "nfs4")
    (quiet,), (loud,) = of(cache), of(cache, devices=Devices(node_gpus=8, open_gpus=8))
    assert (quiet.level, loud.level) == (OK, WARNING) and "TRITON_CACHE_DIR" in loud.hint
    assert of(place("Triton's cache", "ext4")) == []


def test_temporary_files_behind_a_network_or_without_room_are_warnings():
    assert levels(of(place("temporary files", "nfs"))) == [WARNING]
    assert levels(of(place("temporary files", "ext4")._replace(free_bytes=MIB))) == [WARNING]
    assert of(place("temporary files", "ext4")) == []


def test_many_ranks_that_import_from_one_server_are_warned():
    python = place("Python", "nfs4")
    facts = cluster(128, 4, lambda fact: replace(fact, places=(python,) if fact.rank == 0 else ()))
    assert WARNING in levels(check_files(facts)) and of(python) == []


def test_an_output_without_hard_links_is_an_error():
    (finding,) = of(trial=Trial({"hard link": "Operation not permitted"}))
    assert finding.level == ERROR and "hard link does not work" in finding.found


def test_slow_durable_writes_and_a_foreign_clock_are_warnings():
    assert levels(of(trial=Trial({}, 3.0, 0.1))) == [WARNING]
    assert levels(of(trial=Trial({}, 0.01, -300.0)), "clocks") == [WARNING]
    assert levels(of(trial=Trial({}, 0.01, 0.01))) == [OK]


def test_an_output_that_other_nodes_do_not_see_is_an_error():
    seen = {0: Shared("", 0.0, True, True), 8: Shared("No such file"), 16: Shared("No such file")}
    (finding,) = fold(check_shared(seen))
    assert finding.level == ERROR and finding.ranks == (8, 16) and "all nodes share" in finding.hint


@pytest.mark.parametrize("winners", [0, 2])
def test_a_race_must_have_one_winner(winners):
    seen = {rank: Shared("", 0.1, rank < winners, rank == 0) for rank in range(4)}
    (finding,) = check_shared(seen)
    assert finding.level == ERROR and f"{winners} of 4 nodes won one name by O_EXCL" in finding.found


def test_nodes_that_see_each_other_are_fine_and_late_ones_are_warned():
    fine = {rank: Shared("", 0.1, rank == 1, rank == 2) for rank in range(4)}
    assert levels(check_shared(fine)) == [OK] and check_shared({0: fine[0]}) == []
    assert levels(check_shared({**fine, 3: Shared("", 2.9)})) == [WARNING]
