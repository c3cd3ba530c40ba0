"""What a supervisor asks of Slurm: the nodes of its allocation, their states, and to take some back."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence

from hpcinfer.errors import ConfigError
from hpcinfer.supervision.nodes import Node, is_down, parse_counts

log = logging.getLogger(__name__)

_TIMEOUT_S = 10.0


class Allocation:
    """The Slurm job that this process runs in."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._environment = environment
        self.job_id = environment["SLURM_JOB_ID"]

    def nodes(self, ranks_per_node: int | None) -> list[Node]:
        """List the nodes, each with the tasks that were asked for on it.

        Raises:
            ConfigError: Slurm does not say.
        """
        nodelist = self._environment.get("SLURM_JOB_NODELIST") or self._environment.get("SLURM_NODELIST", "")
        names = self._call("show", "hostnames", nodelist).split()
        if not names:
            raise ConfigError("Slurm does not say which nodes the job has", expected="scontrol show hostnames to work",
                              hint="give --nodes HOST:RANKS,...")  # fmt: skip
        counts = parse_counts(self._environment.get("SLURM_TASKS_PER_NODE", ""))
        if ranks_per_node or len(counts) != len(names):
            counts = [ranks_per_node or 1] * len(names)
        return [Node(name, count) for name, count in zip(names, counts, strict=True)]

    def down(self, names: Sequence[str]) -> set[str]:
        """Find out which of these nodes cannot run steps now; none where Slurm does not answer."""
        text = self._call("show", "node", ",".join(names), "--oneliner")
        found = re.findall(r"^NodeName=(\S+).*? State=(\S+)", text, re.MULTILINE)
        return {name for name, state in found if is_down(state)}

    def shrink(self, kept: Iterable[str]) -> bool:
        """Give all nodes but these back; returns whether Slurm has taken them."""
        with tempfile.TemporaryDirectory() as folder:  # scontrol leaves scripts where it runs
            return self._ask(folder, "update", f"JobId={self.job_id}", f"NodeList={','.join(kept)}") is not None

    def _call(self, *arguments: str) -> str:
        return self._ask(None, *arguments) or ""

    def _ask(self, folder: str | None, *arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["scontrol", *arguments], env=dict(self._environment), cwd=folder, stdin=subprocess.DEVNULL,
                capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            log.warning("scontrol %s: %s", arguments[0], error)
            return None
        if done.returncode:
            log.warning("scontrol %s: %s", arguments[0], done.stderr.strip())
            return None
        return done.stdout
