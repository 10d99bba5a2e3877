"""The canary between two workers: a block of random bytes that one lends and the other pulls.

Decides whether KV crosses from a prefill worker to this one. The block takes the path of a
hand-off: memory is reserved on both sides, the lender opens a session of the data plane, and the
puller verifies every frame and, in the end, the whole. Nothing is computed or queued, and the block
has no name: no prefix cache and no index ever knows of it.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import grpc.aio
import numpy as np
from kvasir_kvstore._native import BlockPool
from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.rpc_errors import error_from_rpc
from kvasir_proto.v1 import common_pb2, worker_pb2
from numpy.typing import NDArray

from kvasir_engine.core.types import EngineRequest, Sampling
from kvasir_engine.sessions import CLOSE_POLL_MS
from kvasir_engine.worker.host import Host, Serving

CHECK_PEERS_MAX = 4
LENT_MAX = 16
"""Canaries lent at one time: each holds a block."""
RESERVE_TIMEOUT_S = 5.0
"""No memory within this time: the workers have other work, which shows that they live."""
HOLD_TIMEOUT_S = 25.0
CHECK_TIMEOUT_S = 18.0
"""For one peer: longer than both reservations take at most; a lender holds longer than that."""
LAST_WORD_S = 1.0
PULLED_POLL_S = 0.005
PATTERN_BYTES = 64
_SALT = b"kvasir-canary"
_OF_BUSY_PEERS = (
    *(Reason.BUSY, Reason.OVERLOADED, Reason.DRAINING, Reason.STALE_PEER),
    *(Reason.NO_WORKER, Reason.CANCELLED),  # it goes, or has gone; a dead data plane says otherwise
)

Check = worker_pb2.TransferCheck
LendCall = grpc.aio.UnaryStreamCall[worker_pb2.LendCanaryRequest, worker_pb2.LendCanaryUpdate]


class Crossing:
    """Lends canaries to peers and pulls those of others."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._num_lent = 0
        self._checking = asyncio.Lock()

    async def lend(self, session_id: int) -> AsyncGenerator[worker_pb2.LendCanaryUpdate, None]:
        """Lends one block under a session, until it is pulled or HOLD_TIMEOUT_S has passed.

        Raises:
            KvasirError: BUSY, OVERLOADED or DRAINING: not now; INVALID_REQUEST: the id is in use.
        """
        serving = self._serving()
        if self._num_lent >= LENT_MAX:
            raise KvasirError(Reason.OVERLOADED, f"{LENT_MAX} canaries are lent already")
        self._num_lent += 1
        try:
            async with reserved_block(serving) as block:
                pattern = secrets.token_bytes(PATTERN_BYTES)
                _fill(serving.pool, block, pattern)
                async with _session(serving.pool, session_id, block):
                    yield worker_pb2.LendCanaryUpdate(pattern=pattern)
                    if await _is_pulled(serving.pool, session_id):
                        self._host.health.has_crossed = True
        finally:
            self._num_lent -= 1

    async def check(self, peers: Sequence[common_pb2.PeerAddress]) -> list[Check]:
        """Pulls a canary from these peers until one arrives; what came of those tried.

        Raises:
            KvasirError: BUSY or DRAINING: this worker cannot check now.
        """
        serving = self._serving()
        checks: list[Check] = []
        async with self._checking:
            for peer in peers:
                checks.append(await self._check(serving, peer))
                if checks[-1].outcome == Check.OUTCOME_CROSSED:
                    break
            self._conclude(serving, checks, peers)
        return checks

    def _serving(self) -> Serving:
        if self._host.state.draining:
            raise KvasirError(Reason.DRAINING, "the worker drains")
        if self._host.serving is None:
            raise KvasirError(Reason.BUSY, self._host.state.loading)
        return self._host.serving

    def _conclude(
        self, serving: Serving, checks: Sequence[Check], peers: Sequence[common_pb2.PeerAddress]
    ) -> None:
        """What the outcomes mean for this worker; a peer that alone fails is not its fault."""
        health, was_healthy = self._host.health, self._host.health.healthy
        outcomes = [check.outcome for check in checks]
        if Check.OUTCOME_CROSSED in outcomes:
            health.crossed()
            serving.puller.failed_peer = None
        elif Check.OUTCOME_FAILED in outcomes:
            failed = outcomes.index(Check.OUTCOME_FAILED)
            health.not_crossed(checks[failed].error)
            serving.puller.failed_peer = peers[failed]
        if health.healthy != was_healthy:
            self._host.hub.description_changed()

    async def _check(self, serving: Serving, peer: common_pb2.PeerAddress) -> Check:
        error = kind = ""
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S), reserved_block(serving) as block:
                error = kind = await self._pull(serving, peer, block)
        except TimeoutError:
            error = kind = "timeout"
        except KvasirError as refusal:
            if refusal.reason in _OF_BUSY_PEERS:
                return Check(outcome=Check.OUTCOME_BUSY, error=f"{peer.name}: {refusal.message}")
            if refusal.reason is Reason.UNSUPPORTED:
                return Check(outcome=Check.OUTCOME_UNSUPPORTED, error=f"{peer.name}: no canaries")
            error, kind = refusal.message, refusal.reason.value
        self._host.metrics.transfers.labels("canary", kind or "ok").inc()
        if error == "stale_peer":
            return Check(outcome=Check.OUTCOME_BUSY, error=f"{peer.name} has restarted")
        if error:
            where = f"{peer.name} ({peer.host}:{peer.data_port})"
            return Check(outcome=Check.OUTCOME_FAILED, error=f"no canary from {where}: {error}")
        return Check(outcome=Check.OUTCOME_CROSSED)

    async def _pull(self, serving: Serving, peer: common_pb2.PeerAddress, block: int) -> str:
        """Pulls the peer's canary into `block`; why it did not arrive, or "".

        Raises:
            KvasirError: the peer lends none.
        """
        session_id = secrets.randbits(63) | 1
        request = worker_pb2.LendCanaryRequest(session_id=session_id)
        call = self._host.peers.worker(peer).LendCanary(request, timeout=HOLD_TIMEOUT_S)
        try:
            lent = await _next(call)
            if lent is None:
                return "ended_early"
            pull = serving.puller.session(
                peer,
                session_id=session_id,
                blocks=[block],
                timeout_ms=int(CHECK_TIMEOUT_S * 1000),
                exact=True,
            )
            try:
                pulled = await pull.finish(timeout_s=CHECK_TIMEOUT_S)
            finally:
                await pull.stop()
            self._host.metrics.kv_bytes.labels("canary").inc(pulled.bytes_moved)
            if pulled.error or not pulled.num_leading:
                return pulled.error or "incomplete"
            data = serving.pool.data[block]
            if not np.array_equal(data, _repeated(lent.pattern, data.size)):
                return "bad_canary"
            await _ended(call)
            return ""
        finally:
            call.cancel()


