"""The native kernels: C, compiled at installation, one body of code for every instruction set."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

# Run from a checkout, `python -m hpcinfer.run` finds the sources first; the library is where hpcinfer was installed.
__path__.extend(os.path.join(entry, "hpcinfer", "kernels", "native") for entry in sys.path if entry)

if TYPE_CHECKING:
    from hpcinfer.kernels import Placement
    from hpcinfer.kernels.native.native import NativeKernels


def create_native_kernels(placement: Placement) -> NativeKernels | None:
    """Load the C library and build its kernels; None where it was not built.

    Raises:
        ConfigError: an instruction set is asked for that this machine does not have.
    """
    from hpcinfer.kernels.native.library import load

    library = load(placement.threads, placement.local_rank, placement.local_size)
    if library is None:
        return None
    from hpcinfer.kernels.native.native import NativeKernels

    return NativeKernels(library, placement.threads)
