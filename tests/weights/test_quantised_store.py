"""Quantised stores: what is in them, that ranks change nothing, and that damage is named."""

import shutil

import h5py
import numpy as np
import pytest
import torch
from models import make_tiny_model
from safetensors.torch import load_file, save_file
from sources import CHECKOUT
from thread_group import run_ranks

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.dtypes import GROUP, STORAGE, dequantise, to_float32
from hpcinfer.errors import StoreError
from hpcinfer.inspect import describe_store
from hpcinfer.weights.conversion import Recipe, convert, store_size
from hpcinfer.weights.reader import Store
from hpcinfer.weights.schema import param_specs, quantised_type, stored_specs
from hpcinfer.weights.source import Source
from hpcinfer.weights.writer import Shape

DEMO_DIGEST = "922e9439a710103332275592311b2420bb1db2182ab64822838ee8da255f87ca"  # of version 1 of the format
KINDS = ["int8", "fp8", "int4"]
# at most, of the largest weight of a scale; that of int4 may be clipped
ERRORS = {"int8": 0.004, "float8_e4m3": 0.0358, "int4": 0.21}


@pytest.fixture(scope="module")
def stores(tiny_model, tmp_path_factory):
    """A store of each kind, of the Qwen2 of the other tests."""
    folder = tmp_path_factory.mktemp("quantised")
    for kind in KINDS:
        convert(tiny_model, folder / kind, SerialGroup(), Recipe(quantization=kind))
    return folder


def assert_near(found, expected, kind):
    """Every weight is near what it was, measured by the largest of those that share its scale."""
    size = GROUP if kind == "int4" else expected.shape[-1]
    for start in range(0, expected.shape[-1], size):
        part = expected[..., start : start + size]
        largest = np.abs(part).max(axis=-1, keepdims=True)
        assert (np.abs(found[..., start : start + size] - part) <= ERRORS[kind] * largest).all()


@pytest.mark.parametrize("quantization", KINDS)
def test_weights_are_near_the_checkpoint_and_vectors_equal_it(stores, tiny_store, quantization):
    with Store.open(tiny_store) as plain, Store.open(stores / quantization) as store:
        assert store.quantization == quantization and store.calibration is None
        for spec in param_specs(store.config, store.grains):
            expected = to_float32(*plain.read(spec.name))
            values, dtype, scales = store.read_weight(spec.name)
            kind = quantised_type(spec.name, quantization)
            if not kind:
                assert scales is None
                np.testing.assert_array_equal(to_float32(values, dtype), expected)
                continue
            assert dtype == kind and values.dtype == STORAGE[kind]
            found = dequantise(values, dtype, scales)
            assert not found[..., expected.shape[-1] :].any()
            assert_near(found[..., : expected.shape[-1]], expected, kind)


def test_what_is_quantised(stores):
    with Store.open(stores / "int8") as eight, Store.open(stores / "int4") as four, Store.open(stores / "fp8") as fp8:
        of_matrices = {param.dtype for name, param in eight.parameters.items() if "_proj.weight" in name}
        assert of_matrices == {"int8", "float32"}
        for name in ("embed_tokens.weight", "lm_head.weight"):
            assert eight.parameters[name] == four.parameters[name] == fp8.parameters[name]
            assert four.parameters[name].dtype == "int8"
        assert {p.dtype for n, p in fp8.parameters.items() if "_proj.weight" in n} == {"float8_e4m3", "float32"}
        assert fp8.spec("layers.0.o_proj.weight_scale").shape == (8, 56)
        assert four.spec("layers.0.o_proj.weight").shape == (8, 56, 16)  # 8 inputs, padded to 32
        assert four.spec("layers.0.o_proj.weight_scale").shape == (8, 56, 1)
        assert eight.spec("layers.0.o_proj.weight_scale").shape == (8, 56)  # a scale per grain
        assert four.parameters["layers.0.q_proj.bias"].dtype == four.parameters["norm.weight"].dtype == "bfloat16"


@pytest.mark.parametrize("quantization", KINDS)
def test_some_units_are_read_with_their_scales(stores, quantization):
    with Store.open(stores / quantization) as store:
        whole, part = (store.read_weight("layers.1.down_proj.weight", units) for units in (None, range(3, 5)))
        np.testing.assert_array_equal(part.values, whole.values[3:5])
        np.testing.assert_array_equal(part.scales, whole.scales[3:5])


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_change_no_byte(stores, tiny_model, tmp_path, size):
    recipe = Recipe(quantization="int4")
    assert run_ranks(size, lambda group: convert(tiny_model, tmp_path / "store", group, recipe)) == [None] * size
    with Store.open(tmp_path / "store") as shared, Store.open(stores / "int4") as alone:
        shared.verify()
        assert shared.digest == alone.digest


def test_digest_is_that_of_the_kind(stores, tiny_store):
    assert len({Store.open(path).digest for path in (tiny_store, *(stores / kind for kind in KINDS))}) == 4


def test_changed_quantisation_in_the_index_is_found(stores, tmp_path):
    shutil.copytree(stores / "int8", tmp_path / "store")
    with h5py.File(tmp_path / "store" / "index.h5", "r+") as file:
        del file["quantization"]
    with pytest.raises(StoreError, match="digest"):
        Store.open(tmp_path / "store")


@pytest.mark.parametrize("quantization", KINDS)
def test_damaged_scale_is_named(stores, tmp_path, quantization):
    shutil.copytree(stores / quantization, tmp_path / "store")
    with h5py.File(tmp_path / "store" / "layer-0001.h5", "r+") as file:
        file["up_proj.weight_scale"][6, 0] += 1
    with Store.open(tmp_path / "store") as store:
        store.read_weight("layers.1.up_proj.weight", range(6))
        for read in (lambda: store.read_weight("layers.1.up_proj.weight"), store.verify):
            with pytest.raises(StoreError, match=r"layer-0001\.h5, dataset up_proj\.weight_scale, chunk 6"):
                read()


def test_zero_weights_stay_zero(tmp_path):
    source = make_tiny_model(tmp_path / "model", "llama", num_hidden_layers=1)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(128, 64)
    save_file(tensors, source / "model.safetensors")
    for kind in KINDS:
        convert(source, tmp_path / kind, SerialGroup(), Recipe(quantization=kind))
        values, dtype, scales = Store.open(tmp_path / kind).read_weight("layers.0.gate_proj.weight")
        assert not scales.any() and not dequantise(values, dtype, scales).any()


@pytest.mark.parametrize("quantization", ["none", *KINDS])
def test_size_is_known_beforehand(tiny_model, tiny_store, stores, quantization):
    path = tiny_store if quantization == "none" else stores / quantization
    with Source(tiny_model) as source, Store.open(path) as store:
        names = [spec.name for spec in stored_specs(source.config, 8, quantization)]
        assert list(store.parameters) == names
        store.verify()
        assert store.num_bytes == store_size(source, Shape(8, quantization))


def test_inspect_shows_the_kind_and_the_bytes(stores, tiny_store):
    text = "\n".join(describe_store(Store.open(stores / "int4"), verify=True))
    assert "quantised to int4" in text and "bytes per weight" in text and "calibrated" not in text
    assert "quantised to fp8" in "\n".join(describe_store(Store.open(stores / "fp8"), verify=True))
    assert "as in the checkpoint" in "\n".join(describe_store(Store.open(tiny_store)))


def test_stores_that_are_not_quantised_keep_their_digest(tmp_path):
    convert(CHECKOUT / "examples" / "demo_model", tmp_path / "store", SerialGroup())
    assert Store.open(tmp_path / "store").digest == DEMO_DIGEST
