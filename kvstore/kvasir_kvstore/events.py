"""What a worker or KV node tells its watchers: which blocks it holds, and how it is.

Decides what goes into each watcher's stream: a snapshot, then every change, in order, and the
description every so often. Invariant: a watcher that applies its events in order knows exactly the
blocks of `held`, or its stream has ended. A watcher that falls behind is cut off, never waited for.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Generic, TypeVar

from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import kvnode_pb2, worker_pb2

NAMES_PER_EVENT_MAX = 50_000
"""A snapshot of more comes in several events: gRPC messages are bounded."""
LOAD_INTERVAL_MS = 200
LOAD_INTERVAL_MS_MIN = 20
WATCHERS_MAX = 256

E = TypeVar("E", worker_pb2.WorkerEvent, kvnode_pb2.KvNodeEvent)
"""Events of one shape: sequence, snapshot, stored, removed, description."""


def _snapshot(kind: type[E], held: Iterable[bytes]) -> list[E]:
    """Events that say all that is held."""
    names = list(held)
    return [
        kind(snapshot=start == 0, stored=names[start : start + NAMES_PER_EVENT_MAX])
        for start in range(0, max(len(names), 1), NAMES_PER_EVENT_MAX)
    ]


class Watcher(Generic[E]):
    """One stream of events; `put` is called by the hub, `next_event` by the stream's owner."""

    def __init__(self, kind: type[E], snapshot: Iterable[bytes], *, queue_max: int) -> None:
        self._queue: asyncio.Queue[E | None] = asyncio.Queue()
        for event in _snapshot(kind, snapshot):
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
        on_dropped: Callable[[], None],
        announces: bool = True,
    ) -> None:
        """What a hub tells.

        Args:
            kind: of its events.
            described: a new event with nothing but the description in it.
            on_dropped: a watcher fell behind.
            announces: watchers are told of blocks; else of the process itself alone.
        """
        self._announces = announces
        self._kind: type[E] = kind
        self._described: Callable[[], E] = described
        self._on_dropped = on_dropped
        self._queue_max = queue_max
        self._watchers: set[Watcher[E]] = set()
        self.held: dict[bytes, None] = {}
        """Names in the order in which they were stored: parents before children."""

    def num_leading_held(self, names: Sequence[bytes]) -> int:
        """How many of these names, from the first on, are held: a hint for whoever asks later."""
        return next((i for i, name in enumerate(names) if name not in self.held), len(names))

    def blocks_changed(self, *, stored: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """What is held changed: `removed` first, then `stored`."""
        gone = [name for name in removed if self.held.pop(name, 0) is None]
        new = [name for name in stored if name not in self.held]
        self.held.update(dict.fromkeys(new))
        if gone and self._announces:
            self._send(self._kind(removed=gone))
        if new and self._announces:
            self._send(self._kind(stored=new))

    def description_changed(self) -> None:
        """Role, drain or health changed: watchers hear of it at once."""
        self._send(self._described())

    def tell_anew(self, held: Iterable[bytes]) -> None:
        """`held` is all that is held; watchers hear it, and the description, as if just come."""
        self.held = dict.fromkeys(held)
        first, *rest = _snapshot(self._kind, self.held if self._announces else ())
        first.MergeFrom(self._described())
        for event in (first, *rest):
            self._send(event)

    def close(self) -> None:
        """Ends every stream."""
        for watcher in self._watchers:
            watcher.close()

    async def watch(self, *, load_interval_ms: int) -> AsyncGenerator[E, None]:
        """One watcher's events, numbered from 1.

        Raises:
            KvasirError: OVERLOADED: too many watchers, or this one fell behind.
        """
        if len(self._watchers) >= WATCHERS_MAX:
            raise KvasirError(Reason.OVERLOADED, f"{WATCHERS_MAX} watchers are connected")
        interval_s = max(load_interval_ms or LOAD_INTERVAL_MS, LOAD_INTERVAL_MS_MIN) / 1000
        held = self.held if self._announces else ()
        watcher = Watcher(self._kind, held, queue_max=self._queue_max)
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

    def _send(self, event: E) -> None:
        for watcher in self._watchers:
            watcher.put(event)
