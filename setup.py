"""Build and install hpcinfer. `comm/` and `partition/` stand at the top level and install as subpackages.

Builds go to a temporary folder: the checkout may be read-only, stays clean, and no stale `build/` gets into a wheel.
"""

from tempfile import TemporaryDirectory

from setuptools import find_packages, setup

TOP_LEVEL = ("comm", "partition")

with TemporaryDirectory(prefix="hpcinfer-build-") as folder:
    setup(
        packages=[
            *find_packages(include=["hpcinfer", "hpcinfer.*"]),
            *(f"hpcinfer.{name}" for name in TOP_LEVEL),
        ],
        package_dir={f"hpcinfer.{name}": name for name in TOP_LEVEL},
        package_data={"hpcinfer": ["py.typed"]},
        options={"build": {"build_base": folder}, "egg_info": {"egg_base": folder}},
    )
