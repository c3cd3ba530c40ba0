"""Do nodes see each other's files in the directory of the output, and does one of many win a race for a name?"""

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpcinfer.diagnosis.files import Shared
from hpcinfer.diagnosis.packing import pack, unpack
from hpcinfer.diagnosis.trial import PREFIX

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

_PATIENCE_S = 3.0  # an NFS client may hold an old directory for as long
_ABANDONED_S = 3600.0
_FIRST, _MORE = b"first\n", b"more\n"


def measure_sharing(world: "Collectives", parent: Path, ranks: Sequence[int]) -> dict[int, Shared]:
    """Write files on the root, look for them on the others, then let all want the same names.

    Collective over the world.

    Args:
        world: all ranks.
        parent: the directory of the output, as each rank sees it.
        ranks: one for each node, the root among them.

    Returns:
        On the root what each of `ranks` saw; elsewhere, and if the root cannot write, nothing.
    """
    name = world.broadcast_bytes(_prepare(parent) if world.rank == 0 else None).decode()
    if not name:
        return {}
    folder, seen = parent / name, b""
    problem = _not_seen(folder / "file", _FIRST) if world.rank in ranks else ""
    world.barrier()
    if world.rank == 0:
        with contextlib.suppress(OSError), open(folder / "file", "ab") as stream:
            stream.write(_MORE)
            stream.flush()
            os.fsync(stream.fileno())
    world.barrier()
    if world.rank in ranks:
        seen = pack(Shared(problem) if problem else _look_and_race(folder, world.rank))
    answers = world.all_gather_bytes(seen)
    if world.rank != 0:
        return {}
    shutil.rmtree(folder, ignore_errors=True)
    return {rank: unpack(Shared, data) for rank, data in enumerate(answers) if data}


def _prepare(parent: Path) -> bytes:
    name = f"{PREFIX}{secrets.token_hex(6)}"
    try:
        (parent / name).mkdir()
        (parent / name / "file").write_bytes(_FIRST)
        _remove_abandoned(parent, (parent / name).stat().st_mtime)
    except OSError:
        return b""  # the directory's own trial says so
    return name.encode()


def _remove_abandoned(parent: Path, now: float) -> None:
    """Delete what doctors that were killed have left; `now` is the file system's time."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another doctor may be faster
            if now - folder.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(folder)


def _not_seen(file: Path, content: bytes) -> str:
    """Wait until a file has the content; "" when it has, else why not."""
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            data = file.read_bytes()
            if data == content:
                return ""
            problem = f"{len(data)} of {len(content)} bytes are there"
        except OSError as error:
            problem = error.strerror or str(error)
        if time.monotonic() > end:
            return problem
        time.sleep(0.01)


def _look_and_race(folder: Path, rank: int) -> Shared:
    start = time.monotonic()
    problem = _not_seen(folder / "file", _FIRST + _MORE)
    delay_s = time.monotonic() - start
    own = folder / f"{rank}"
    try:
        own.touch()
        return Shared(problem, delay_s, _wins(lambda: _make(folder / "exclusive")),
                      _wins(lambda: os.link(own, folder / "linked")) or own.stat().st_nlink == 2)  # fmt: skip
    except OSError as error:
        return Shared(problem or error.strerror or str(error), delay_s)


def _wins(work: Callable[[], None]) -> bool:
    try:
        work()
    except FileExistsError:
        return False
    return True


def _make(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
