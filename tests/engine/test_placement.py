import pytest

from hpcinfer.engine.placement import resolve_threads
from hpcinfer.errors import ConfigError


@pytest.mark.parametrize(("wanted", "environment", "expected"), [
    (None, {}, 1), (3, {}, 3), (3, {"OMP_NUM_THREADS": "8"}, 3), (2, {"OMP_NUM_THREADS": "many"}, 2),
    (None, {"OMP_NUM_THREADS": "8"}, 8), (None, {"SLURM_CPUS_PER_TASK": "4"}, 4),
    (None, {"OMP_NUM_THREADS": "2", "SLURM_CPUS_PER_TASK": "4"}, 2), (None, {"OMP_NUM_THREADS": "6,2"}, 6),
    (None, {"OMP_NUM_THREADS": "", "SLURM_CPUS_PER_TASK": " 5 "}, 5), (None, {"SLURM_CPUS_PER_TASK": " "}, 1),
])  # fmt: skip
def test_threads_are_what_was_asked_for_or_what_the_launcher_gives(wanted, environment, expected):
    assert resolve_threads(wanted, environment) == expected


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"])
@pytest.mark.parametrize("value", ["0", "-2", "many", "2.5", "1e3", "²"])
def test_bad_variables_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        resolve_threads(None, {name: value})


@pytest.mark.parametrize("wanted", [0, -1])
def test_less_than_one_thread_is_refused(wanted):
    with pytest.raises(ConfigError, match=f"--threads {wanted}"):
        resolve_threads(wanted, {"OMP_NUM_THREADS": "4"})
