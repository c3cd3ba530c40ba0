"""What the tests on Slurm share: one cluster of four nodes, rows, and the bytes that every job must come to."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from golden import DEMO_MODEL, demo_prompts, run_to_output, varied_rows, write_rows
from slurm_cluster import Cluster, require_slurm

NUM_NODES = 4
NUM_ROWS = 300


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes, for the whole session."""
    require_slurm()
    # Names that pytest makes are too long for a socket.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Cluster(Path(folder), NUM_NODES) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of every kind."""
    rows = varied_rows(demo_prompts(60) * (NUM_ROWS // 60))
    return write_rows(tmp_path_factory.mktemp("slurm") / "in.jsonl", rows)


@pytest.fixture(scope="session")
def digest(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """SHA-256 that one rank comes to, without Slurm."""
    return run_to_output(tmp_path_factory.mktemp("alone"), 1, DEMO_MODEL, prompts).digest
