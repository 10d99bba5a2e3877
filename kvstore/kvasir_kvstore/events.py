"""What a worker or KV node tells its watchers: which blocks it holds, and how it is.

Decides what goes into each watcher's stream: a snapshot, then every change, in order, and the
description every so often. A watcher that comes back says which change it heard of last, and gets
those since then, if they are still known, in the place of the snapshot. Invariant: a watcher that
applies its events in order knows exactly the blocks of `held`, or its stream has ended. A watcher
that falls behind is cut off, never waited for.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from itertools import islice
from typing import Generic, Literal, TypeVar

from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import kvnode_pb2, worker_pb2

NAMES_PER_EVENT_MAX = 50_000
"""A snapshot of more comes in several events: gRPC messages are bounded."""
LOAD_INTERVAL_MS = 200
LOAD_INTERVAL_MS_MIN = 20
WATCHERS_MAX = 256
REPLAY_NAMES_MAX = 100_000
"""Names in the latest changes, which are kept for watchers that come back."""
REPLAY_EVENTS_MAX = 4096
"""Changes that are kept, however few names they have: some 8 MB with so many names."""

E = TypeVar("E", worker_pb2.WorkerEvent, kvnode_pb2.KvNodeEvent)
"""Events of one shape: sequence, snapshot, stored, removed, description, position."""
Start = Literal["snapshot", "replay"]
"""What a stream began with."""


def _snapshot(kind: type[E], held: Iterable[bytes], *, position: int) -> list[E]:
    """Events that say all that is held; only after the last one can a watcher go on from there."""
    names = list(held)
    events = [
        kind(snapshot=start == 0, stored=names[start : start + NAMES_PER_EVENT_MAX])
        for start in range(0, max(len(names), 1), NAMES_PER_EVENT_MAX)
    ]
    events[-1].position = position
    return events


class _Latest(Generic[E]):
    """The latest changes, each with its position.

    Positions begin anywhere: one that a watcher has from another life of this process is unknown.
    """

    def __init__(self) -> None:
        self._events: deque[E] = deque()
        self._num_names = 0
        self.position = secrets.randbits(62) + 1

    def add(self, event: E) -> None:
        """A change; the oldest are given up for it."""
        self.position += 1
        event.position = self.position
        self._events.append(event)
        self._num_names += _num_names(event)
        while self._num_names > REPLAY_NAMES_MAX or len(self._events) > REPLAY_EVENTS_MAX:
            self._num_names -= _num_names(self._events.popleft())

    def since(self, position: int) -> list[E] | None:
        """All changes after this one; None: they are not known any more."""
        num_missed = self.position - position
        if not 0 <= num_missed <= len(self._events):
            return None
        return list(islice(self._events, len(self._events) - num_missed, None))

    def clear(self) -> None:
        """Something changed that is no event."""
        self._events.clear()
        self._num_names = 0
        self.position += 1


def _num_names(event: worker_pb2.WorkerEvent | kvnode_pb2.KvNodeEvent) -> int:
    return len(event.stored) + len(event.removed)


class Watcher(Generic[E]):
    """One stream of events; `put` is called by the hub, `next_event` by the stream's owner."""

    def __init__(self, first: Iterable[E], *, queue_max: int) -> None:
        self._queue: asyncio.Queue[E | None] = asyncio.Queue()
        for event in first:
            self._queue.put_nowait(event)
        self._size_max = self._queue.qsize() + queue_max
        self.is_cut_off = False

    def put(self, event: E) -> None:
        """Adds an event; cuts the watcher off if too many wait."""
        if self._queue.qsize() >= self._size_max:
            self.is_cut_off = True
        if not self.is_cut_off:
            self._queue.put_nowait(event)

    def close(self) -> None:
        """No more events come."""
        self._queue.put_nowait(None)

    async def next_event(self, *, timeout_ms: float) -> E | None:
        """The next event.

        Raises:
            TimeoutError: none came in time.
            KvasirError: OVERLOADED: the watcher fell behind and must reconnect.
        """
        if self.is_cut_off:
            raise KvasirError(Reason.OVERLOADED, "the watcher fell behind: reconnect")
        if self._queue.empty():
            async with asyncio.timeout(timeout_ms / 1000):
                return await self._queue.get()
        return self._queue.get_nowait()


