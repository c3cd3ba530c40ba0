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


IN_A_THREAD = """
    import os
    import threading
    import numpy as np
    from hpcinfer.kernels import Placement, create_kernels
    from hpcinfer.kernels.protocol import Weight
    MANY = os.cpu_count() + 4  # more than a team that may shrink
    kernels = {threads: create_kernels("native", placement=Placement(threads, None)) for threads in (1, MANY)}
    places = np.arange(2 * MANY)
    x = np.arange(len(places) * 64, dtype=np.float32).reshape(-1, 64)
    def logits(threads, rows):
        table = Weight(np.ones((1, 64, 64), np.float32), "float32")
        head = kernels[threads].prepare_head(np.ones(64, np.float32), table, 1e-5)
        return kernels[threads].logits(x, rows, head)
    found = []
    thread = threading.Thread(target=lambda: found.append(logits(MANY, places)))
    thread.start()
    thread.join()
    print((found[0] == logits(1, places)).all())
"""


def test_a_team_may_be_smaller_than_it_was_when_the_kernels_were_made(library):
    assert python(IN_A_THREAD) == python(IN_A_THREAD, OMP_DYNAMIC="true") == ["True"]


FLUSHING = """
    import numpy as np
    import torch
    from hpcinfer.kernels import Placement, create_kernels
    from hpcinfer.kernels.protocol import Weight
    BEFORE = [create_kernels("native", placement=Placement(threads, None)) for threads in (1, 2)]
    assert torch.set_flush_denormal(True) and np.float32(1e-39) + np.float32(0) == 0
    AFTER = [create_kernels("native", placement=Placement(threads, None)) for threads in (1, 2)]
    table = Weight(np.full((1, 96, 2), 2e-5, np.float16), "float16")
    for kernels in (*BEFORE, *AFTER):
        torch.set_flush_denormal(True)
        head = kernels.prepare_head(np.full(2, 1e-30, np.float32), table, 1e-5)
        torch.set_flush_denormal(True)
        print(*set(kernels.logits(np.ones((4, 2), np.float32), np.arange(4), head).ravel().tolist()))
"""


def test_no_library_has_small_numbers_flushed_to_zero(library):
    """As one built with -ffast-math does for the thread that loads it."""
    pytest.importorskip("torch")
    found = set(map(float, python(FLUSHING)))
    assert len(found) == 1 and 3e-35 < found.pop() < 5e-35


SCARCE = """
    import resource
    import numpy as np
    from hpcinfer.kernels import create_kernels
    from hpcinfer.kernels.protocol import Linear, MlpWeights, Weight
    kernels, random = create_kernels("native"), np.random.default_rng(0)
    gate, up, down = (Weight(random.standard_normal(shape, np.float32), "float32")
                      for shape in ((1, 4096, 32), (1, 4096, 32), (1, 32, 4096)))
    layer = kernels.prepare_mlp(MlpWeights(np.ones(32, np.float32), Linear(gate), Linear(up), down), 1e-5)
    x, spans = random.standard_normal((32768, 32), np.float32), [(0, 1)]
    [expected] = kernels.mlp(x[:10], layer, spans)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28,) * 2)
    try:
        kernels.mlp(x, layer, spans)
    except MemoryError as error:
        print(str(error).split()[-1])
    [found] = kernels.mlp(x[:10], layer, spans)
    print((found == expected).all())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs the size of a process")
def test_too_many_rows_for_the_memory_are_an_error_and_fewer_are_not(library):
    assert python(SCARCE) == ["takes", "True"]


def test_without_the_extension_there_is_no_library():
    code = """
        import sys
        sys.modules["hpcinfer.kernels.native._native"] = None
        from hpcinfer.kernels.native.library import load
        print(load())
    """
    assert python(code) == ["None"]
