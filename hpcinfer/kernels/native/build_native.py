"""What setup.py asks of cffi: the extension module of the native kernels. Runs at installation only, by its path."""

import re
from pathlib import Path

from cffi import FFI

SOURCES = Path(__file__).parent / "csrc"
# No contraction and no errno: a product and a sum are two roundings wherever the source does not say fma.
FLAGS = [
    "-std=gnu11", "-O3", "-ffp-contract=off", "-fno-fast-math", "-fno-math-errno", "-fvisibility=hidden", "-g0",
    "-fno-strict-aliasing",  # caches are written as integers and read as what they hold
]
OPENMP = ["-fopenmp"]


def make_builder() -> FFI:
    """Describe the module: its declarations are those of native.h, without the preprocessor's lines."""
    builder = FFI()
    builder.cdef(re.sub(r"^#.*$", "", (SOURCES / "native.h").read_text(), flags=re.MULTILINE))
    builder.set_source(
        "hpcinfer.kernels.native._native",
        '#include "native.h"',
        sources=sorted(map(str, SOURCES.glob("*.c"))),
        depends=sorted(map(str, SOURCES.glob("*.h"))),
        include_dirs=[str(SOURCES)],
        extra_compile_args=FLAGS + OPENMP,
        extra_link_args=OPENMP,
        libraries=["m"],
        optional=True,  # without a compiler hpcinfer installs too, and runs the reference kernels
    )
    return builder
