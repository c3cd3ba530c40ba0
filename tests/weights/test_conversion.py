import json
import multiprocessing
import os
import re
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from models import FAMILIES, make_tiny_model
from safetensors.torch import load_file, save_file
from thread_group import run_ranks

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.config import ModelConfig
from hpcinfer.dtypes import to_float32
from hpcinfer.errors import ConfigError, HpcInferError, ModelError, PeerError
from hpcinfer.weights import conversion, writer
from hpcinfer.weights.conversion import Recipe, convert, default_grains
from hpcinfer.weights.layout import layout
from hpcinfer.weights.reader import Store
from hpcinfer.weights.schema import param_specs, source_name

VARIANTS = [
    (family, {}, dtype) for family, dtype in zip(FAMILIES, ["float32", "bfloat16", "float16"] * 2, strict=False)
]
VARIANTS += [
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, "bfloat16"),
    ("mistral", {"num_key_value_heads": 1, "intermediate_size": 100, "hidden_size": 56}, "float16"),
    ("qwen2", {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 56}, "float32"),
    ("qwen3", {"attention_bias": True, "vocab_size": 391, "num_attention_heads": 2}, "bfloat16"),
]


def checkpoint(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_store_holds(store, tensors):
    """Units without padding, put together, are the tensor; the padding is zero."""
    for spec in param_specs(store.config, store.grains):
        full_shape, split_dim, ranges = layout(spec, store.config, store.grains)
        values, dtype = store.read(spec.name)
        units = to_float32(values, dtype)
        assert units.shape == spec.shape
        expected = tensors[source_name(spec.name)]
        assert str(expected.dtype) == f"torch.{dtype}" and tuple(expected.shape) == full_shape
        if split_dim < 0:
            np.testing.assert_array_equal(units[0], expected.float().numpy())
            continue
        parts = [np.take(unit, range(len(held)), split_dim) for unit, held in zip(units, ranges, strict=True)]
        np.testing.assert_array_equal(np.concatenate(parts, split_dim), expected.float().numpy())
        assert np.count_nonzero(units) == sum(np.count_nonzero(part) for part in parts)


@pytest.mark.parametrize(("family", "overrides", "dtype"), VARIANTS)
def test_units_put_together_are_the_checkpoint(tmp_path, family, overrides, dtype):
    source = make_tiny_model(tmp_path / "model", family, dtype=dtype, shards=family == "qwen2", **overrides)
    convert(source, tmp_path / "store", SerialGroup(), Recipe(8))
    with Store.open(tmp_path / "store") as store:
        assert_store_holds(store, checkpoint(source))


@pytest.mark.parametrize("grains", [1, 2, 16])
def test_any_power_of_two_of_grains_holds_the_same(tmp_path, tiny_model, grains):
    convert(tiny_model, tmp_path / "store", SerialGroup(), Recipe(grains))
    with Store.open(tmp_path / "store") as store:
        assert store.grains == grains
        assert_store_holds(store, checkpoint(tiny_model))


@pytest.mark.parametrize("size", [2, 3, 7])
def test_number_of_ranks_and_path_change_no_byte(tmp_path, tiny_model, tiny_store, size):
    assert run_ranks(size, lambda group: convert(tiny_model, tmp_path / "other.store", group)) == [None] * size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.store"]
    for path in tiny_store.iterdir():
        assert path.read_bytes() == (tmp_path / "other.store" / path.name).read_bytes()


def test_digest_follows_weights_tokenizer_and_grains(tmp_path, model_copy, tiny_store):
    digests = {Store.open(tiny_store).digest}
    convert(model_copy, tmp_path / "a", SerialGroup(), Recipe(4))
    (model_copy / "chat_template.jinja").write_text("{{ messages }}")
    convert(model_copy, tmp_path / "b", SerialGroup())
    change_tensor(model_copy, "model.norm.weight", lambda tensor: tensor * 2)
    convert(model_copy, tmp_path / "c", SerialGroup())
    digests |= {Store.open(tmp_path / name).digest for name in "abc"}
    assert len(digests) == 4
    assert Store.open(tmp_path / "b").tokenizer_files["chat_template.jinja"] == b"{{ messages }}"


def test_source_files_are_recorded_with_their_hashes(tiny_model, tiny_store):
    recorded = {file["name"]: file["size"] for file in Store.open(tiny_store).source_files}
    assert recorded == {
        path.name: path.stat().st_size for path in tiny_model.iterdir() if path.name != "model.safetensors.index.json"
    }


def test_large_models_get_sixteen_grains():
    config = ModelConfig("LlamaForCausalLM", 8192, 80, 64, 8, 128, 28672, 128256, 8192, 1e-5, 5e5)
    assert default_grains(config) == 16
    assert default_grains(replace(config, num_layers=60)) == 8


def change_tensor(folder, name, change):
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name] = change(tensors[name])
            save_file(tensors, path)


def drop_from_index(folder, name):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][name]
    path.write_text(json.dumps(index))


def with_nan(tensor):
    tensor = tensor.clone()
    tensor[-1] = float("nan")
    return tensor


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGES = [
    (lambda folder: change_tensor(folder, UP, with_nan), UP),
    (lambda folder: change_tensor(folder, UP, lambda tensor: tensor / 0), UP),
    (lambda folder: change_tensor(folder, UP, lambda tensor: tensor[:-1].clone()), r"\(99, 56\)"),
    (lambda folder: change_tensor(folder, UP, lambda tensor: tensor.to(torch.float8_e4m3fn)), "F8_E4M3"),
    (lambda folder: next(folder.glob("*-00002-*")).unlink(), "00002"),
    (lambda folder: os.truncate(next(folder.glob("*-00002-*")), 5000), "00002"),
    (lambda folder: drop_from_index(folder, UP), UP),
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
]