@asynccontextmanager
async def reserved_block(serving: Serving) -> AsyncIterator[int]:
    """A block of KV memory that belongs to no prompt.

    Raises:
        KvasirError: BUSY: there is none within RESERVE_TIMEOUT_S.
    """
    request = EngineRequest(
        request_id=f"canary-{secrets.token_hex(8)}",
        prompt=(0,),
        sampling=Sampling(max_tokens=1),
        tenant_salt=_SALT,
    )
    try:
        async with asyncio.timeout(RESERVE_TIMEOUT_S):
            reservation = await serving.engine.reserve(request)
    except TimeoutError:
        raise KvasirError(Reason.BUSY, "no memory for a canary now") from None
    try:
        yield reservation.blocks[0]
    finally:
        await serving.engine.release(request.request_id)


@asynccontextmanager
async def _session(pool: BlockPool, session_id: int, block: int) -> AsyncIterator[None]:
    """A session of one whole block; after it nobody reads the block any more."""
    try:
        pool.open_session(session_id)
    except ValueError:
        message = "session_id is in use"
        raise KvasirError(Reason.INVALID_REQUEST, message, param="session_id") from None
    try:
        pool.extend_session(session_id, [block])
        pool.finish_session(session_id)
        yield
    finally:
        if not pool.session_pulled(session_id):
            pool.abort_session(session_id)
        while not pool.close_session(session_id):  # noqa: ASYNC110
            await asyncio.sleep(CLOSE_POLL_MS / 1000)


async def _is_pulled(pool: BlockPool, session_id: int) -> bool:
    until_s = time.monotonic() + HOLD_TIMEOUT_S
    while not pool.session_pulled(session_id):
        if time.monotonic() > until_s:
            return False
        await asyncio.sleep(PULLED_POLL_S)
    return True


def _fill(pool: BlockPool, block: int, pattern: bytes) -> None:
    """Repeats a pattern in a block and makes it whole for pullers."""
    pool.data[block] = _repeated(pattern, pool.data[block].size)
    pool.ready[block] = pool.num_layers


def _repeated(pattern: bytes, size: int) -> NDArray[np.uint8]:
    return np.resize(np.frombuffer(pattern, np.uint8), size)


async def _next(call: LendCall) -> worker_pb2.LendCanaryUpdate | None:
    """The call's next update; None: it has ended.

    Raises:
        KvasirError: the peer's own error, or that it cannot be reached.
    """
    try:
        update = await call.read()
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error
    return update if isinstance(update, worker_pb2.LendCanaryUpdate) else None


async def _ended(call: LendCall) -> None:
    """Waits for the end of the call: the peer then knows that its canary has arrived."""
    with suppress(KvasirError, TimeoutError):
        async with asyncio.timeout(LAST_WORD_S):
            await _next(call)
