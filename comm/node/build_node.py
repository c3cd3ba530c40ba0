"""What setup.py asks of cffi: the extension module of the node library. Runs at installation only, by its path."""

import re
from pathlib import Path

from cffi import FFI

SOURCES = Path(__file__).parent / "csrc"
# No contraction: sums are additions in an order, each rounded.
FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=off", "-fno-fast-math", "-fvisibility=hidden", "-g0"]


def make_builder() -> FFI:
    """Describe the module: its declarations are those of node.h, without the preprocessor's lines."""
    builder = FFI()
    builder.cdef(re.sub(r"^#.*$", "", (SOURCES / "node.h").read_text(), flags=re.MULTILINE))
    builder.set_source(
        "hpcinfer.comm.node._node",
        '#include "node.h"',
        sources=sorted(map(str, SOURCES.glob("*.c"))),
        depends=sorted(map(str, SOURCES.glob("*.h"))),
        include_dirs=[str(SOURCES)],
        extra_compile_args=FLAGS,
        optional=True,  # without a compiler hpcinfer installs too, and ranks of a node talk through the MPI
    )
    return builder
