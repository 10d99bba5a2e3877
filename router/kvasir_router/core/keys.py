"""How long a request's routing key is: the hotness tree.

A key is the name of one of the prompt's first blocks; names are chained, so the name of block k
stands for the whole prefix up to k. A key at which more than 2/n of the traffic rests (more than
its two workers can serve) is extended, so that its children spread over other pairs; it is
shortened again when the share that passes it falls below 1/n. Between the thresholds, and for
`dwell_ms` after a change, nothing moves.

An extension leads past all blocks that the requests of the hot prefix have in common, to the first
one in which they differ: a system prompt of a hundred blocks is one edge, not a hundred. A request
that leaves the common part early rests at the hot prefix; when those become hot in turn, the edge
is drawn again, to where they part.

Invariants: with the same window the tree decides the same; memory is bounded by the window; a
request costs as many steps as its key has edges, whatever the length of its prompt.
Source: DualMap (arXiv 2602.06502), adaptive prefix hashing; edges as in a radix tree.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvasir_router.core.exchange import Edge, EdgeMap, EdgeRecord

EDGES_JUDGED = 4
"""Edges looked at per request for a share that has become too small: all have their turn."""

SAMPLES_PER_WORKER = 8
"""Requests per worker that the window must hold before a share counts as small: of a prefix at 2/n
sixteen are expected then, and a replica that saw few does not undo what others know better."""


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """Bounds of the tree."""

    window_requests: int = 1024
    """Requests over which shares are taken: long enough for 1/n of 64 workers to be 16 requests."""

    window_ms: int = 600_000
    """Older requests no longer count: a quiet hour must not look like load. Long enough for one of
    many routers, which sees a request every few seconds, to know the shares."""

    count_min: int = 16
    """A key is extended only for at least this many requests: fewer say nothing about a share."""

    start_blocks: int = 32
    """A prompt at least this long starts with a key of this length, 1,024 tokens as in DualMap: of
    the first block real traffic knows a handful of kinds. A shorter one starts with its first
    block, so that the turns of a short chat agree."""

    depth_max: int = 512
    """Longest key, in blocks: what the window remembers of a prompt."""

    dwell_ms: int = 5_000
    """A prefix that was just extended or shortened stays so: its cache needs time to move."""


@dataclass(slots=True)
class _Seen:
    """A request of the window."""

    at_ms: int
    names: Sequence[bytes]
    path: list[bytes] = field(default_factory=list)
    """Names of the blocks where it passed the tree; it rests at the last."""


class KeyTree:
    """Counts prefixes over the last requests and says which are extended."""

    def __init__(self, limits: KeyLimits | None = None, *, replica: bytes = b"") -> None:
        self._limits = limits or KeyLimits()
        self._map = EdgeMap(replica)
        self._window: deque[_Seen] = deque()
        self._passed: dict[bytes, int] = {}
        self._rested: dict[bytes, int] = {}
        self._edges: dict[bytes, Edge] = {}
        self._changed_ms: dict[bytes, int] = {}  # of edges, and of names that dwell
        self._turns: deque[bytes] = deque()  # the keys of _changed_ms

    @property
    def num_extended(self) -> int:
        """Prefixes whose keys are longer than theirs at the moment."""
        return len(self._edges)

    @property
    def shared_version(self) -> int:
        """Grows whenever `shared` would give something else."""
        return self._map.num_changes

    def shared(self) -> Sequence[EdgeRecord]:
        """What other replicas should `merge`: all that is known of extended keys, bounded."""
        return self._map.records()

    def merge(self, records: Iterable[EdgeRecord], *, now_ms: int) -> None:
        """Takes over what another replica knows better. Order and repetition do not matter."""
        newer = self._map.merge(records)
        for record in newer:
            self._set(record.name, record.edge, now_ms)
        if newer:
            self._recount(self._window)

    def depth(self, names: Sequence[bytes]) -> int:
        """Blocks in the key of a prompt with these block names; 0 for a prompt without any."""
        depth = self._start(names)
        while depth and (edge := self._edges.get(names[depth - 1])) and edge.fits(names):
            depth = edge.depth
        return depth

    def _start(self, names: Sequence[bytes]) -> int:
        start = self._limits.start_blocks
        return start if len(names) >= start else min(len(names), 1)

    def observe(self, names: Sequence[bytes], *, num_workers: int, now_ms: int) -> None:
        """Counts one request and re-judges the prefixes on its path."""
        if names:
            seen = _Seen(now_ms, names[: self._limits.depth_max])
            self._window.append(seen)
            self._count(seen)
            while self._is_hot(seen.path[-1], num_workers) and self._extend(seen, now_ms):
                pass
        self._slide(now_ms)
        self._shorten(num_workers, now_ms)

    def _count(self, seen: _Seen) -> None:
        depth = self._start(seen.names)
        while True:
            name = seen.names[depth - 1]
            seen.path.append(name)
            self._passed[name] = self._passed.get(name, 0) + 1
            edge = self._edges.get(name)
            if edge is None or not edge.fits(seen.names):
                break
            depth = edge.depth
        self._rested[name] = self._rested.get(name, 0) + 1

    def _uncount(self, seen: _Seen) -> None:
        for name in seen.path:
            _decrement(self._passed, name)
        _decrement(self._rested, seen.path[-1])
        seen.path.clear()

    def _slide(self, now_ms: int) -> None:
        limits, window = self._limits, self._window
        oldest_ms = now_ms - limits.window_ms
        while len(window) > limits.window_requests or (window and window[0].at_ms < oldest_ms):
            self._uncount(window.popleft())

    def _is_hot(self, name: bytes, num_workers: int) -> bool:
        rested = self._rested[name]
        return rested >= self._limits.count_min and rested * num_workers > 2 * len(self._window)

    def _extend(self, seen: _Seen, now_ms: int) -> bool:
        """Draws the edge of the prefix where a request rests; False: it cannot or must not be."""
        hot, dwell_ms = seen.path[-1], self._limits.dwell_ms
        if now_ms - self._changed_ms.get(hot, now_ms - dwell_ms) < dwell_ms:
            return False
        self._dwell(hot, now_ms)
        sharing = [other for other in self._window if hot in other.path]
        edge = _edge_between([other.names for other in sharing], seen.names, hot)
        if edge is None or edge == self._edges.get(hot):
            return False
        self._set(hot, edge, now_ms)
        self._map.decide(hot, edge)
        self._recount(sharing)
        return seen.path[-1] != hot

    def _recount(self, requests: Iterable[_Seen]) -> None:
        for seen in requests:
            self._uncount(seen)
            self._count(seen)

    def _set(self, name: bytes, edge: Edge | None, now_ms: int) -> None:
        if edge is None:
            self._edges.pop(name, None)
        else:
            self._edges[name] = edge
        self._dwell(name, now_ms)

    def _dwell(self, name: bytes, now_ms: int) -> None:
        if name not in self._changed_ms:
            self._turns.append(name)
        self._changed_ms[name] = now_ms

    def _shorten(self, num_workers: int, now_ms: int) -> None:
        """Takes back the edges of prefixes that few requests pass; forgets what has dwelt."""
        for _ in range(min(EDGES_JUDGED, len(self._turns))):
            name = self._turns.popleft()
            if now_ms - self._changed_ms[name] >= self._limits.dwell_ms:
                if name not in self._edges:
                    del self._changed_ms[name]
                    continue
                if self._is_cold(name, num_workers):
                    self._set(name, None, now_ms)
                    self._map.decide(name, None)
            self._turns.append(name)

    def _is_cold(self, name: bytes, num_workers: int) -> bool:
        total = len(self._window)
        enough = min(SAMPLES_PER_WORKER * num_workers, self._limits.window_requests)
        return total >= enough and self._passed.get(name, 0) * num_workers < total


def _edge_between(
    paths: Sequence[Sequence[bytes]], mine: Sequence[bytes], hot: bytes
) -> Edge | None:
    """The edge from `hot` to the first block in which prompts that share it differ."""
    start = mine.index(hot) + 1
    shared = [_num_common(names, mine, start) for names in paths]
    parting = [
        common for names, common in zip(paths, shared, strict=True) if common < len(names)
    ]  # the others end where `mine` still goes on: they cannot be told apart by a longer key
    if not parting:
        return None
    end = min(parting)
    return Edge(end + 1, mine[end - 1])


def _num_common(one: Sequence[bytes], two: Sequence[bytes], low: int) -> int:
    """Leading blocks that two prompts share, `low` at least. Chained names: a bisection does."""
    high = min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] == two[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


def _decrement(counts: dict[bytes, int], name: bytes) -> None:
    if counts[name] == 1:
        del counts[name]
    else:
        counts[name] -= 1
