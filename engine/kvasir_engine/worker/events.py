"""What a worker tells its watchers: which blocks it holds, and how it is.

Decides what goes into each watcher's stream: a snapshot, then every change, in order, and the
description every so often. Invariant: a watcher that applies its events in order knows exactly the
blocks of `held`, or its stream has ended. A watcher that falls behind is cut off, never waited for.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import worker_pb2

from kvasir_engine.worker.metrics import WorkerMetrics

NAMES_PER_EVENT_MAX = 50_000
"""A snapshot of more comes in several events: gRPC messages are bounded."""
LOAD_INTERVAL_MS = 200
LOAD_INTERVAL_MS_MIN = 20
WATCHERS_MAX = 256


class Watcher:
    """One stream of events; `put` is called by the hub, `next_event` by the stream's owner."""

    def __init__(self, snapshot: Iterable[bytes], *, queue_max: int) -> None:
        names = list(snapshot)
        first = worker_pb2.WorkerEvent(snapshot=True, stored=names[:NAMES_PER_EVENT_MAX])
        self._queue: asyncio.Queue[worker_pb2.WorkerEvent | None] = asyncio.Queue()
        self._queue.put_nowait(first)
        for start in range(NAMES_PER_EVENT_MAX, len(names), NAMES_PER_EVENT_MAX):
            rest = worker_pb2.WorkerEvent(stored=names[start : start + NAMES_PER_EVENT_MAX])
            self._queue.put_nowait(rest)
        self._size_max = self._queue.qsize() + queue_max
        self.is_cut_off = False

    def put(self, event: worker_pb2.WorkerEvent) -> None:
        """Adds an event; cuts the watcher off if too many wait."""
        if self._queue.qsize() >= self._size_max:
            self.is_cut_off = True
        if not self.is_cut_off:
            self._queue.put_nowait(event)

    def close(self) -> None:
        """No more events come."""
        self._queue.put_nowait(None)

    async def next_event(self, *, timeout_ms: float) -> worker_pb2.WorkerEvent | None:
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


class EventHub:
    """The names held by this worker, and those who watch them. Lives in the event loop's thread."""

    def __init__(
        self,
        describe: Callable[[], worker_pb2.WorkerDescription],
        metrics: WorkerMetrics,
        *,
        queue_max: int,
        announces: bool = True,
    ) -> None:
        """`announces`: watchers are told of blocks; else of the worker itself alone."""
        self._announces = announces
        self._describe = describe
        self._metrics = metrics
        self._queue_max = queue_max
        self._watchers: set[Watcher] = set()
        self.held: dict[bytes, None] = {}
        """Names in the order in which they were stored: parents before children."""

    def num_leading_held(self, names: Sequence[bytes]) -> int:
        """How many of these names, from the first on, are held: a hint for whoever asks later."""
        return next((i for i, name in enumerate(names) if name not in self.held), len(names))

    def blocks_changed(self, *, stored: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """The engine's cache changed: `removed` first, then `stored`."""
        gone = [name for name in removed if self.held.pop(name, 0) is None]
        new = [name for name in stored if name not in self.held]
        self.held.update(dict.fromkeys(new))
        if gone and self._announces:
            self._send(worker_pb2.WorkerEvent(removed=gone))
        if new and self._announces:
            self._send(worker_pb2.WorkerEvent(stored=new))

    def description_changed(self) -> None:
        """Role, drain or health changed: watchers hear of it at once."""
        self._send(worker_pb2.WorkerEvent(description=self._describe()))

    def close(self) -> None:
        """Ends every stream."""
        for watcher in self._watchers:
            watcher.close()

    async def watch(self, *, load_interval_ms: int) -> AsyncGenerator[worker_pb2.WorkerEvent, None]:
        """One watcher's events, numbered from 1.

        Raises:
            KvasirError: OVERLOADED: too many watchers, or this one fell behind.
        """
        if len(self._watchers) >= WATCHERS_MAX:
            raise KvasirError(Reason.OVERLOADED, f"{WATCHERS_MAX} watchers are connected")
        interval_s = max(load_interval_ms or LOAD_INTERVAL_MS, LOAD_INTERVAL_MS_MIN) / 1000
        watcher = Watcher(self.held if self._announces else (), queue_max=self._queue_max)
        self._watchers.add(watcher)
        try:
            async for event in self._numbered(watcher, interval_s):
                yield event
        except KvasirError:
            self._metrics.watchers_dropped.inc()
            raise
        finally:
            self._watchers.discard(watcher)

    async def _numbered(
        self, watcher: Watcher, interval_s: float
    ) -> AsyncGenerator[worker_pb2.WorkerEvent, None]:
        now_s = asyncio.get_running_loop().time
        sequence = 0
        describe_at_s = 0.0
        while True:
            wait_s = max(describe_at_s - now_s(), 0)
            try:
                event = await watcher.next_event(timeout_ms=wait_s * 1000)
            except TimeoutError:
                event = worker_pb2.WorkerEvent(description=self._describe())
            if event is None:
                return
            sequence += 1
            event = self._stamped(event, sequence)
            if not event.HasField("description") and now_s() >= describe_at_s:
                event.description.CopyFrom(self._describe())
            if event.HasField("description"):
                describe_at_s = now_s() + interval_s
            yield event

    @staticmethod
    def _stamped(event: worker_pb2.WorkerEvent, sequence: int) -> worker_pb2.WorkerEvent:
        """A copy for one watcher: events are shared between queues."""
        own = worker_pb2.WorkerEvent()
        own.CopyFrom(event)
        own.sequence = sequence
        return own

    def _send(self, event: worker_pb2.WorkerEvent) -> None:
        for watcher in self._watchers:
            watcher.put(event)
