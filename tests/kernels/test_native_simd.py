"""The sixteen lanes of the native kernels: every instruction set against numpy, and against each other bit for bit."""

import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from sources import CHECKOUT

native = pytest.importorskip("hpcinfer.kernels.native._native", reason="the native kernels are not built")

SOURCES = CHECKOUT / "hpcinfer" / "kernels" / "native" / "csrc"
FLAGS = ["-std=gnu11", "-O2", "-ffp-contract=off", "-fno-math-errno", f"-I{SOURCES}"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"]
SETS = {  # file and options of the compiler
    "avx512vnni": ("simd_avx512.h", [*AVX512, "-mavx512vnni"]),
    "avx512": ("simd_avx512.h", [*AVX512, "-DHPC_WITHOUT_VNNI"]),
    "avx2": ("simd_avx2.h", ["-mavx2", "-mfma"]),
    "neon": ("simd_neon.h", []),
    "plain": ("simd_plain.h", []),
}
ARM = {  # on other machines, where a cross compiler and an emulator are installed
    "neon alone": [], "neon with dotprod": ["-march=armv8.2-a+dotprod"], "neon with i8mm": ["-march=armv8.6-a+i8mm"],
}  # fmt: skip
HERE = native.ffi.string(native.lib.hpc_isas()).decode().split()
NAMES = [
    "add", "sub", "mul", "div", "fma", "round", "max", "min", "lt", "sum", "largest",
    "vi_add", "and", "shl", "shr", "dot", "nibbles", "vi_lt", "vm_and", "of_vi", "iota",
    "vi_load", "load_s8", "load_bf16", "load_tail", "store_tail", "of_vf", "store_s8",
]  # fmt: skip
EDGES = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, -2.5, 2.0**23 + 1, 1e-45, -1e-39, 1.17549435e-38, 3.4028235e38, -3.4028235e38,
         np.inf, -np.inf, np.nan]  # fmt: skip
COUNT = 400


def _blocks():
    """Three times 16 numbers a block: random bits, numbers of one size, and all pairs of the edges."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, (COUNT // 2, 3, 16), dtype=np.uint32).view(np.float32)
    sized = rng.standard_normal((COUNT // 2 - 16, 3, 16)).astype(np.float32) * np.float32(50)
    edges = np.array([[EDGES, np.roll(EDGES, i), np.roll(EDGES, 2 * i)] for i in range(16)], np.float32)
    return np.concatenate([bits, sized, edges])


BLOCKS = _blocks()


def _run(folder, compiler, header, options, launcher=()):
    """Compile the probe and give it the blocks: uint32 [COUNT, functions, 16]."""
    program, source = folder / "probe", Path(__file__).with_name("simd_probe.c")
    defines = [f'-DSIMD_FILE="{header}"', f"-DCOUNT={COUNT}"]
    subprocess.run([compiler, *FLAGS, *options, *defines, source, "-o", program, "-lm"], check=True)
    found = subprocess.run([*launcher, program], input=BLOCKS.tobytes(), capture_output=True, check=True).stdout
    return np.frombuffer(found, np.uint32).reshape(COUNT, -1, 16)


@pytest.fixture(scope="module")
def compiler():
    found = shutil.which("cc") or shutil.which("gcc")
    if found is None:
        pytest.skip("no C compiler")
    return found


@pytest.fixture(scope="module")
def plain(compiler, tmp_path_factory):
    return _run(tmp_path_factory.mktemp("plain"), compiler, *SETS["plain"])


def _one_nan(bits):
    """The same bits, but with one NaN: which one an operation gives is the machine's own choice."""
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, np.uint32(0x7FC00000), bits)


def _assert_alike(found, plain):
    assert found.shape == plain.shape
    for i, name in enumerate(NAMES):
        np.testing.assert_array_equal(_one_nan(found[:, i]), _one_nan(plain[:, i]), name)


@pytest.mark.parametrize("name", SETS)
def test_all_instruction_sets_give_the_same_bits(name, plain, compiler, tmp_path):
    if name not in HERE:
        pytest.skip(f"this machine or build has no {name}")
    _assert_alike(_run(tmp_path, compiler, *SETS[name]), plain)


