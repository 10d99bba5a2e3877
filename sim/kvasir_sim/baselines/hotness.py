"""DualMap's hotness tree, as published: how many blocks of a prompt make its key.

Over a sliding window of requests, a prefix with a share above 2/n (n workers) is extended by a
block, so that what follows it spreads; below 1/n it is shortened again.
Source: DualMap (arXiv 2602.06502), section 3.2 and appendix A.2.
"""

from collections import Counter, deque

from kvasir_sim.baselines.estimate import KEY_BLOCKS
from kvasir_sim.trace import TraceRequest

WINDOW_REQUESTS = 1_000
SAMPLES_MIN = 64
"""Before that a share means nothing."""


class HotnessTree:
    """Key lengths, from the requests that this replica has seen."""

    def __init__(self) -> None:
        self._window: deque[tuple[bytes, ...]] = deque()
        self._counts: Counter[bytes] = Counter()
        self._extended: set[bytes] = set()

    def key(self, request: TraceRequest, num_workers: int) -> bytes:
        """The key of a request, which is counted."""
        path = request.names[KEY_BLOCKS - 1 :] or request.names[-1:]
        self._count(path)
        for name in path:
            if name not in self._extended and not self._extend(name, num_workers):
                return name
        return path[-1]

    def _count(self, path: tuple[bytes, ...]) -> None:
        self._window.append(path)
        self._counts.update(path)
        if len(self._window) > WINDOW_REQUESTS:
            for name in self._window.popleft():
                self._counts[name] -= 1
                if not self._counts[name]:
                    del self._counts[name]

    def _extend(self, name: bytes, num_workers: int) -> bool:
        total = len(self._window)
        self._extended = {
            name for name in self._extended if self._counts[name] * num_workers >= total
        }
        if total < SAMPLES_MIN or self._counts[name] * num_workers <= 2 * total:
            return False
        self._extended.add(name)
        return True
