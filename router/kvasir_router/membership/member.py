"""One worker's event stream: dialled, followed, and dialled again with backoff.

Invariant: `reachable` is true only while events arrive; every event is applied in sequence, and a
gap means a new stream with a new snapshot.
"""

import asyncio
import logging
import random
from collections.abc import Sequence
from typing import Protocol

import grpc
import grpc.aio
from kvasir_proto.v1 import worker_pb2, worker_pb2_grpc

log = logging.getLogger(__name__)

LOAD_INTERVAL_MS = 200
BACKOFF_MS_MIN = 100
BACKOFF_MS_MAX = 1_000
EVENT_BYTES_MAX = 64 << 20
"""A snapshot of three million block names."""


class Listener(Protocol):
    """Who wants to know of a member's events."""

    def on_event(self, member: "Member", event: worker_pb2.WorkerEvent) -> None:
        """An event arrived and `member` already shows it."""

    def on_lost(self, member: "Member") -> None:
        """The stream broke; the next event will be a snapshot."""


class SequenceGapError(Exception):
    """An event is missing: what is known of the worker's blocks may be wrong."""


class StreamEndedError(Exception):
    """The worker ended its event stream: it is going away."""


class Member:
    """A worker at one address."""

    def __init__(self, target: str, listener: Listener, *, silence_timeout_ms: int) -> None:
        self.target = target
        self.description: worker_pb2.WorkerDescription | None = None
        self.reachable = False
        self.error = "not yet connected"
        self._listener = listener
        self._silence_s = silence_timeout_ms / 1_000
        self._sequence = 0
        self._stub: worker_pb2_grpc.WorkerAsyncStub | None = None

    @property
    def name(self) -> str:
        """The worker's own name, or its address before it said one."""
        return self.description.address.name if self.description else self.target

    async def run(self) -> None:
        """Follows the worker until cancelled."""
        backoff_ms = BACKOFF_MS_MIN
        while True:
            was_reachable = True
            try:
                await self._follow()
            except SequenceGapError:
                log.warning("worker %s: an event is missing, reconnecting", self.name)
            except grpc.aio.AioRpcError as error:
                was_reachable = self._lose(error.details() or error.code().name.lower())
            except TimeoutError:
                was_reachable = self._lose("no event in time")
            except StreamEndedError:
                was_reachable = self._lose("it ended its event stream")
            backoff_ms = BACKOFF_MS_MIN if was_reachable else min(2 * backoff_ms, BACKOFF_MS_MAX)
            await asyncio.sleep(backoff_ms * random.uniform(0.5, 1.0) / 1_000)

    async def hand_back(self, request_ids: Sequence[str], *, timeout_s: float) -> int:
        """Asks the worker to hand back those of these requests that still wait; how many did.

        Raises:
            AioRpcError: it cannot be asked now.
        """
        if self._stub is None:
            return 0
        request = worker_pb2.HandBackRequest(request_ids=request_ids)
        return (await self._stub.HandBack(request, timeout=timeout_s)).num_handed_back

    def _lose(self, error: str) -> bool:
        was_reachable, self.reachable = self.reachable, False
        self.error = error
        if was_reachable:
            log.warning("worker %s is unreachable: %s", self.name, error)
            self._listener.on_lost(self)
        return was_reachable

    async def _follow(self) -> None:
        """One stream, to its end. Its deadline is per event: silence ends it."""
        async with grpc.aio.insecure_channel(self.target, options=_channel_options()) as channel:
            self._stub = worker_pb2_grpc.WorkerStub(channel)
            request = worker_pb2.WatchEventsRequest(load_interval_ms=LOAD_INTERVAL_MS)
            call = self._stub.WatchEvents(request)
            first = True
            while True:
                async with asyncio.timeout(self._silence_s):
                    event = await call.read()
                if not isinstance(event, worker_pb2.WorkerEvent):
                    raise StreamEndedError
                self._apply(event, first=first)
                first = False

    def _apply(self, event: worker_pb2.WorkerEvent, *, first: bool) -> None:
        in_order = event.snapshot if first else event.sequence == self._sequence + 1
        if not in_order and not event.snapshot:
            raise SequenceGapError
        self._sequence = event.sequence
        if event.HasField("description"):
            self.description = event.description
        if not self.reachable and self.description is not None:
            log.info("worker %s is reachable at %s", self.name, self.target)
            self.reachable, self.error = True, ""
        self._listener.on_event(self, event)


def _channel_options() -> Sequence[tuple[str, int]]:
    return (
        ("grpc.max_receive_message_length", EVENT_BYTES_MAX),
        ("grpc.initial_reconnect_backoff_ms", BACKOFF_MS_MIN),
        ("grpc.max_reconnect_backoff_ms", BACKOFF_MS_MAX),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
    )