@pytest.mark.parametrize("name", ARM)
def test_arm_gives_the_same_bits(name, plain, tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("no cross compiler and emulator for 64-bit Arm")
    _assert_alike(_run(tmp_path, compiler, "simd_neon.h", [*ARM[name], "-static"], [emulator]), plain)


def _sum_to_odd(product, added):
    """The sum in float64, rounded to the odd one of its neighbours, so that rounding it again to float32 is right."""
    if not (math.isfinite(product) and math.isfinite(added)):
        return product + added
    total = math.fsum((product, added))
    rest = math.fsum((product, added, -total))
    if rest and not np.float64(total).view(np.int64) & 1:
        return math.nextafter(total, math.copysign(math.inf, rest))
    return total or product + added  # fsum has no -0


def _fma(a, b, c):
    """a * b + c, rounded once: the product is exact in float64."""
    sums = map(_sum_to_odd, (a.astype(float) * b).flat, c.astype(float).flat)
    return np.array(list(sums)).reshape(a.shape).astype(np.float32)


def _tree(lanes, combine):
    for half in (8, 4, 2, 1):
        lanes = combine(lanes[:, :half], lanes[:, half : 2 * half])
    return np.repeat(lanes, 16, axis=1)


def _larger(a, b):
    return np.where(a > b, a, b)


def _expected_arithmetic(a, b, c):
    return {
        "add": a + b, "sub": a - b, "mul": a * b, "div": a / b, "fma": _fma(a, b, c),
        "round": np.rint(a), "max": _larger(a, b), "min": np.where(a < b, a, b), "lt": np.where(a < b, 1.0, 2.0),
        "sum": _tree(a, np.add), "largest": _tree(a, _larger),
    }  # fmt: skip


def _expected_integers(a, b, c):
    products = b.view(np.uint8).astype(np.int64) * c.view(np.int8)
    dots = (a >> 4) + products.reshape(*b.shape, 4).sum(-1).astype(np.uint32)
    products = (b & 0x0F0F0F0F).view(np.uint8).astype(np.int64) * c.view(np.int8)
    nibbles = 8 * products.reshape(*b.shape, 4).sum(-1) - 40
    is_less, is_less_too = (x.view(np.int32) < y.view(np.int32) for x, y in ((a, b), (b, c)))
    return {
        "vi_add": a + b, "and": a & b, "shl": a << 23, "shr": a >> 4, "dot": dots,
        "nibbles": nibbles.astype(np.int32),
        "vi_lt": np.where(is_less, 1.0, 2.0), "vm_and": np.where(is_less & is_less_too, 1.0, 2.0),
        "of_vi": a.view(np.int32).astype(np.float32), "iota": np.tile(np.arange(16, dtype=np.int32) - 7, (COUNT, 1)),
    }  # fmt: skip


def _expected_memory(floats, raw):
    lengths = 1 + np.arange(COUNT) % 16
    tails = np.where(np.arange(16) < lengths[:, None], floats, 0)
    small = np.rint(np.clip(np.where(np.isnan(floats), 127, floats), -128, 127)).astype(np.int32)
    codes = np.zeros((COUNT, 64), np.int8)
    codes[:, :16] = small
    return {
        "vi_load": raw, "load_s8": raw.view(np.int8)[:, :16].astype(np.float32),
        "load_bf16": raw.view(np.uint16)[:, :16].astype(np.uint32) << 16, "load_tail": tails, "store_tail": tails,
        "of_vf": small, "store_s8": codes.view(np.uint32),
    }  # fmt: skip


def test_lanes_do_what_they_say(plain):
    a, b, c = (np.ascontiguousarray(BLOCKS[:, i]) for i in range(3))
    bits = [lanes.view(np.uint32) for lanes in (a, b, c)]
    with np.errstate(all="ignore"):
        expected = _expected_arithmetic(a, b, c) | _expected_integers(*bits) | _expected_memory(a, bits[1])
    assert list(expected) == NAMES and plain.shape[1] == len(NAMES)
    for i, (name, values) in enumerate(expected.items()):
        wanted = values.astype(np.float32) if values.dtype == np.float64 else np.ascontiguousarray(values)
        np.testing.assert_array_equal(_one_nan(plain[:, i]), _one_nan(wanted.view(np.uint32)), name)
