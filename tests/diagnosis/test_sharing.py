import os
import time

from thread_group import run_ranks

from hpcinfer.diagnosis import sharing
from hpcinfer.diagnosis.sharing import measure_sharing


def test_nodes_with_one_directory_see_each_others_files_and_one_wins(tmp_path):
    seen, *others = run_ranks(5, lambda world: measure_sharing(world, tmp_path, [0, 2, 4]))
    assert sorted(seen) == [0, 2, 4] and others == [{}] * 4
    assert not any(shared.problem for shared in seen.values()) and max(shared.delay_s for shared in seen.values()) < 2
    assert sum(shared.exclusive for shared in seen.values()) == sum(shared.linked for shared in seen.values()) == 1
    assert os.listdir(tmp_path) == []


def test_a_directory_of_its_own_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(sharing, "_PATIENCE_S", 0.2)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    seen, _ = run_ranks(2, lambda world: measure_sharing(world, folders[world.rank], [0, 1]))
    assert seen[0].problem == "" and seen[1].problem == "No such file or directory"
    assert os.listdir(folders[0]) == os.listdir(folders[1]) == []


def test_what_killed_doctors_have_left_is_removed_when_it_is_old(tmp_path):
    for name, age_s in (("old", 7200), ("new", 60)):
        folder = tmp_path / f".hpcinfer-doctor-{name}"
        folder.mkdir()
        (folder / "file").touch()
        os.utime(folder, (time.time() - age_s,) * 2)
    run_ranks(2, lambda world: measure_sharing(world, tmp_path, [0, 1]))
    assert os.listdir(tmp_path) == [".hpcinfer-doctor-new"]


def test_a_root_that_cannot_write_ends_it_for_all(tmp_path):
    assert run_ranks(3, lambda world: measure_sharing(world, tmp_path / "missing", [0, 1])) == [{}] * 3