class EventHub(Generic[E]):
    """The names held here, and those who watch them. Lives in the event loop's thread."""

    def __init__(
        self,
        kind: type[E],
        described: Callable[[], E],
        *,
        queue_max: int,
        on_started: Callable[[Start], None],
        on_dropped: Callable[[], None],
        announces: bool = True,
    ) -> None:
        """What a hub tells.

        Args:
            kind: of its events.
            described: a new event with nothing but the description in it.
            on_started: a stream began, with this.
            on_dropped: a watcher fell behind.
            announces: watchers are told of blocks; else of the process itself alone.
        """
        self._announces = announces
        self._kind: type[E] = kind
        self._described: Callable[[], E] = described
        self._on_started, self._on_dropped = on_started, on_dropped
        self._queue_max = queue_max
        self._latest: _Latest[E] = _Latest()
        self._watchers: set[Watcher[E]] = set()
        self._is_closed = False
        self.held: dict[bytes, None] = {}
        """Names in the order in which they were stored: parents before children."""

    @property
    def position(self) -> int:
        """Of the last change."""
        return self._latest.position

    def num_leading_held(self, names: Sequence[bytes]) -> int:
        """How many of these names, from the first on, are held: a hint for whoever asks later."""
        return next((i for i, name in enumerate(names) if name not in self.held), len(names))

    def blocks_changed(self, *, stored: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """What is held changed: `removed` first, then `stored`."""
        gone = [name for name in removed if self.held.pop(name, 0) is None]
        new = [name for name in stored if name not in self.held]
        self.held.update(dict.fromkeys(new))
        if gone and self._announces:
            self._change(self._kind(removed=gone))
        if new and self._announces:
            self._change(self._kind(stored=new))

    def description_changed(self) -> None:
        """Role, drain or health changed: watchers hear of it at once."""
        self._send(self._described())

    def tell_anew(self, held: Iterable[bytes]) -> None:
        """`held` is all that is held; watchers hear it, and the description, as if just come."""
        self.held = dict.fromkeys(held)
        self._latest.clear()
        first, *rest = self._snapshot()
        first.MergeFrom(self._described())
        for event in (first, *rest):
            self._send(event)

    def close(self) -> None:
        """Ends every stream, those that would begin later, too."""
        self._is_closed = True
        for watcher in self._watchers:
            watcher.close()

    async def watch(self, *, load_interval_ms: int, after: int = 0) -> AsyncGenerator[E, None]:
        """One watcher's events, numbered from 1; `after`: the last position that it heard of.

        Raises:
            KvasirError: OVERLOADED: too many watchers, or this one fell behind. DRAINING: closed.
        """
        if self._is_closed:
            raise KvasirError(Reason.DRAINING, "no more events come: the process stops")
        if len(self._watchers) >= WATCHERS_MAX:
            raise KvasirError(Reason.OVERLOADED, f"{WATCHERS_MAX} watchers are connected")
        interval_s = max(load_interval_ms or LOAD_INTERVAL_MS, LOAD_INTERVAL_MS_MIN) / 1000
        missed = self._latest.since(after)
        self._on_started("snapshot" if missed is None else "replay")
        first = self._snapshot() if missed is None else missed or [self._kind()]
        watcher = Watcher(first, queue_max=self._queue_max)
        self._watchers.add(watcher)
        try:
            async for event in self._numbered(watcher, interval_s):
                yield event
        except KvasirError:
            self._on_dropped()
            raise
        finally:
            self._watchers.discard(watcher)

    async def _numbered(self, watcher: Watcher[E], interval_s: float) -> AsyncGenerator[E, None]:
        now_s = asyncio.get_running_loop().time
        sequence = 0
        describe_at_s = 0.0
        while True:
            wait_s = max(describe_at_s - now_s(), 0)
            try:
                event = await watcher.next_event(timeout_ms=wait_s * 1000)
            except TimeoutError:
                event = self._described()
            if event is None:
                return
            sequence += 1
            event = self._stamped(event, sequence)
            if not event.HasField("description") and now_s() >= describe_at_s:
                event.MergeFrom(self._described())
            if event.HasField("description"):
                describe_at_s = now_s() + interval_s
            yield event

    @staticmethod
    def _stamped(event: E, sequence: int) -> E:
        """A copy for one watcher: events are shared between queues."""
        own = type(event)()
        own.CopyFrom(event)
        own.sequence = sequence
        return own

    def _snapshot(self) -> list[E]:
        held = self.held if self._announces else ()
        return _snapshot(self._kind, held, position=self._latest.position)

    def _change(self, event: E) -> None:
        self._latest.add(event)
        self._send(event)

    def _send(self, event: E) -> None:
        for watcher in self._watchers:
            watcher.put(event)
