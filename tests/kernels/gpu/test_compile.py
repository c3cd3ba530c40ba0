"""The kernels compile for a GPU that is not here: every kernel, with the instructions that the contract counts on."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MEMORY = 227 * 1024  # bytes that a program may have
SCRIPT = Path(__file__).with_name("compile_only.py")
INPUTS = {  # of one matrix instruction; by what is compiled: types of products and cache, tokens, head size
    "bfloat16,bfloat16,1,128": "k16",
    "bfloat16,int8,150,64": "k16",
    "int8,bfloat16,150,32": "k32",
    "float8_e4m3,fp8,1,128": "k32",
    "float8_e4m3,fp8,150,64": "k32",
    "float8_e4m3,fp8,150,64,without fp8": "k16",
    "float32,float32,1,32": None,
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What became of each launch, by case and kernel."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, SCRIPT, *INPUTS], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    cases = {}
    for case, launches in json.loads(done.stdout).items():
        for each in launches:
            cases.setdefault(case, {}).setdefault(each["kernel"], []).append(each)
    return cases


@pytest.mark.parametrize("case", INPUTS)
def test_kernels_compile_for_hopper(compiled, case):
    names = {"_find_kernel", "_embed_kernel", "_norm_kernel", "_rotate_kernel", "_attention_kernel", "product_kernel"}
    names |= {"_merge_kernel", "tree_kernel"} if ",1," in case else set()
    names |= {"_quantise_kernel"} if case.startswith(("int8", "float8")) else set()
    assert set(compiled[case]) == names
    launches = [each for every in compiled[case].values() for each in every]
    assert not any(each["imprecise"] for each in launches)
    assert all(each["shared"] <= SHARED_MEMORY for each in launches)


@pytest.mark.parametrize("case", INPUTS)
def test_all_tiles_have_one_kind_of_instruction(compiled, case):
    for each in compiled[case]["product_kernel"]:
        assert bool(each["matrix"]) == (INPUTS[case] is not None)
        assert all(name.startswith("wgmma") and f"{INPUTS[case]}." in name for name in each["matrix"])


@pytest.mark.parametrize("case", INPUTS)
def test_nothing_is_contracted_but_products(compiled, case):
    rows = [each for name in ("_embed_kernel", "_norm_kernel", "_rotate_kernel") for each in compiled[case][name]]
    products = [] if INPUTS[case] is None else compiled[case]["product_kernel"]
    assert not any(each["contracted"] for each in (*rows, *products))
