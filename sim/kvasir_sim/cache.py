"""What a cache of KV blocks would have saved on a trace, under one policy of eviction or another.

Decides nothing: `value` is the production order (`kvasir_kvstore.core.eviction`) as a KV node uses
it; `lru` and `s3fifo` are what it is compared with. A request saves the leading run of its blocks
that is held; then all its blocks are wanted and the cache holds them, parents the more recent.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvasir_kvstore.core.eviction import ValueOrder

from kvasir_sim.trace import TraceRequest

GHOSTS_PER_SLOT = 1
"""Of S3-FIFO, as in its paper."""


class Cache(Protocol):
    """A cache of equal blocks."""

    def __contains__(self, name: bytes) -> bool: ...

    def want(self, name: bytes) -> None:
        """The block is wanted; it is held from now on."""


class LruCache:
    """Gives up what was wanted longest ago."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._held: OrderedDict[bytes, None] = OrderedDict()

    def __contains__(self, name: bytes) -> bool:
        return name in self._held

    def want(self, name: bytes) -> None:
        """The block is wanted; it is held from now on."""
        self._held[name] = None
        self._held.move_to_end(name)
        if len(self._held) > self._num_slots:
            self._held.popitem(last=False)


class S3FifoCache:
    """Three queues (Yang et al., SOSP 2023): a small one for trial, a main one, ghosts."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._small_max = max(1, num_slots // 10)
        self._small: OrderedDict[bytes, int] = OrderedDict()
        self._main: OrderedDict[bytes, int] = OrderedDict()
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()

    def __contains__(self, name: bytes) -> bool:
        return name in self._small or name in self._main

    def want(self, name: bytes) -> None:
        """The block is wanted; it is held from now on."""
        for queue in (self._small, self._main):
            if name in queue:
                queue[name] = min(queue[name] + 1, 3)
                return
        while len(self._small) + len(self._main) >= self._num_slots:
            self._evict()
        if name in self._ghosts:
            del self._ghosts[name]
            self._main[name] = 0
        else:
            self._small[name] = 0

    def _evict(self) -> None:
        if len(self._small) >= self._small_max or not self._main:
            name, uses = self._small.popitem(last=False)
            if uses:
                self._main[name] = 0
                return
            self._ghosts[name] = None
            if len(self._ghosts) > GHOSTS_PER_SLOT * self._num_slots:
                self._ghosts.popitem(last=False)
            return
        name, uses = self._main.popitem(last=False)
        if uses:
            self._main[name] = uses - 1


class ValueCache:
    """Gives up what is worth least, as KV nodes do."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots, self._num_held = num_slots, 0
        self._order = ValueOrder(num_slots)

    def __contains__(self, name: bytes) -> bool:
        return name in self._order

    def want(self, name: bytes) -> None:
        """The block is wanted; it is held from now on."""
        if name in self._order:
            self._order.touch(name)
            return
        if self._num_held < self._num_slots:
            self._num_held += 1
        else:
            self._order.take(None)
        self._order.add(name)


CACHES: dict[str, type[LruCache | S3FifoCache | ValueCache]] = {
    "lru": LruCache,
    "s3fifo": S3FifoCache,
    "value": ValueCache,
}


@dataclass(frozen=True, slots=True)
class CacheRow:
    """One policy at one size. Shares are of all blocks of all prompts."""

    policy: str
    num_slots: int
    slots_share: float
    """Of the distinct blocks in the trace."""
    hit_share: float
    hit_share_max: float
    """Of a cache that holds everything."""


def compare(requests: Sequence[TraceRequest], *, shares: Sequence[float]) -> list[CacheRow]:
    """All policies at each size, given as a share of the distinct blocks."""
    num_distinct = len({name for request in requests for name in request.names})
    best = hit_share(LruCache(num_distinct), requests)
    rows = []
    for share in shares:
        num_slots = max(1, int(num_distinct * share))
        for policy, kind in CACHES.items():
            hits = hit_share(kind(num_slots), requests)
            rows.append(CacheRow(policy, num_slots, share, round(hits, 4), round(best, 4)))
    return rows


def hit_share(cache: Cache, requests: Sequence[TraceRequest]) -> float:
    """The part of all prompts' blocks that did not have to be computed."""
    num_hits = num_wanted = 0
    for request in requests:
        held = (i for i, name in enumerate(request.names) if name not in cache)
        num_hits += next(held, len(request.names))
        num_wanted += len(request.names)
        for name in reversed(request.names):
            cache.want(name)
    return num_hits / num_wanted if num_wanted else 0.0
