"""Findings about GPUs: those of the node, those of the allocation, those that a rank may use."""

from collections import defaultdict
from collections.abc import Sequence

from hpcinfer.diagnosis.facts import Facts
from hpcinfer.diagnosis.finding import ERROR, OK, WARNING, Finding

_WHOLE_NODES = "if CUDA fails with NOT_INITIALIZED, take whole nodes (--exclusive, all GPUs)"


def check_gpus(facts: Sequence[Facts]) -> list[Finding]:
    """Judge what each rank sees; a node without GPUs is no finding."""
    return [*(finding for fact in facts for finding in _check_rank(fact)), *_shared(facts)]


def _check_rank(fact: Facts) -> list[Finding]:
    devices, environment, ranks = fact.devices, fact.environment, (fact.rank,)
    named = visible_gpus(environment.get("CUDA_VISIBLE_DEVICES", environment.get("ROCR_VISIBLE_DEVICES")))
    granted = _number(environment.get("SLURM_GPUS_ON_NODE", ""))
    if not devices.node_gpus:
        if not (named or granted):
            return []
        found = f"{named or granted} GPUs are promised, the driver has none on this node"
        hint = "is the driver loaded, and visible in the container (--nv, --rocm)?"
        return [Finding(ERROR, "GPUs", found, hint, ranks)]
    usable = min(number for number in (devices.open_gpus, named, granted) if number is not None)
    findings = _mismatches(fact, named, granted)
    if 0 < usable < devices.node_gpus:
        found = f"{usable} of the node's {devices.node_gpus} GPUs are this rank's"
        level, hint = (WARNING, _WHOLE_NODES) if _is_partial(fact, granted) else (OK, "")
        findings.append(Finding(level, "GPUs", found, hint, ranks))
    elif not findings:
        findings.append(Finding(OK, "GPUs", f"{usable} of {devices.node_gpus} may be used", ranks=ranks))
    return [*findings, Finding(OK, "GPUs", "jobs run on CPUs unless --device cuda is given", ranks=ranks)]


def _mismatches(fact: Facts, named: int | None, granted: int | None) -> list[Finding]:
    """Sources that contradict each other."""
    devices, ranks, findings = fact.devices, (fact.rank,), []
    if named == 0:
        findings.append(Finding(WARNING, "GPUs", "an empty CUDA_VISIBLE_DEVICES hides all", "unset it", ranks))
    if devices.open_gpus == 0:
        findings.append(Finding(WARNING, "GPUs", f"none of the node's {devices.node_gpus} GPUs can be opened",
                                "the allocation has none: sbatch --gpus-per-node=N", ranks))  # fmt: skip
    if named and granted is not None and named > granted:
        found = f"{named} GPUs are named in CUDA_VISIBLE_DEVICES, Slurm gave {granted}"
        findings.append(Finding(ERROR, "GPUs", found, "do not set CUDA_VISIBLE_DEVICES in a job: Slurm does", ranks))
    if 0 <= devices.tool_gpus < devices.open_gpus:
        found = f"nvidia-smi shows {devices.tool_gpus} GPUs, {devices.open_gpus} can be opened"
        findings.append(Finding(WARNING, "GPUs", found, "tell the site: a GPU may have fallen off its bus", ranks))
    return findings


def _shared(facts: Sequence[Facts]) -> list[Finding]:
    """Ranks of a node that are bound to one and the same GPU, though they could open others."""
    users = defaultdict(list)
    for fact in facts:
        name = fact.environment.get("CUDA_VISIBLE_DEVICES", "")
        if visible_gpus(name) == 1 and fact.devices.open_gpus > 1:
            users[fact.host, name].append(fact.rank)
    return [Finding(WARNING, "GPUs", f"{len(ranks)} ranks share GPU {name}", "srun --gpus-per-task=1", tuple(ranks))
            for (_, name), ranks in users.items() if len(ranks) > 1]  # fmt: skip


def visible_gpus(text: str | None) -> int | None:
    """Count the GPUs of a list as CUDA_VISIBLE_DEVICES; None where it is not set, so that all are visible."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    end = next((i for i, name in enumerate(names) if name in ("", "-1", "NoDevFiles")), len(names))
    return end  # CUDA stops at the first name that is none


def _is_partial(fact: Facts, granted: int | None) -> bool:
    """The allocation itself has less than the node; else it is only the rank that sees its own share."""
    return fact.devices.open_gpus < fact.devices.node_gpus or (granted is not None and granted < fact.devices.node_gpus)


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None
