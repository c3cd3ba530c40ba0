"""scripts/install-slurm: only as root and where Slurm is missing, and never a reason to stop."""

import os
import subprocess
from pathlib import Path

import pytest
from sources import CHECKOUT

ROOT, USER = "echo 0", "echo 1000"


def install(folder: Path, user: str, apt_get: str, **programs: str) -> tuple[str, list[str]]:
    """What the script says, and what apt-get was told, with stand-ins for the programs that it asks."""
    calls = folder / "calls"
    calls.touch()
    programs = {"id": user, "apt-get": f'echo "$@" >>{calls}; {apt_get}', **programs}
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "HPCINFER_SLURM_LIMIT": "1"}
    script = CHECKOUT / "scripts/install-slurm"
    run = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=30)
    assert (run.returncode, run.stdout) == (0, "")
    return run.stderr, calls.read_text().splitlines()


needs_none = pytest.mark.skipif(os.path.exists("/usr/bin/slurmctld"), reason="Slurm is where it cannot be hidden")


@needs_none
def test_missing_slurm_is_installed(tmp_path: Path) -> None:
    said, calls = install(tmp_path, ROOT, "true")
    assert said == "hpcinfer: installing Slurm for its tests\n"
    assert calls[0] == "update"
    assert calls[1].startswith("install --download-only") and calls[2].startswith("install --no-download")
    assert all(call.endswith("libpmix2 iproute2") for call in calls[1:])


@needs_none
@pytest.mark.parametrize("apt_get, reason", [("echo E: no network; false", "E: no network"), ("sleep 5", "")])
def test_goes_on_without_slurm(apt_get: str, reason: str, tmp_path: Path) -> None:
    said, calls = install(tmp_path, ROOT, apt_get)
    assert said.splitlines()[1:] == [f"hpcinfer: no Slurm, its tests are skipped: {reason}"]
    assert calls == ["update"]


@pytest.mark.parametrize("user, programs", [(USER, {}), (ROOT, {"slurmctld": "true"})])
def test_leaves_the_system_as_it_is(user: str, programs: dict[str, str], tmp_path: Path) -> None:
    assert install(tmp_path, user, "true", **programs) == ("", [])
