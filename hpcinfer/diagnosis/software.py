"""Findings about kernels and versions: native or not, and alike on all nodes?"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence

from hpcinfer.diagnosis.facts import Facts
from hpcinfer.diagnosis.finding import ERROR, OK, WARNING, Finding

_FIXES_BYTES = ("hpcinfer", "python", "numpy", "tokenizers", "jinja2")  # ranks that differ refuse to start
_PACE = "the slowest rank of a replica sets its pace, so one type of node for each replica"
_REINSTALL = "install hpcinfer again where a C compiler and Python.h are"


def check_software(facts: Sequence[Facts]) -> list[Finding]:
    """Judge kernels and versions of all ranks."""
    findings = [finding for fact in facts for finding in _check_kernels(fact)]
    findings += _unlike(facts, "kernels", WARNING, _kernels, f"same bits, other speeds: {_PACE}")
    findings += _unlike(facts, "nodes", WARNING, _processor, _PACE)
    names = sorted({name for fact in facts for name in fact.software.versions})
    for name in names:
        level, version = ERROR if name in _FIXES_BYTES else WARNING, functools.partial(_version, name)
        findings += _unlike(facts, "versions", level, version, "one environment for all nodes")
    return findings


def _check_kernels(fact: Facts) -> list[Finding]:
    software, ranks = fact.software, (fact.rank,)
    missing = [name for name, text in software.versions.items() if not text and name != "torch"]
    findings = [Finding(ERROR, "versions", f"{name} is not installed", "pip install hpcinfer again", ranks)
                for name in missing if name != "mpi4py" or fact.launch.launcher]  # fmt: skip
    if software.problem:
        return [*findings, Finding(ERROR, "kernels", software.problem, "unset HPCINFER_SIMD", ranks)]
    if software.instruction_sets:
        return [*findings, Finding(OK, "kernels", f"native, {software.instruction_sets[0]}", ranks=ranks)]
    if software.versions.get("torch"):
        found = "no native kernels: the reference kernels run, several times slower, with other bits"
        return [*findings, Finding(WARNING, "kernels", found, _REINSTALL, ranks)]
    found = "no native kernels, and no torch for the reference kernels"
    return [*findings, Finding(ERROR, "kernels", found, _REINSTALL, ranks)]


def _kernels(fact: Facts) -> str:
    return (*fact.software.instruction_sets, "reference")[0]


def _processor(fact: Facts) -> str:
    return f"{fact.processors.model or 'unknown'}, {fact.processors.node_cpus} CPUs"


def _version(name: str, fact: Facts) -> str:
    """What counts of a version: of Python the language, not the patch."""
    text = fact.software.versions.get(name) or "(none)"
    return f"{name} {'.'.join(text.split('.')[:2]) if name == 'python' else text}"


def _unlike(facts: Sequence[Facts], check: str, level: str, of: Callable[[Facts], str], hint: str) -> list[Finding]:
    """A finding for ranks that are unlike most."""
    values = {fact.rank: of(fact) for fact in facts}
    usual, _ = Counter(values.values()).most_common(1)[0]
    return [Finding(level, check, f"{value} here, {usual} on most ranks", hint, (rank,))
            for rank, value in values.items() if value != usual]  # fmt: skip
