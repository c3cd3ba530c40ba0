import os
import resource

import pytest

from hpcinfer.diagnosis.node import (
    Limit,
    SharedMemory,
    read_limits,
    read_processors,
    read_shared_memory,
    read_software,
)


def test_processors_are_those_of_the_mask():
    processors = read_processors(2)
    assert set(processors.cpus) == os.sched_getaffinity(0) and processors.threads == 2 and not processors.problem
    assert 1 <= processors.cores <= len(processors.cpus) <= processors.node_cpus


def test_limits_are_those_of_the_process():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert read_limits()["NOFILE"] == Limit(soft, hard)
    assert resource.RLIM_INFINITY not in [limit.soft for limit in read_limits().values() if limit.soft != -1]


def test_software_says_versions_and_a_wrong_instruction_set(monkeypatch):
    software = read_software()
    assert software.versions["numpy"] and software.versions["hpcinfer"] and not software.problem
    if not software.instruction_sets:
        pytest.skip("no native kernels here")
    monkeypatch.setenv("HPCINFER_SIMD", "avx1024")
    assert "avx1024" in read_software().problem


def test_looking_at_software_binds_no_thread():
    before = os.sched_getaffinity(0)
    read_software()
    assert os.sched_getaffinity(0) == before


def test_shared_memory_is_where_open_mpi_is_told_to_put_it(tmp_path):
    elsewhere = read_shared_memory({"OMPI_MCA_btl_sm_backing_directory": str(tmp_path)})
    assert elsewhere.path == str(tmp_path) and elsewhere.free_bytes > 0 and elsewhere.device == tmp_path.stat().st_dev
    none = read_shared_memory({"OMPI_MCA_btl_sm_backing_directory": str(tmp_path / "none")})
    assert none == SharedMemory(str(tmp_path / "none"))
