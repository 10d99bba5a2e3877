"""Follows the KV events that vLLM publishes over ZeroMQ, so that routers know what it has cached.

    1. connect       and have all that vLLM still remembers told again (its replay socket)
    2. follow        numbered batches; one that is missing is asked for
    3. start over    when one cannot be had any more, vLLM has gone, or counts anew

Invariant: while routers are told of blocks, no batch has been left out; as long as that does not
hold, they go by what they sent here, as they do with a vLLM that publishes nothing.
"""

import asyncio
import logging
import struct

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from kvasir_engine.core.vllm_blocks import EventFormatError, VllmBlocks, events_of
from kvasir_engine.worker.host import Host

log = logging.getLogger(__name__)

REPLAY_TIMEOUT_S = 30.0
RETRY_S = 0.5
SEQUENCE_BYTES = 8
BATCHES_AT_ONCE = 16
"""Of a replay, before other tasks have their turn: a read that finds one does not wait."""

MALFORMED = (msgspec.DecodeError, struct.error, LookupError, TypeError, ValueError)
"""What bytes may raise that are no batch of events."""

END_OF_REPLAY = b"\xff" * SEQUENCE_BYTES
QUEUE_MAX = 100_000
"""Batches that wait here while others are applied; vLLM drops what is more, which shows."""

Socket = zmq.asyncio.Socket


class EventsLostError(Exception):
    """What is known of vLLM's blocks may be wrong."""


class VllmEvents:
    """The events of one vLLM server."""

    def __init__(self, host: Host, blocks: VllmBlocks) -> None:
        settings = host.settings
        assert settings.vllm_events is not None, "events are asked for"
        self._host, self._blocks = host, blocks
        self._endpoint, self._replay_endpoint = settings.vllm_events, settings.vllm_replay
        self._context = zmq.asyncio.Context()
        self._next = 0  # the batch that is due
        self._latest = -1  # the last one that was published while we listened
        self._is_following = False

    async def run(self) -> None:
        """Follows vLLM until cancelled, or until it says what cannot be understood."""
        try:
            while True:
                try:
                    await self._follow()
                except EventsLostError as error:
                    log.info("vLLM's KV events: %s; starting over", error)
                self._forget()
                await asyncio.sleep(RETRY_S)
        except EventFormatError as error:
            log.error("vLLM's KV events cannot be used: %s", error)
            self._forget()
        finally:
            self._context.destroy(linger=0)

    def _forget(self) -> None:
        self._next, self._latest, self._is_following = 0, -1, False
        self._blocks.forget()
        self._show()

    def _show(self) -> None:
        """Routers hear of it when blocks begin or cease to be told."""
        tells = self._is_following and self._blocks.are_whole
        if tells != self._host.tells_blocks:
            log.info("vLLM's KV events %s", "are followed" if tells else "are not followed")
            self._host.tells_blocks = tells
            self._host.hub.tell_anew(self._blocks.names() if tells else ())

    async def _follow(self) -> None:
        """One connection, to its end."""
        with self._context.socket(zmq.SUB) as subscriber:
            subscriber.set_hwm(QUEUE_MAX)
            events = zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED
            monitor = subscriber.get_monitor_socket(events)
            try:
                subscriber.subscribe(b"")
                subscriber.connect(self._endpoint)
                await _until(monitor, zmq.EVENT_CONNECTED)
                gone = asyncio.create_task(_until(monitor, zmq.EVENT_DISCONNECTED))
                try:
                    await self._listen(subscriber, gone)
                finally:
                    gone.cancel()
            finally:
                subscriber.disable_monitor()

    async def _listen(self, subscriber: Socket, gone: "asyncio.Task[None]") -> None:
        await self._replay(since=0)
        self._is_following = True
        self._show()
        while True:
            received = asyncio.ensure_future(subscriber.recv_multipart())
            await asyncio.wait({received, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not received.done():
                received.cancel()
                raise EventsLostError("vLLM has gone")
            await self._take(received.result())
            self._show()

    async def _take(self, frames: list[bytes]) -> None:
        """A batch as it is published."""
        _, sequence, payload = _checked(frames)
        if sequence <= self._latest:
            raise EventsLostError("vLLM counts anew")
        if self._latest < 0 and self._replay_endpoint is None:
            self._next = sequence  # nothing is told of what came before
        self._latest = sequence
        if sequence > self._next:
            missing = self._next
            first = await self._replay(since=missing)
            if first != missing:
                raise EventsLostError(f"batch {missing} cannot be had any more")
        if sequence == self._next:
            self._apply(sequence, payload)
        elif sequence > self._next:
            raise EventsLostError(f"batch {self._next} is missing")

    async def _replay(self, *, since: int) -> int | None:
        """Has vLLM tell what it remembers; the first batch that it told."""
        if self._replay_endpoint is None:
            return None
        first, is_whole = await self._repeated(self._replay_endpoint, since=since)
        while not is_whole:
            due = self._next
            begin, is_whole = await self._repeated(self._replay_endpoint, since=due)
            if begin != due:
                raise EventsLostError(f"batch {due} cannot be had any more")
        return first

    async def _repeated(self, endpoint: str, *, since: int) -> tuple[int | None, bool]:
        """One answer: its first batch, and whether none was left out.

        vLLM's socket drops of large answers what it cannot send at once.
        """
        first: int | None = None
        try:
            with self._context.socket(zmq.DEALER) as asking:
                asking.set_hwm(0)  # an answer is one long row of batches
                asking.linger = 0
                asking.connect(endpoint)
                async with asyncio.timeout(REPLAY_TIMEOUT_S):
                    await asking.send_multipart([b"", since.to_bytes(SEQUENCE_BYTES, "big")])
                    while True:
                        frames = await asking.recv_multipart()
                        if frames[1:2] == [END_OF_REPLAY]:
                            return first, True
                        _, sequence, payload = _checked(frames)
                        if first is not None and sequence != self._next:
                            return first, False
                        first = sequence if first is None else first
                        self._apply(sequence, payload)
                        if sequence % BATCHES_AT_ONCE == 0:
                            await asyncio.sleep(0)
        except TimeoutError:
            raise EventsLostError("vLLM does not repeat its events") from None

    def _apply(self, sequence: int, payload: bytes) -> None:
        try:
            events = events_of(msgspec.msgpack.decode(payload))
            changes = [self._blocks.apply(event) for event in events]
        except MALFORMED as error:
            name = type(error).__name__
            raise EventFormatError(f"a batch cannot be understood: {name}") from error
        if self._host.tells_blocks:
            for change in changes:
                self._host.hub.blocks_changed(stored=change.stored, removed=change.removed)
        self._next = sequence + 1


def _checked(frames: list[bytes]) -> tuple[bytes, int, bytes]:
    if len(frames) != 3 or len(frames[1]) != SEQUENCE_BYTES:
        raise EventFormatError(f"a message of {len(frames)} frames")
    return frames[0], int.from_bytes(frames[1], "big"), frames[2]


async def _until(monitor: Socket, wanted: int) -> None:
    while (await recv_monitor_message(monitor))["event"] != wanted:
        pass
