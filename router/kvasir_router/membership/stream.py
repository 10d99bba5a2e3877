"""One peer's event stream: dialled, followed, and dialled again with backoff.

Invariant: `reachable` is true only while events arrive; every event is applied in sequence. After a
gap or a break a new stream is asked for what was missed: it begins with the changes since then, or
with a snapshot. What a peer holds stays known until the first attempt to reach it again has failed.
"""

import asyncio
import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio
from kvasir_proto.links import Links
from kvasir_proto.v1 import kvnode_pb2, worker_pb2

from kvasir_router.membership.silence import Silence

log = logging.getLogger(__name__)

LOAD_INTERVAL_MS = 200
BACKOFF_MS_MIN = 100
BACKOFF_MS_MAX = 1_000
EVENT_BYTES_MAX = 64 << 20
"""A snapshot of three million block names."""

E = TypeVar("E", worker_pb2.WorkerEvent, kvnode_pb2.KvNodeEvent)


class SequenceGapError(Exception):
    """An event is missing: what is known of the peer's blocks may be wrong."""


class StreamEndedError(Exception):
    """The peer ended its event stream: it is going away."""


class Followed(ABC, Generic[E]):
    """A worker or KV node at one address."""

    kind: str
    event_type: type[E]

    def __init__(self, target: str, *, links: Links, silence_timeout_ms: int) -> None:
        self.target = target
        self._links = links
        self.reachable = False
        self.error = "not yet connected"
        self._silence_s = silence_timeout_ms / 1_000
        self._sequence = 0
        self._position = 0
        """The last change that was applied; 0: what the peer holds is not known."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The peer's own name, or its address before it said one."""

    @abstractmethod
    def _watch(
        self, channel: grpc.aio.Channel, *, after: int
    ) -> "grpc.aio.UnaryStreamCall[Any, E]":
        """Opens the stream, with the changes since that position."""

    def _learn(self, event: E) -> bool:
        """Takes note of who the peer is; whether that is known now."""
        return True

    @abstractmethod
    def _tell(self, event: E) -> None:
        """An event was applied."""

    @abstractmethod
    def _lost(self) -> None:
        """The stream broke: the peer serves nothing until events arrive again."""

    @abstractmethod
    def _forget(self) -> None:
        """What the peer holds is not known any more, nor, if it restarted, who it is."""

    async def run(self) -> None:
        """Follows the peer until cancelled."""
        backoff_ms = BACKOFF_MS_MIN
        while True:
            was_reachable = True
            try:
                await self._follow()
            except SequenceGapError:
                log.warning("%s %s: an event is missing, reconnecting", self.kind, self.name)
            except grpc.aio.AioRpcError as error:
                was_reachable = self._lose(error.details() or error.code().name.lower())
            except TimeoutError:
                was_reachable = self._lose("no event in time")
            except StreamEndedError:
                was_reachable = self._lose("it ended its event stream")
            backoff_ms = BACKOFF_MS_MIN if was_reachable else min(2 * backoff_ms, BACKOFF_MS_MAX)
            await asyncio.sleep(backoff_ms * random.uniform(0.5, 1.0) / 1_000)

    def _lose(self, error: str) -> bool:
        was_reachable, self.reachable = self.reachable, False
        self.error = error
        if was_reachable:
            log.warning("%s %s is unreachable: %s", self.kind, self.name, error)
            self._lost()
            if not self._position:
                self._forget()
        else:
            self._restart()
        return was_reachable

    def _restart(self) -> None:
        """The next event must be a snapshot."""
        if self._position:
            self._position = 0
            self._forget()

    async def _follow(self) -> None:
        """One stream, to its end. Its deadline is per event: silence ends it."""
        async with (
            self._links.channel(self.target, _channel_options()) as channel,
            Silence(self._silence_s) as silence,
        ):
            call = self._watch(channel, after=self._position)
            first = True
            while True:
                event = await call.read()
                silence.heard()
                if not isinstance(event, self.event_type):
                    raise StreamEndedError
                self._apply(event, first=first)
                first = False

    def _apply(self, event: E, *, first: bool) -> None:
        expected = 1 if first else self._sequence + 1
        goes_on = event.sequence == expected and (self._position or not first)
        if not event.snapshot and not goes_on:
            raise SequenceGapError
        if event.snapshot:
            self._restart()
        self._sequence = event.sequence
        if event.position or event.snapshot:
            self._position = event.position
        is_known = self._learn(event)
        if not self.reachable and is_known:
            log.info("%s %s is reachable at %s", self.kind, self.name, self.target)
            self.reachable, self.error = True, ""
        self._tell(event)


def _channel_options() -> Sequence[tuple[str, int]]:
    return (
        ("grpc.max_receive_message_length", EVENT_BYTES_MAX),
        ("grpc.initial_reconnect_backoff_ms", BACKOFF_MS_MIN),
        ("grpc.max_reconnect_backoff_ms", BACKOFF_MS_MAX),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
    )
