"""Loading the native kernels: instruction sets, and which CPUs a rank's threads take."""

import os
import subprocess
import sys
import tempfile
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.kernels.native.library import (
    Binding,
    available_cpus,
    choose_cpus,
    cores_of,
    instruction_sets,
    is_crowded,
    load,
    parse_cpu_list,
)


def one_each(*cpus):
    """Cores of one hardware thread."""
    return [(cpu,) for cpu in cpus]


def two_each(count):
    """Cores of two, numbered as Linux does: all first threads, then all second ones."""
    return [(core, core + count) for core in range(count)]


@given(
    cores=st.integers(1, 16), threads_per_core=st.integers(1, 2), local_size=st.integers(1, 8),
    threads=st.integers(1, 8),
)  # fmt: skip
def test_ranks_that_share_a_node_take_cpus_of_their_own(cores, threads_per_core, local_size, threads):
    seen = [tuple(core + cores * i for i in range(threads_per_core)) for core in range(cores)]
    num_cpus = cores * threads_per_core
    bindings = [choose_cpus(seen, num_cpus, rank, local_size, threads) for rank in range(local_size)]
    if local_size * threads > num_cpus:
        assert not any(bindings) and is_crowded(seen, num_cpus, local_size, threads)
        return
    assert not is_crowded(seen, num_cpus, local_size, threads)
    workers = [cpu for binding in bindings for cpu in binding.workers]
    assert len(workers) == len(set(workers)) == local_size * (threads - 1)
    for binding in bindings:
        assert set(binding.workers) < binding.caller <= set(range(num_cpus))
    if local_size * threads <= cores:
        assert all(cpu < cores for cpu in workers), "a second thread of a core was taken before all first ones"
    for rank, binding in enumerate(bindings):
        others = {cpu for other in range(local_size) if other != rank for cpu in bindings[other].workers}
        assert not others & binding.caller


@pytest.mark.parametrize(("cores", "node_cpus", "local_rank", "local_size", "threads", "expected"), [
    (one_each(0, 1), 2, 0, 1, 2, Binding(frozenset({0, 1}), (1,))),  # alone on the node
    (one_each(0, 1), 2, 1, 2, 1, Binding(frozenset({1}), ())),
    (one_each(0, 1, 2, 3), 4, 0, 2, 1, Binding(frozenset({0, 2, 3}), ())),  # what nobody takes is free for both
    (one_each(0, 1), 2, 1, 4, 1, None),  # crowded
    (one_each(4, 5), 8, 2, 4, 2, Binding(frozenset({4, 5}), (5,))),  # bound by the launcher
    ([(4, 12), (5, 13)], 16, 2, 4, 2, Binding(frozenset({4, 5, 12, 13}), (5,))),  # bound to cores
    (one_each(4, 5, 6), 8, 2, 4, 2, None),  # bound to more than our own: others may be there
    (one_each(3), 8, 3, 8, 1, None),  # bound to one CPU: nothing is left to choose
    (two_each(2), 4, 0, 1, 4, Binding(frozenset({0, 1, 2, 3}), (1, 2, 3))),
])  # fmt: skip
def test_choice_of_cpus(cores, node_cpus, local_rank, local_size, threads, expected):
    assert choose_cpus(cores, node_cpus, local_rank, local_size, threads) == expected


@pytest.mark.parametrize(("cores", "node_cpus", "local_size", "threads", "expected"), [
    (one_each(0, 1), 2, 1, 2, False), (one_each(0, 1), 2, 1, 3, True), (one_each(0, 1), 2, 2, 2, True),
    (one_each(0, 1), 8, 4, 2, False),  # the launcher gave each rank its two
    (one_each(0, 1), 8, 4, 1, True),  # four ranks see the same two, or have two each: sleeping is right for both
])  # fmt: skip
def test_crowd_is_seen(cores, node_cpus, local_size, threads, expected):
    assert is_crowded(cores, node_cpus, local_size, threads) == expected


def test_cpu_lists_are_read_as_linux_writes_them():
    assert parse_cpu_list("0-2,8\n") == {0, 1, 2, 8} and parse_cpu_list("5") == {5}
    with pytest.raises(ValueError):
        parse_cpu_list("")


def test_cores_cover_the_cpus_of_this_process():
    cpus = [cpu for core in cores_of(available_cpus()) for cpu in core]
    assert sorted(cpus) == sorted(available_cpus())
    assert cores_of({10**6}) == [(10**6,)]  # of which the system tells nothing


@pytest.fixture(scope="module")
def library():
    loaded = load(local_rank=None)
    if loaded is None:
        pytest.skip("the native kernels were not built")
    return loaded


