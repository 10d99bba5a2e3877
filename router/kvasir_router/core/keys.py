"""How long a request's routing key is: the hotness tree.

A key is the name of one of the prompt's first blocks; names are chained, so the name of block k
stands for the whole prefix up to k. A prefix that carries more than 2/n of the traffic (more than
its two workers can serve) is extended by a block, so that its children spread over other pairs; it
is shortened again when its share falls below 1/n. Between the thresholds, and for `dwell_ms` after
a change, nothing moves.

Invariant: with the same window the tree decides the same; memory is bounded by the window.
Source: DualMap (arXiv 2602.06502), adaptive prefix hashing.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """Bounds of the tree."""

    window_requests: int = 1024
    """Requests over which shares are taken: long enough for 1/n of 64 workers to be 16 requests."""

    window_ms: int = 60_000
    """Older requests no longer count: a quiet hour must not look like load."""

    samples_min: int = 64
    """Below this many requests no share means anything and no key is extended."""

    depth_max: int = 64
    """Longest key, in blocks: longer shared prefixes are split by it or not at all."""

    dwell_ms: int = 5_000
    """A prefix that was just extended or shortened stays so: its cache needs time to move."""


class KeyTree:
    """Counts prefixes over the last requests and says which are extended."""

    def __init__(self, limits: KeyLimits | None = None) -> None:
        self._limits = limits or KeyLimits()
        self._window: deque[tuple[int, tuple[bytes, ...]]] = deque()  # (now_ms, path)
        self._counts: dict[bytes, int] = {}
        self._extended: dict[bytes, int] = {}  # name -> now_ms of the extension
        self._shortened: dict[bytes, int] = {}  # name -> now_ms, forgotten after dwell_ms

    @property
    def num_extended(self) -> int:
        """Prefixes whose keys are longer than theirs at the moment."""
        return len(self._extended)

    def depth(self, names: Sequence[bytes]) -> int:
        """Blocks in the key of a prompt with these block names; 0 for a prompt without any."""
        for depth, name in enumerate(names[: self._limits.depth_max], start=1):
            if name not in self._extended:
                return depth
        return min(len(names), self._limits.depth_max)

    def observe(self, names: Sequence[bytes], *, num_workers: int, now_ms: int) -> None:
        """Counts one request and re-judges the prefixes on its path."""
        path = tuple(names[: self._limits.depth_max])
        self._window.append((now_ms, path))
        for name in path:
            self._counts[name] = self._counts.get(name, 0) + 1
        self._slide(now_ms)
        for name in path:
            if name not in self._extended and not self._extend(name, num_workers, now_ms):
                break
        self._shorten(num_workers, now_ms)

    def _slide(self, now_ms: int) -> None:
        oldest_ms = now_ms - self._limits.window_ms
        while len(self._window) > self._limits.window_requests or self._window[0][0] < oldest_ms:
            for name in self._window.popleft()[1]:
                count = self._counts.pop(name) - 1
                if count:
                    self._counts[name] = count

    def _extend(self, name: bytes, num_workers: int, now_ms: int) -> bool:
        total = len(self._window)
        dwelt = now_ms - self._shortened.get(name, -self._limits.dwell_ms) >= self._limits.dwell_ms
        hot = self._counts[name] * num_workers > 2 * total
        if total < self._limits.samples_min or not hot or not dwelt:
            return False
        self._extended[name] = now_ms
        self._shortened.pop(name, None)
        return True

    def _shorten(self, num_workers: int, now_ms: int) -> None:
        """Looks at extended prefixes only: at most n/2 at each depth can be above 2/n."""
        total, dwell_ms = len(self._window), self._limits.dwell_ms
        cold = [
            name
            for name, since_ms in self._extended.items()
            if self._counts.get(name, 0) * num_workers < total and now_ms - since_ms >= dwell_ms
        ]
        for name in cold:
            del self._extended[name]
            self._shortened[name] = now_ms
        for name, since_ms in list(self._shortened.items()):
            if now_ms - since_ms >= dwell_ms:
                del self._shortened[name]
