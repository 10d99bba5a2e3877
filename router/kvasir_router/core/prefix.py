"""Which worker holds which blocks, as far as this router knows.

Two sources. A worker that sends events is known exactly while its stream lives (`stored`,
`removed`, `snapshot`). Of one that does not, the cache is imitated from what was routed to it
(`routed`): least recently used first out, nothing older than `routed_ttl_ms`.

Invariant: never more than `blocks_max` names, the oldest go first; a wrong answer costs time, never
correctness. The walk itself is native: a prompt of 250 blocks takes a few microseconds.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from kvasir_router._native import AgedNames, PrefixIndex

HOLDERS_MAX = 8
"""Workers with the longest runs that a match names: more are not worth a comparison."""

SEATS_MAX = 8_192
"""Holders that can be told apart, given-up ones not yet swept out included."""


class PrefixView:
    """Names and their holders."""

    def __init__(self, *, blocks_max: int, routed_ttl_ms: int = 600_000) -> None:
        self._index = PrefixIndex(blocks_max=blocks_max)
        self._seats: dict[str, int] = {}
        self._workers: list[str] = []  # by seat
        self._imitated: dict[str, AgedNames] = {}
        self._routed_ttl_ms = routed_ttl_ms

    def __len__(self) -> int:
        return len(self._index)

    @property
    def num_bytes(self) -> int:
        """Memory in use."""
        return self._index.num_bytes + sum(a.num_bytes for a in self._imitated.values())

    @property
    def num_blocks(self) -> Mapping[str, int]:
        """Blocks known of each worker."""
        return _Counts(self._index, self._seats)

    def snapshot(self, worker: str, names: Iterable[bytes]) -> None:
        """`names` are all that `worker` holds."""
        self.forget(worker)
        self.stored(worker, names)

    def stored(self, worker: str, names: Iterable[bytes]) -> None:
        """`worker` now holds `names` too."""
        self._index.store(self._seat(worker), _sequence(names))

    def removed(self, worker: str, names: Iterable[bytes]) -> None:
        """`worker` no longer holds `names`."""
        self._index.remove(self._seat(worker), _sequence(names))

    def routed(self, worker: str, names: Sequence[bytes], *, now_ms: int, blocks_max: int) -> None:
        """A prompt went to `worker`, which has `blocks_max` blocks and sends no events."""
        imitated = self._imitated.get(worker)
        if imitated is None:
            imitated = self._imitated[worker] = AgedNames()
        gone = imitated.use(names, now_ms=now_ms, num_names_max=blocks_max)
        gone += imitated.drop_before(since_ms=now_ms - self._routed_ttl_ms)
        self.stored(worker, names)
        self.removed(worker, gone)

    def forget(self, worker: str) -> None:
        """`worker` is gone, or is about to tell all it holds."""
        self._imitated.pop(worker, None)
        seat = self._seats.pop(worker, None)
        if seat is not None:
            self._index.give_up_seat(seat)

    def leading(self, names: Sequence[bytes]) -> dict[str, int]:
        """All workers that hold the first name, and how many leading names each holds."""
        return self._index.match(names, (), self._seats, self._workers, SEATS_MAX)

    def match(self, names: Sequence[bytes], wanted: tuple[str, ...]) -> dict[str, int]:
        """Leading names held: first the longest runs of all, longest first, then all `wanted`."""
        return self._index.match(names, wanted, self._seats, self._workers, HOLDERS_MAX)

    def _seat(self, worker: str) -> int:
        seat = self._seats.get(worker)
        if seat is None:
            seat = self._index.take_seat()
            self._seats[worker] = seat
            self._workers += [""] * (seat + 1 - len(self._workers))
            self._workers[seat] = worker
        return seat


class _Counts(Mapping[str, int]):
    """Blocks by worker, read from the index when asked."""

    def __init__(self, index: PrefixIndex, seats: Mapping[str, int]) -> None:
        self._index, self._seats = index, seats

    def __getitem__(self, worker: str) -> int:
        return self._index.num_blocks(self._seats[worker])

    def __iter__(self) -> Iterator[str]:
        return iter(self._seats)

    def __len__(self) -> int:
        return len(self._seats)


def _sequence(names: Iterable[bytes]) -> Sequence[bytes]:
    return names if isinstance(names, list | tuple) else list(names)