def python(code, **environment):
    argv = [sys.executable, "-c", textwrap.dedent(code)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    # elsewhere: Python would find the checkout's hpcinfer in the working directory before the installed one
    where = {"cwd": tempfile.gettempdir(), "env": {**clean, **environment}}
    run = subprocess.run(argv, capture_output=True, text=True, timeout=60, **where)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_best_instruction_set_is_the_default_and_others_can_be_forced(library):
    possible = instruction_sets(library)
    assert possible[-1] == "plain"
    code = """
        from hpcinfer.kernels.native.library import load
        library = load()
        print(library.ffi.string(library.lib.hpc_isa()).decode())
    """
    assert python(code) == [possible[0]]
    assert [python(code, HPCINFER_SIMD=name) for name in possible] == [[name] for name in possible]


def test_impossible_instruction_set_is_refused_with_those_that_are_possible(library):
    code = """
        from hpcinfer.errors import ConfigError
        from hpcinfer.kernels.native.library import load
        try:
            load()
        except ConfigError as error:
            print(error)
    """
    said = " ".join(python(code, HPCINFER_SIMD="sse9"))
    assert "$HPCINFER_SIMD" in said and "'sse9'" in said
    assert all(name in said for name in instruction_sets(library))


WHERE = """
    import os
    from hpcinfer.kernels.native.library import load
    before = {int(thread) for thread in os.listdir("/proc/self/task")}
    library = load(THREADS)
    library.lib.hpc_runtime_new(THREADS)
    workers = {int(thread) for thread in os.listdir("/proc/self/task")} - before
    print(*sorted(os.sched_getaffinity(0)), "|", *(cpu for thread in workers for cpu in os.sched_getaffinity(thread)))
    print("|", os.environ.get("GOMP_SPINCOUNT", "-"))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
@pytest.mark.parametrize(("threads", "environment", "bound", "spins"), [
    (2, {}, True, "2000"), (2, {"OMP_PROC_BIND": "false", "OMP_WAIT_POLICY": "active"}, False, "-"),
    (2000, {"OMP_THREAD_LIMIT": "2"}, False, "0"),
])  # fmt: skip
def test_worker_threads_are_bound_and_the_caller_is_not(library, threads, environment, bound, spins):
    text = " ".join(python(WHERE.replace("THREADS", str(threads)), **environment))
    caller, workers, spin_count = (part.split() for part in text.split("|"))
    everywhere = sorted(os.sched_getaffinity(0))
    order = [core[0] for core in cores_of(set(everywhere))]
    assert list(map(int, caller)) == everywhere and spin_count == [spins]
    if len(everywhere) == os.cpu_count():
        assert list(map(int, workers)) == ([order[1]] if bound else everywhere)


TEAM = """
    import os, threading
    from hpcinfer.kernels import Placement, create_kernels
    def workers_of(work):
        before = set(os.listdir("/proc/self/task"))
        work()
        return [cpu for thread in set(os.listdir("/proc/self/task")) - before
                for cpu in os.sched_getaffinity(int(thread))]
    found = []
    first = workers_of(lambda: found.append(create_kernels("native", placement=Placement(2))))
    def load():
        found.append(workers_of(found[0].bind_workers))
    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    print(*first, "|", *found[1])
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
@pytest.mark.parametrize("environment", [{}, {"OMP_PROC_BIND": "false", "OMP_WAIT_POLICY": "active"}])
def test_workers_of_another_thread_are_bound_as_those_of_the_first_one(library, environment):
    first, second = (part.split() for part in " ".join(python(TEAM, **environment)).split("|"))
    if environment:
        assert not second, "nothing is bound, no thread begun"
    elif len(available_cpus()) == os.cpu_count():
        assert second == first and len(second) == 1


def test_runtime_knows_how_many_threads_it_has(library):
    code = """
        from hpcinfer.kernels.native.library import load
        library = load()
        print(library.lib.hpc_runtime_threads(library.lib.hpc_runtime_new(3)))
    """
    has_openmp = python(code) == ["3"]
    assert python(code, OMP_THREAD_LIMIT="2") == (["2"] if has_openmp else ["1"])
    assert python(code, OMP_DYNAMIC="true", OMP_NUM_THREADS="1") == (["3"] if has_openmp else ["1"])


def test_without_the_extension_there_is_no_library():
    code = """
        import sys
        sys.modules["hpcinfer.kernels.native._native"] = None
        from hpcinfer.kernels.native.library import load
        print(load())
    """
    assert python(code) == ["None"]
