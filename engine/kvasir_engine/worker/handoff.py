"""The decode side of a hand-off: ask a prefill worker, reserve when it is ready, pull, continue.

Decides what to do with what the peer and the data plane answer. A transfer that fails costs time,
never tokens: what arrived whole is kept, the rest is computed here, and the failure is counted,
logged and, if it persists, shown in the worker's health. A peer that fails before the first token
ends the request with a reason for which the router picks another one (`param` is prefill_peer).

The first token goes out as soon as the peer has sampled it; the next step waits for the KV.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
from kvasir_kvstore.core.block import BLOCK_TOKENS
from kvasir_proto.errors import PEER_PARAM, KvasirError, Reason
from kvasir_proto.rpc_errors import error_from_rpc
from kvasir_proto.v1 import worker_pb2

from kvasir_engine.core.types import EngineRequest, Reservation, TokenEvent
from kvasir_engine.worker.host import Host
from kvasir_engine.worker.inflight import Scope
from kvasir_engine.worker.sampling import stop_token_ids
from kvasir_engine.worker.trace import Trace
from kvasir_engine.worker.transfer import Pull

log = logging.getLogger(__name__)

PULL_BYTES_PER_S_MIN = 20e6
"""A pull slower than this after the prefill's end is given up: computing is faster."""
PEER_VERDICT_S = 0.2
"""After a broken pull: time for the peer's own word on whether it lives."""

PrefillCall = grpc.aio.StreamStreamCall[worker_pb2.PrefillCommand, worker_pb2.PrefillUpdate]


class Handoff:
    """Prompts that a peer prefills for this worker."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def events(
        self,
        message: worker_pb2.GenerateRequest,
        request: EngineRequest,
        *,
        scope: Scope,
        trace: Trace,
    ) -> AsyncGenerator[TokenEvent, None]:
        """The request's token events, as if it had been computed here.

        Raises:
            KvasirError: no memory (BUSY, OVERLOADED), or the peer refused, is gone or is another.
        """
        # 1. A short rest is computed here.
        if self._is_short(request):
            events: AsyncGenerator[TokenEvent, None] = self._computed_here(request, trace)
        else:
            events = self._pulled(message, request, scope, trace)
        async with aclosing(events):
            async for event in events:
                yield event

    async def _computed_here(
        self, request: EngineRequest, trace: Trace
    ) -> AsyncGenerator[TokenEvent, None]:
        async with aclosing(self._host.served().engine.generate(request)) as events:
            async for event in self._noted(events, trace):
                yield event

    async def _pulled(
        self,
        message: worker_pb2.GenerateRequest,
        request: EngineRequest,
        scope: Scope,
        trace: Trace,
    ) -> AsyncGenerator[TokenEvent, None]:
        engine = self._host.served().engine
        first_token: int | None = None
        num_sent = 0
        try:
            async with _Transfer(self._host, message, scope, trace) as transfer:
                # 2. The peer's queue, then memory: nobody computes what could not be taken.
                await transfer.turn()
                reservation = await engine.reserve(request)
                trace.tokens_cached_decode = reservation.tokens_cached
                # 3. The peer computes, and this worker pulls.
                first_token = await transfer.first_token(reservation)
                if first_token is not None and not self._may_end(message, first_token):
                    yield TokenEvent((first_token,))
                    num_sent = 1
                computed_tokens = await transfer.computed_tokens(reservation)
        except BaseException:
            await engine.release(request.request_id)
            raise
        # 4. Continue from what is here.
        extra_tokens = () if first_token is None else (first_token,)
        events = engine.activate(
            request.request_id, computed_tokens=computed_tokens, extra_tokens=extra_tokens
        )
        async with aclosing(events):
            own = events if first_token is not None else self._noted(events, trace)
            async for event in own:
                unsent = event.token_ids[num_sent:]
                num_sent -= len(event.token_ids) - len(unsent)
                yield replace(event, token_ids=unsent)

    async def _noted(
        self, events: AsyncIterator[TokenEvent], trace: Trace
    ) -> AsyncGenerator[TokenEvent, None]:
        """The events; what a prompt that is computed here costs is in the first one."""
        is_first = True
        async for event in events:
            if is_first and event.timing is not None:
                trace.prefill_worker = self._host.settings.name
                trace.prefilled_here(event.timing, self._host.metrics)
            is_first = False
            yield event

    def _is_short(self, request: EngineRequest) -> bool:
        """Whether so much of the prompt is held here that the rest is not worth a hand-off."""
        tokens = [*request.prompt, *request.resume_tokens]
        names = self._host.served().names(tokens[:-1], tenant_salt=request.tenant_salt)
        num_held = BLOCK_TOKENS * self._host.hub.num_leading_held(names)
        if len(tokens) - num_held > self._host.settings.local_prefill_tokens_max:
            return False
        self._host.metrics.local_prefills.labels("short").inc()
        return True

    def _may_end(self, message: worker_pb2.GenerateRequest, token: int) -> bool:
        """A stop token has no text; only the engine's own event says that it is the last one."""
        eos_token_ids = self._host.served().eos_token_ids
        return token in stop_token_ids(message.sampling, eos_token_ids)


