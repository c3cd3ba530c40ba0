import logging
import os
import shutil

import pytest
from thread_group import run_ranks

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.errors import ConfigError, ModelError
from hpcinfer.weights.locate import find_model, resolve_model, source_key
from hpcinfer.weights.reader import Store


@pytest.fixture(autouse=True)
def no_caches(monkeypatch, tmp_path):
    for name in ("HPCINFER_CACHE", "HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def hub(tiny_model, tmp_path):
    """A hub cache as `hf download` makes it: snapshots of symlinks to blobs."""
    entry = tmp_path / "hf" / "hub" / "models--org--tiny"
    snapshot = entry / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    shutil.copytree(tiny_model, entry / "blobs")
    for blob in (entry / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(os.path.relpath(blob, snapshot))
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("abc123")
    return entry


def resolve(model, cache=None, fallback=None):
    return resolve_model(str(model), cache and str(cache), SerialGroup(), fallback)


def test_store_is_itself_and_needs_no_folder(tiny_store):
    assert resolve(tiny_store) == tiny_store


def test_folder_is_converted_once_by_all_ranks(tiny_model, tiny_store, tmp_path, caplog):
    caplog.set_level(logging.INFO, "hpcinfer")
    paths = run_ranks(3, lambda group: resolve_model(str(tiny_model), str(tmp_path / "cache"), group))
    assert len(set(paths)) == 1 and paths[0].parent == tmp_path / "cache"
    assert sum("will be" in message and str(paths[0]) in message for message in caplog.messages) == 1
    assert Store.open(paths[0]).digest == Store.open(tiny_store).digest
    before = paths[0].stat().st_mtime_ns
    assert resolve(tiny_model, tmp_path / "cache") == paths[0]
    assert paths[0].stat().st_mtime_ns == before


def test_folder_is_named_by_option_then_environment_then_job(tiny_model, tmp_path, monkeypatch):
    assert resolve(tiny_model, None, tmp_path / "job").parent == tmp_path / "job"
    monkeypatch.setenv("HPCINFER_CACHE", str(tmp_path / "environment"))
    assert resolve(tiny_model, None, tmp_path / "job").parent == tmp_path / "environment"
    assert resolve(tiny_model, tmp_path / "option", tmp_path / "job").parent == tmp_path / "option"


def test_nothing_is_ever_written_to_home(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="HPCINFER_CACHE"):
        resolve(tiny_model)
    assert not (tmp_path / "home").exists()


def test_changed_folder_is_another_model(model_copy):
    keys = {source_key(model_copy)}
    os.utime(model_copy / "tokenizer.json")
    keys.add(source_key(model_copy))
    path = next(model_copy.glob("*.safetensors"))
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    keys.add(source_key(model_copy))
    keys.add(source_key(model_copy.rename(model_copy.parent / "moved")))
    assert len(keys) == 4


def test_hub_entry_snapshot_and_name_are_one_model(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    snapshot = hub / "snapshots" / "abc123"
    assert find_model(str(hub)) == find_model(str(snapshot)) == find_model("org/tiny") == snapshot
    os.chmod(snapshot, 0o555)
    path = resolve("org/tiny", tmp_path / "cache")
    assert path.name.startswith("org--tiny-") and Store.open(path).grains == 8
    assert sorted(child.name for child in snapshot.iterdir()) == sorted(
        child.name for child in (hub / "blobs").iterdir()
    )


def test_two_snapshots_need_a_ref(hub):
    shutil.copytree(hub / "snapshots" / "abc123", hub / "snapshots" / "def456", symlinks=True)
    assert find_model(str(hub)).name == "abc123"
    (hub / "refs" / "main").unlink()
    with pytest.raises(ModelError, match="abc123, def456"):
        find_model(str(hub))


def test_hub_name_that_is_not_here_says_how_to_fetch_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(ModelError, match=r"elsewhere[\s\S]*hf download org/name[\s\S]*hf auth login"):
        find_model("org/name")


@pytest.mark.parametrize("model", ["/no/such/model", "", "name", "./org/name/x"])
def test_path_that_is_not_there_is_named(model):
    with pytest.raises(ModelError, match="no model at" if model else "neither|no model"):
        find_model(model)


def test_file_and_empty_folder_are_no_model(tmp_path):
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        find_model(str(tmp_path / "model.gguf"))
    with pytest.raises(ModelError, match=r"neither index\.h5 nor config\.json"):
        find_model(str(tmp_path))


def test_failure_reaches_every_rank(tmp_path):
    errors = run_ranks(3, lambda group: resolve_model(str(tmp_path), None, group))
    assert [type(error).__name__ for error in errors] == ["ModelError", "PeerError", "PeerError"]


def test_jobs_that_start_at_once_share_one_store(tiny_model, tmp_path):
    """Two groups of one rank in two threads stand for two jobs."""
    paths = run_ranks(2, lambda group: resolve(tiny_model, tmp_path / "cache"))
    assert paths[0] == paths[1] and list((tmp_path / "cache").iterdir()) == [paths[0]]
    Store.open(paths[0]).verify()
