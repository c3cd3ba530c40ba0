"""Build and install hpcinfer. `comm/` and `partition/` stand at the top level and install as subpackages.

Builds go to a temporary folder: the checkout may be read-only, stays clean, and no stale `build/` gets into a wheel.
The native kernels and the node library (shared memory between ranks) are compiled if a C compiler, Python's headers and
cffi are there; HPCINFER_NATIVE=0 leaves them out.
"""

import os
from tempfile import TemporaryDirectory

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

TOP_LEVEL = ("comm", "partition")
NATIVE = ["hpcinfer/kernels/native/build_native.py:make_builder", "comm/node/build_node.py:make_builder"]


class BuildNative(build_ext):
    """Compiles with OpenMP, or without where the compiler has none: kernels then run on one thread."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension."""
        try:
            super().build_extension(ext)
        except (CompileError, LinkError):
            if "-fopenmp" not in ext.extra_compile_args:
                raise
            for flags in (ext.extra_compile_args, ext.extra_link_args):
                flags.remove("-fopenmp")
            super().build_extension(ext)


with TemporaryDirectory(prefix="hpcinfer-build-") as folder:
    setup(
        packages=[
            *find_packages(include=["hpcinfer", "hpcinfer.*"]),
            *(f"hpcinfer.{name}" for name in find_packages(include=[*TOP_LEVEL, *(f"{name}.*" for name in TOP_LEVEL)])),
        ],
        package_dir={f"hpcinfer.{name}": name for name in TOP_LEVEL},
        package_data={"hpcinfer": ["py.typed"]},
        include_package_data=False,  # no C sources in a wheel
        cffi_modules=[] if os.environ.get("HPCINFER_NATIVE") == "0" else NATIVE,
        cmdclass={"build_ext": BuildNative},
        options={"build": {"build_base": folder}, "egg_info": {"egg_base": folder}},
    )
