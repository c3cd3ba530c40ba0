"""How many threads a rank computes with."""

from collections.abc import Mapping

from hpcinfer.errors import ConfigError

_VARIABLES = ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK")  # what launchers set, the more particular first


def resolve_threads(wanted: int | None, environment: Mapping[str, str]) -> int:
    """Resolve --threads: what was asked for, else what the launcher gives a rank, else 1.

    Not collective.

    Raises:
        ConfigError: less than one, or a variable that holds no number.
    """
    if wanted is not None:
        return _checked(wanted, f"--threads {wanted}")
    for name in _VARIABLES:
        text = environment.get(name, "").split(",")[0].strip()  # OMP_NUM_THREADS may be a list, a number per level
        if text:
            found = f"{name}={environment[name]}"
            return _checked(int(text) if text.isascii() and text.isdigit() else 0, found)
    return 1


def _checked(count: int, found: str) -> int:
    if count < 1:
        raise ConfigError(found, expected="a number of threads, at least 1")
    return count