class _Transfer:
    """One hand-off in progress: a Prefill call and the pull of its session.

    Invariant: after the `async with` nothing writes to the reservation's blocks any more.
    """

    def __init__(
        self,
        host: Host,
        message: worker_pb2.GenerateRequest,
        scope: Scope,
        trace: Trace,
    ) -> None:
        self._host = host
        self._peer = message.prefill_peer
        self._scope = scope
        self._trace = trace
        self._num_tokens = len(message.token_ids) + len(message.resume_token_ids)
        self._session_id = secrets.randbits(63) | 1
        self._request = worker_pb2.PrefillRequest(
            request_id=message.request_id,
            token_ids=[*message.token_ids, *message.resume_token_ids],
            sampling=message.sampling,
            tenant_salt=message.tenant_salt,
            session_id=self._session_id,
            timeout_ms=scope.left_ms(),
            terms=message.terms,
            chunks=message.chunks if message.HasField("chunks") else None,
        )
        self._call: PrefillCall | None = None
        self._pull: Pull | None = None
        self._finished_s: float | None = None

    async def __aenter__(self) -> Self:
        stub = self._host.peers.worker(self._peer)
        self._call = stub.Prefill(timeout=self._scope.left_ms() / 1000)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._call is not None:
            self._call.cancel()
        if self._pull is not None:
            await self._pull.stop()

    async def turn(self) -> None:
        """Waits, with nothing in hand, until the peer would compute the prompt now.

        Raises:
            KvasirError: the peer refused or handed it back, is gone or is another; `param` is
                prefill_peer.
        """
        # 1. The peer accepts at once, or is taken for dead.
        try:
            async with asyncio.timeout(self._host.settings.accept_timeout_ms / 1000):
                await self._write(worker_pb2.PrefillCommand(request=self._request))
                accepted = (await self._read()).accepted
        except TimeoutError:
            message = f"prefill worker {self._peer.name} does not answer"
            raise KvasirError(Reason.NO_WORKER, message, param=PEER_PARAM) from None
        if (accepted.source.uid, accepted.source.epoch) != (self._peer.uid, self._peer.epoch):
            message = f"prefill worker {self._peer.name} has restarted"
            raise KvasirError(Reason.STALE_PEER, message, param=PEER_PARAM)
        # 2. It waits in the peer's queue.
        await self._read()

    async def first_token(self, reservation: Reservation) -> int | None:
        """The first token, from the peer; None: its KV cannot come, so compute here.

        Raises:
            KvasirError: the peer refused or is gone; `param` is prefill_peer.
        """
        # 1. There is memory for what this worker lacks.
        start = worker_pb2.PrefillStart(skip_blocks=reservation.num_blocks_cached)
        await self._write(worker_pb2.PrefillCommand(start=start))
        # 2. It computes while this worker pulls.
        pull = self._start_pull(reservation)
        read = asyncio.create_task(self._read())
        try:
            if not await self._is_worth_waiting(pull, read):
                return None
            finished = (await read).finished
        finally:
            read.cancel()
        # 3. Finished; the rest of the KV is on its way.
        self._finished_s = time.monotonic()
        self._trace.prefilled_by_peer(finished, name=self._peer.name)
        return finished.first_token_id

    async def _is_worth_waiting(
        self, pull: Pull, read: asyncio.Task[worker_pb2.PrefillUpdate]
    ) -> bool:
        """False: the KV cannot come. True: the peer has answered, or its KV is whole already."""
        waiting: set[asyncio.Future[Any]] = {read, pull.done}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if read.done() or not pull.done.result().error:
            return True
        # a peer that died breaks both: its own end is the better reason
        await asyncio.wait({read}, timeout=PEER_VERDICT_S)
        if not read.done() and pull.done.result().error == "stale_peer":
            message = f"prefill worker {self._peer.name} has restarted"
            raise KvasirError(Reason.STALE_PEER, message, param=PEER_PARAM)
        return read.done()

    async def computed_tokens(self, reservation: Reservation) -> int:
        """Waits for the pull; leading tokens whose KV is now in the reserved blocks."""
        assert self._pull is not None, "first_token starts the pull"
        num_blocks = len(reservation.blocks) - reservation.num_blocks_cached
        num_bytes = num_blocks * self._host.served().layout.block_bytes
        grace_s = self._host.settings.pull_grace_ms / 1000 + num_bytes / PULL_BYTES_PER_S_MIN
        pulled = await self._pull.finish(timeout_s=min(grace_s, self._scope.left_ms() / 1000))
        if self._finished_s is not None:
            self._trace.transfer_ms = (time.monotonic() - self._finished_s) * 1000
        self._trace.kv_bytes_moved += pulled.bytes_moved
        self._host.served().puller.ended(pulled, source=self._peer)
        num_whole = reservation.num_blocks_cached + pulled.num_leading
        num_computed = min(num_whole * BLOCK_TOKENS, self._num_tokens)
        if num_computed < self._num_tokens:
            self._host.metrics.local_prefills.labels(pulled.error or "incomplete").inc()
            self._recomputed(self._num_tokens - num_computed)
        return num_computed

    def _recomputed(self, num_tokens: int) -> None:
        """Says and counts what has to be computed here although a peer was asked to."""
        log.warning("computing %d tokens whose KV was not handed off", num_tokens)
        if self._finished_s is not None:  # computed twice; else this worker's first event counts
            self._trace.tokens_computed += num_tokens
            self._host.metrics.prompt_tokens.add("computed", num_tokens)

    def _start_pull(self, reservation: Reservation) -> Pull:
        num_blocks = -(-self._num_tokens // BLOCK_TOKENS)
        self._pull = self._host.served().puller.session(
            self._peer,
            session_id=self._session_id,
            blocks=reservation.blocks[reservation.num_blocks_cached : num_blocks],
            timeout_ms=self._scope.left_ms(),
        )
        return self._pull

    async def _write(self, command: worker_pb2.PrefillCommand) -> None:
        assert self._call is not None
        try:
            await self._call.write(command)
        except grpc.aio.AioRpcError as rpc_error:
            raise self._peer_error(rpc_error) from rpc_error
        except asyncio.InvalidStateError:
            await self._read()  # the call has ended: this raises why

    async def _read(self) -> worker_pb2.PrefillUpdate:
        assert self._call is not None
        try:
            update = await self._call.read()
        except grpc.aio.AioRpcError as rpc_error:
            raise self._peer_error(rpc_error) from rpc_error
        if isinstance(update, worker_pb2.PrefillUpdate):
            return update
        # the stream ended: with its status, or without the message it owes
        code = await self._call.code()
        message = f"prefill worker {self._peer.name} ended early: {code.name.lower()}"
        raise KvasirError(Reason.KV_TRANSFER, message, param=PEER_PARAM)

    def _peer_error(self, rpc_error: grpc.aio.AioRpcError) -> KvasirError:
        """The peer's refusal as it is; any other end as a reason to pick another peer."""
        error = error_from_rpc(rpc_error)
        own = {Reason.CANCELLED: Reason.NO_WORKER, Reason.INTERNAL: Reason.KV_TRANSFER}
        return KvasirError(
            own.get(error.reason, error.reason),
            f"prefill worker {self._peer.name}: {error.message}",
            param=PEER_PARAM,
            retry_after_ms=error.retry_after_ms,
        )