@pytest.mark.parametrize(("damage", "named"), DAMAGES)
@pytest.mark.parametrize("size", [1, 3])
def test_damaged_source_ends_all_ranks_with_one_message_and_leaves_nothing(tmp_path, model_copy, damage, named, size):
    damage(model_copy)
    errors = run_ranks(size, lambda group: convert(model_copy, tmp_path / "store", group))
    own = [error for error in errors if not isinstance(error, PeerError)]
    assert len(own) == 1 and isinstance(own[0], ModelError)
    with pytest.raises(ModelError, match=named):
        raise own[0]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_pickled_checkpoint_is_refused_with_a_way_out(tmp_path, model_copy):
    for path in model_copy.glob("model*"):
        path.unlink()
    (model_copy / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelError, match=r"never read[\s\S]*save_pretrained"):
        convert(model_copy, tmp_path / "store", SerialGroup())


def test_tensors_that_the_family_does_not_have_are_refused(tmp_path):
    source = make_tiny_model(tmp_path / "model", "llama", num_hidden_layers=1)
    tensors = load_file(source / "model.safetensors")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors | extra, source / "model.safetensors")
    convert(source, tmp_path / "store", SerialGroup())
    save_file(tensors | {"model.layers.0.self_attn.q_proj.lora_A": torch.ones(8)}, source / "model.safetensors")
    with pytest.raises(ModelError, match="lora_A"):
        convert(source, tmp_path / "other", SerialGroup())


def test_head_of_a_tied_model_must_repeat_the_embedding(tmp_path):
    source = make_tiny_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, source / "model.safetensors")
    convert(source, tmp_path / "store", SerialGroup())
    save_file(tensors | {"lm_head.weight": embedding + 1}, source / "model.safetensors")
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        convert(source, tmp_path / "other", SerialGroup())


@pytest.mark.parametrize("grains", [0, 3, -8, 2048])
def test_wrong_numbers_of_grains_are_refused(tmp_path, tiny_model, grains):
    with pytest.raises(ConfigError, match=f"grains={grains}"):
        convert(tiny_model, tmp_path / "store", SerialGroup(), Recipe(grains))


def test_existing_destination_is_never_overwritten(tmp_path, tiny_model):
    (tmp_path / "store").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        convert(tiny_model, tmp_path / "store", SerialGroup())


def test_loser_of_a_race_takes_the_winners_store(tmp_path, tiny_model, tiny_store, monkeypatch):
    def publish_meanwhile(*args):
        shutil.copytree(tiny_store, tmp_path / "store")
        return writer.write_index(*args)

    monkeypatch.setattr(conversion, "write_index", publish_meanwhile)
    convert(tiny_model, tmp_path / "store", SerialGroup(), existing_ok=True)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(ConfigError, match="exists already"):
        convert(tiny_model, tmp_path / "store", SerialGroup())
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_missing_space_is_found_before_anything_is_written(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"1000 B free\n  expected: .* for the store"):
        convert(tiny_model, tmp_path / "store", SerialGroup())
    assert list(tmp_path.iterdir()) == []


def test_unwritable_destination_is_named(tmp_path, tiny_model):
    (tmp_path / "file").write_text("")
    with pytest.raises(HpcInferError, match="file"):
        convert(tiny_model, tmp_path / "file" / "store", SerialGroup())


def _convert_slowly(source, path):
    finish = writer.write_index
    conversion.write_index = lambda *args: (finish(*args), (path.parent / "ready").touch(), time.sleep(60))
    convert(source, path, SerialGroup())


def test_killed_conversion_leaves_no_store(tmp_path, tiny_model):
    child = multiprocessing.get_context("fork").Process(target=_convert_slowly, args=(tiny_model, tmp_path / "store"))
    child.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    child.kill()
    child.join()
    assert not (tmp_path / "store").exists()
    convert(tiny_model, tmp_path / "store", SerialGroup())
    Store.open(tmp_path / "store").verify()


def test_folders_of_killed_conversions_are_removed_when_they_are_old(tmp_path, tiny_model):
    old, busy, other = (tmp_path / name for name in ("a.store.tmp-1", "a.store.tmp-2", "b.store.tmp-3"))
    for folder in (old, busy, other):
        folder.mkdir()
        (folder / "layer.h5").write_bytes(b"x")
        os.utime(folder, (0, 0))
    for folder in (old, other):
        os.utime(folder / "layer.h5", (0, 0))
    convert(tiny_model, tmp_path / "a.store", SerialGroup())
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a.store", busy, other]


def test_plain_h5py_reads_every_parameter_through_the_index(tiny_store):
    with Store.open(tiny_store) as store:
        specs = param_specs(store.config, store.grains)
        expected = {spec.name: store.read(spec.name).values for spec in specs}
    with h5py.File(tiny_store / "index.h5") as file:
        assert json.loads(bytes(file["config"][()])) == json.loads(json.dumps(store.config.to_dict()))
        for spec in specs:
            dataset = file[re.sub(r"layers\.(\d+)\.", r"layers/\1/", spec.name)]
            np.testing.assert_array_equal(dataset[()], expected[spec.name])
            assert dataset.chunks == (1, *spec.shape[1:]) and dataset.attrs["dtype"] == b"bfloat16"
