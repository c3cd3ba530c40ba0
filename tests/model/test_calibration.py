import numpy as np
import pytest
import torch
from models import FAMILIES, make_tiny_model
from thread_group import run_ranks
from transformers import AutoModelForCausalLM

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.dtypes import dequantise
from hpcinfer.errors import ModelError, PeerError
from hpcinfer.model.calibration import Calibration
from hpcinfer.weights.conversion import Recipe, convert
from hpcinfer.weights.reader import Store
from hpcinfer.weights.source import Source

VARIANTS = [(family, {}) for family in FAMILIES]
VARIANTS += [
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("qwen2", {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 56, "intermediate_size": 100}),
]
WINDOWS = [tuple(np.random.default_rng(i).integers(0, 300, 20 + i).tolist()) for i in range(5)]
LAYERS = 3


def moments_of(folder, grains=8, owner=0, group=None):
    """What the calibration says of each layer."""
    with Source(folder) as source:
        calibration = Calibration(source, grains, WINDOWS, group or SerialGroup())
        return [calibration.moments(layer, owner) for layer in range(LAYERS)]


def inputs_in_transformers(folder):
    """Inputs of every projection of every layer, all windows one after another: {(layer, name): [T, inputs]}."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            layer, key = int(name.split(".")[2]), name.split(".")[-1]
            module.register_forward_hook(
                lambda module, inputs, output, key=(layer, key): seen.setdefault(key, []).append(inputs[0][0])
            )
    with torch.no_grad():
        for window in WINDOWS:
            model(torch.tensor([window]))
    return {key: torch.cat(parts).double().numpy() for key, parts in seen.items()}


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_moments_are_those_of_transformers_inputs(tmp_path, family, overrides):
    folder = make_tiny_model(tmp_path / "model", family, **overrides)
    found, expected = moments_of(folder, grains=1), inputs_in_transformers(folder)
    for (layer, name), x in expected.items():
        ours, theirs = found[layer][f"{name}.weight"], x.T @ x
        assert len(ours) == 1
        size = len(theirs)
        assert not ours[0, size:].any() and not ours[0, :, size:].any()
        np.testing.assert_allclose(ours[0, :size, :size], theirs, atol=1e-4 * np.abs(theirs).max())


def test_row_parallel_weights_have_moments_of_each_grain(tmp_path):
    folder = make_tiny_model(tmp_path / "model", "llama", intermediate_size=100)
    whole, cut = moments_of(folder, grains=1)[2]["down_proj.weight"][0], moments_of(folder)[2]["down_proj.weight"]
    assert cut.shape == (8, 64, 64)
    np.testing.assert_allclose(cut[1, :13, :13], whole[13:26, 13:26])  # 13, 13, 13, 13, 12, ... of 100
    assert not cut[:, 13:].any()


@pytest.mark.parametrize("size", [2, 3, 7])
def test_sums_do_not_depend_on_the_ranks_and_are_on_the_owner(tmp_path, size):
    folder = make_tiny_model(tmp_path / "model", "llama")
    alone = moments_of(folder)
    results = run_ranks(size, lambda group: moments_of(folder, owner=1, group=group))
    assert all(layer == {} for rank, layers in enumerate(results) if rank != 1 for layer in layers)
    for ours, theirs in zip(results[1], alone, strict=True):
        assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated")
    make_tiny_model(folder / "model", "llama")
    convert(folder / "model", folder / "store", SerialGroup(), recipe_for(SerialGroup()))
    return folder


def recipe_for(group):
    return Recipe(quantization="int4", calibrate=lambda source, grains: Calibration(source, grains, WINDOWS, group))


@pytest.mark.parametrize("size", [2, 3])
def test_calibrated_store_is_the_same_for_any_ranks(calibrated, tmp_path, size):
    results = run_ranks(size, lambda g: convert(calibrated / "model", tmp_path / "store", g, recipe_for(g)))
    assert results == [None] * size
    assert Store.open(tmp_path / "store").digest == Store.open(calibrated / "store").digest


def test_calibrated_weights_lose_less_of_the_outputs(calibrated, tmp_path):
    convert(calibrated / "model", tmp_path / "plain", SerialGroup(), Recipe(quantization="int4"))
    plain, better = Store.open(tmp_path / "plain"), Store.open(calibrated / "store")
    assert better.calibration["tokens"] == sum(map(len, WINDOWS)) and plain.calibration is None
    inputs = inputs_in_transformers(calibrated / "model")
    tensors = AutoModelForCausalLM.from_pretrained(calibrated / "model").model.layers
    for layer in range(LAYERS):
        x, weight = inputs[layer, "gate_proj"], tensors[layer].mlp.gate_proj.weight.detach().numpy()
        errors = []
        for store in (better, plain):
            units = dequantise(*store.read_weight(f"layers.{layer}.gate_proj.weight"))
            found = np.concatenate([unit[:16] for unit in units])  # 128 columns over 8 grains
            errors.append(np.linalg.norm(x @ (found - weight).T))
        assert errors[0] < 0.9 * errors[1]


def test_inputs_that_are_not_finite_are_refused_on_all_ranks(calibrated):
    def run(group):
        with Source(calibrated / "model") as source:
            calibration = Calibration(source, 8, WINDOWS, group)
            calibration._hidden[0][:] = np.nan
            with pytest.raises((ModelError, PeerError), match=r"layers\.1\.q_proj\.weight are not finite") as caught:
                calibration.moments(1, owner=1)
            return type(caught.value)

    assert run_ranks(2, run) == [PeerError, ModelError]
