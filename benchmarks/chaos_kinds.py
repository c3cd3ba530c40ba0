"""What can be done to a job, each kind with what it needs, and what should come of it."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from chaos_damage import flip_bit, sound_rows, tear_tail
from chaos_places import Launch
from chaos_scene import Scene
from virtual_hosts import Cluster

TOLERANT, PLAIN, SUPERVISED = Launch(is_tolerant=True), Launch(), Launch(is_supervised=True)
ON_HOSTS, WITH_SPARE = Launch(is_tolerant=True, on_hosts=True), Launch(is_tolerant=True, num_spares=1)
_HANG_TIMEOUT_S = 2
_SILENT_S = 10.0  # nobody looks at a job with a host that is cut off for longer


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    name: str
    inflict: Callable[[Scene], None]
    launch: Launch
    moments: tuple[str, ...] = ("prefill", "decode", "decode", "merge")
    goes_on: bool = False  # the job is not started again
    exit_codes: tuple[int, ...] = ()  # one of these, if any are named, when the fault has come in time
    may_overlap: bool = False  # whoever is taken for dead may still work, and finish rows that others have finished
    min_ranks: int = 1
    weight: int = 1  # how often among all kinds
    options: tuple[str, ...] = ()  # of `hpcinfer run`
    is_on_small_disk: bool = False  # the job directory


def _kill_rank(scene: Scene) -> None:
    process = scene.choose_rank()
    if process is not None:
        scene.signal(process, signal.SIGKILL, f"kill -9 of rank {process.rank}")


def _kill_several(scene: Scene, pause_s: float) -> None:
    for _ in range(scene.rng.randint(2, max(2, scene.mesh.ranks - 1))):
        _kill_rank(scene)
        time.sleep(scene.rng.uniform(0, pause_s))


def _kill_launcher(scene: Scene) -> None:
    launcher = next((process for process in scene.job.processes() if process.pid == scene.job.pid), None)
    scene.signal(launcher, signal.SIGKILL, "kill -9 of the command")


def _kill_daemon(scene: Scene) -> None:
    daemons = [process for process in scene.job.processes() if process.rank is None and "prted" in process.command]
    scene.signal(scene.rng.choice(daemons) if daemons else None, signal.SIGKILL, "kill -9 of a host's MPI daemon")


def _stop_politely(scene: Scene) -> None:
    number = scene.rng.choice([signal.SIGTERM, signal.SIGUSR1])
    ranks = scene.job.ranks()
    for process in ranks if scene.rng.random() < 0.7 else ranks[:1]:
        scene.signal(process, number, f"{number.name} to rank {process.rank}")


def _pause(scene: Scene) -> None:
    process = scene.choose_rank()
    scene.signal(process, signal.SIGSTOP, "SIGSTOP, then SIGCONT")
    time.sleep(scene.rng.uniform(0.2, 1.5))
    if process is not None:
        process.send(signal.SIGCONT)


def _freeze(scene: Scene) -> None:
    scene.signal(scene.choose_rank(), signal.SIGSTOP, "SIGSTOP for ever")


def _kill_host(scene: Scene) -> None:
    _on_host(scene, "kill", "all of a host killed")


def _cut_for_seconds(scene: Scene) -> None:
    host = _on_host(scene, "cut", "host cut off, for seconds")
    time.sleep(scene.rng.uniform(0.2, 1.2))
    _cluster(scene).tell("heal", host)


def _cut_for_ever(scene: Scene) -> None:
    host = _on_host(scene, "cut", "host cut off, for ever")
    if scene.job.wait(_SILENT_S) is None:
        scene.job.end()
    _cluster(scene).tell("heal", host)


def _on_host(scene: Scene, command: str, what: str) -> str:
    host = f"vh{scene.rng.randrange(scene.mesh.ranks)}"
    scene.journal.look()
    now = time.time()
    _cluster(scene).tell(command, host)
    scene.note(f"{what} ({host})", now)
    return host


def _cluster(scene: Scene) -> Cluster:
    assert scene.places.cluster is not None
    return scene.places.cluster


def _fill_disk(scene: Scene) -> None:
    disk = scene.places.disk
    assert disk is not None
    disk.fill()
    scene.note("no room on the file system")
    scene.job.wait(scene.rng.uniform(1, 10))
    disk.make_room()


def _damage(scene: Scene, change: Callable[..., str]) -> None:
    scene.job.end()
    before = sound_rows(scene.paths)
    what = change(scene.paths, scene.rng)
    if what:
        scene.damaged |= before - sound_rows(scene.paths)
        scene.note(what)


_ANY = ("start", "loading", "prefill", "decode", "decode", "merge")
_WORKING = ("prefill", "decode", "decode")
_LOADED = ("loading", "prefill", "decode", "decode", "merge")
KINDS = {
    kind.name: kind
    for kind in (
        Kind("rank", _kill_rank, TOLERANT, _LOADED, goes_on=True, min_ranks=2, weight=6),
        Kind("ranks", lambda scene: _kill_several(scene, 1.5), TOLERANT, _WORKING, goes_on=True, min_ranks=3, weight=2),
        Kind("recovery", lambda scene: _kill_several(scene, 0.1), TOLERANT, _WORKING, goes_on=True, min_ranks=3,
             weight=2),
        Kind("spare", _kill_rank, WITH_SPARE, _LOADED, goes_on=True, weight=2),
        Kind("plain-rank", _kill_rank, PLAIN, _ANY, weight=2),
        Kind("launcher", _kill_launcher, PLAIN, _ANY, weight=2),
        Kind("supervisor", _kill_launcher, SUPERVISED, _ANY),
        Kind("supervised-rank", _kill_rank, SUPERVISED, _WORKING, goes_on=True),
        Kind("hang", _freeze, TOLERANT, _WORKING, goes_on=True, may_overlap=True, min_ranks=2,
             options=("--hang-timeout", str(_HANG_TIMEOUT_S))),
        Kind("pause", _pause, TOLERANT, goes_on=True, may_overlap=True, min_ranks=2),
        Kind("signal", _stop_politely, PLAIN, _WORKING, exit_codes=(0, 75), weight=2),
        Kind("host", _kill_host, ON_HOSTS, _WORKING, min_ranks=2),
        Kind("daemon", _kill_daemon, ON_HOSTS, _WORKING, min_ranks=2),
        Kind("cut-seconds", _cut_for_seconds, ON_HOSTS, _WORKING, may_overlap=True, min_ranks=2),
        Kind("cut-forever", _cut_for_ever, ON_HOSTS, _WORKING, may_overlap=True, min_ranks=2),
        Kind("disk-full", _fill_disk, PLAIN, ("decode",), exit_codes=(0, 1), is_on_small_disk=True),
        Kind("torn", lambda scene: _damage(scene, tear_tail), PLAIN, ("decode", "merge")),
        Kind("flipped", lambda scene: _damage(scene, flip_bit), PLAIN, ("decode", "merge")),
    )
}  # fmt: skip
