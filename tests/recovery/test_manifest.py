import json
import os

import pytest

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.errors import EXIT_USAGE, ConfigError, JobDirectoryError, ManifestError, PeerError
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.manifest import open_manifest, read_manifest

VALUES = {"model": {"name": "m", "digest": "abc"}, "seed": 0, "stop": ["a"], "informative": {"path": "/a"}}


@pytest.fixture
def paths(tmp_path):
    return JobPaths(tmp_path / "out.jsonl")


def test_second_start_gets_what_the_first_wrote(paths):
    first = open_manifest(paths, VALUES, SerialGroup())
    again = open_manifest(paths, {**VALUES, "informative": {"path": "/b", "new": 1}}, SerialGroup())
    assert first == again == read_manifest(paths)
    assert again["informative"] == {"path": "/a"}


def test_every_difference_is_named(paths):
    open_manifest(paths, VALUES, SerialGroup())
    other = {"model": {"name": "m", "digest": "xyz"}, "seed": 1, "stop": ["a", "b"], "extra": {"key": True}}
    with pytest.raises(ManifestError) as caught:
        open_manifest(paths, other, SerialGroup())
    text = str(caught.value)
    assert 'model.digest: this job has "xyz", the job directory "abc"' in text
    assert "seed: this job has 1, the job directory 0" in text
    assert "extra.key: this job has true, the job directory nothing" in text
    assert "stop: " in text and "model.name" not in text and "informative" not in text and "hint" in text


def test_pinned_values_are_those_of_the_first_start(paths):
    def start(date, today):
        return open_manifest(paths, {"template": {"date": date}}, SerialGroup(), {"template.date": today})

    assert start(None, "monday")["template"]["date"] == "monday"
    assert start(None, "tuesday")["template"]["date"] == "monday"
    assert start("monday", "tuesday")["template"]["date"] == "monday"
    with pytest.raises(ManifestError, match="template.date"):
        start("tuesday", "tuesday")


def test_none_that_is_not_pinned_is_compared(paths):
    open_manifest(paths, {"max_model_len": 10}, SerialGroup())
    with pytest.raises(ManifestError, match="max_model_len: this job has null, the job directory 10"):
        open_manifest(paths, {"max_model_len": None}, SerialGroup())


def test_refusal_reaches_every_rank_with_one_message(paths, ranks):
    open_manifest(paths, VALUES, SerialGroup())
    errors = ranks(3, lambda group: open_manifest(paths, {**VALUES, "seed": 5}, group))
    assert [type(error) for error in errors] == [ManifestError, PeerError, PeerError]
    assert {error.exit_code for error in errors} == {EXIT_USAGE}


def test_jobs_that_start_at_once_keep_one_manifest(paths, children, tmp_path):
    paths.create()
    for job in range(6):
        children.start(lambda job=job: (tmp_path / f"seen{job}").write_text(json.dumps(
            open_manifest(paths, {"date": None}, SerialGroup(), {"date": job}))) and None)
    children.wait()
    assert len({path.read_text() for path in tmp_path.glob("seen*")}) == 1


def test_damaged_manifest_is_named(paths):
    paths.create()
    paths.manifest.write_text('{"seed": ')
    with pytest.raises(JobDirectoryError, match="manifest is damaged"):
        open_manifest(paths, VALUES, SerialGroup())


def test_output_in_a_directory_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no directory"):
        open_manifest(JobPaths(tmp_path / "no" / "out"), VALUES, SerialGroup())


@pytest.mark.parametrize(("umask", "mode", "expected"), [
    (0o022, 0o2775, 0o002),
    (0o077, 0o2770, 0o007),
    (0o077, 0o2750, 0o027),
    (0o022, 0o755, 0o022),
    (0o077, 0o700, 0o077),
])
def test_helper_makes_files_that_those_who_share_the_directory_can_use(paths, umask, mode, expected):
    open_manifest(paths, VALUES, SerialGroup())
    paths.root.chmod(mode)
    before = os.umask(umask)
    try:
        open_manifest(paths, VALUES, SerialGroup())
    finally:
        found = os.umask(before)
    assert found == expected


def test_directory_that_cannot_be_written_is_refused_before_any_work(paths, monkeypatch):
    open_manifest(paths, VALUES, SerialGroup())
    monkeypatch.setattr(os, "access", lambda path, mode: path != paths.parts)
    with pytest.raises(JobDirectoryError, match="(?s)cannot be written.*/parts.*chmod -R g\\+w"):
        open_manifest(paths, VALUES, SerialGroup())
    paths.complete.write_text("{}")  # nothing will be written
    open_manifest(paths, VALUES, SerialGroup())
