"""Kernels of CPUs that behave as those of a device: what they compute is there only for those who wait."""

import numpy as np

from hpcinfer.kernels import create_kernels
from hpcinfer.report.metrics import Metrics


class LateKernels:
    """Kernels whose results come late, as those of a device: `events` says what was begun and waited for, in order."""

    def __init__(self):
        self._kernels, self.events = create_kernels("reference"), []
        self.metrics = Metrics()
        self.places = set()  # phases in which it was waited

    def __getattr__(self, name):
        return getattr(self._kernels, name)

    def fetch(self, arrays):
        number = sum(event == "begin" for event, _ in self.events)
        self.events.append(("begin", number))
        return LateFetch(self, number, self._kernels.fetch(arrays).wait())


class LateFetch:
    """Arrays that are there only for those who wait."""

    is_late = True

    def __init__(self, kernels, number, arrays):
        self._kernels, self._number, self._arrays = kernels, number, arrays

    def wait(self):
        if ("wait", self._number) not in self._kernels.events:
            self._kernels.events.append(("wait", self._number))
            self._kernels.places.add(self._kernels.metrics.place)
        return self._arrays


class AheadKernels(LateKernels):
    """Late kernels that keep the ids that are chosen."""

    num_kept_ids = 1 << 14

    def __init__(self):
        super().__init__()
        self._kept, self._next = (np.full(self.num_kept_ids, -1) for _ in range(2))
        self.batches = []  # of each: tokens, and how many of them the host did not know

    def keep_ids(self, ids, rows):
        self._next[rows] = ids

    def fetch(self, arrays):
        """The end of a batch: ids that were kept before it, and not in it, are asked for no more."""
        self._kept, self._next = self._next, np.full(self.num_kept_ids, -1)
        return super().fetch(arrays)

    def embed(self, table, grain_starts, grain_sizes, token_ids):
        is_kept = token_ids < 0
        self.batches.append((len(token_ids), int(is_kept.sum())))
        ids = np.where(is_kept, self._kept[-1 - token_ids], token_ids)
        assert (ids >= 0).all(), ids
        return self._kernels.embed(table, grain_starts, grain_sizes, ids)
