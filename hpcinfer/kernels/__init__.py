"""The array functions of a model behind one protocol, and their implementations."""

from hpcinfer.errors import ConfigError
from hpcinfer.kernels.protocol import Kernels

KERNEL_SETS = ("reference",)


def create_kernels(name: str = "reference", device: str = "cpu", threads: int = 1) -> Kernels:
    """Build a kernel set by name; only then are its libraries imported.

    Raises:
        ConfigError: a name or device that is not there.
    """
    if name not in KERNEL_SETS:
        raise ConfigError(f"kernels {name!r}", expected=f"one of {', '.join(KERNEL_SETS)}")
    if device not in ("auto", "cpu"):
        raise ConfigError(f"device {device!r}", expected="cpu", hint="the reference kernels run on CPUs only")
    from hpcinfer.kernels.reference import ReferenceKernels

    return ReferenceKernels(threads)
