"""What job tests share: a folder per file, and one converted demo model in it."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Place of all jobs of a file."""
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module", autouse=True)
def shared_cache(folder: Path) -> Iterator[None]:
    """Convert the model once per file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPCINFER_CACHE", str(folder / "cache"))
        yield
