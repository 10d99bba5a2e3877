"""The prefill side of a hand-off: queue a prompt, compute its KV, keep it until it is pulled.

Decides how long finished KV is held. Invariants: a prompt that waits for its turn holds no KV
memory; when the call has ended, for whatever reason (pulled, cancelled, the decode worker died,
nobody came in time), the session is closed and its blocks are free or cached.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import worker_pb2

from kvasir_engine.core.types import EngineRequest
from kvasir_engine.worker import requests
from kvasir_engine.worker.chunks import chunks_of, names_salt
from kvasir_engine.worker.compute import Compute
from kvasir_engine.worker.host import Host
from kvasir_engine.worker.inflight import Scope
from kvasir_engine.worker.offers import Offers
from kvasir_engine.worker.sampling import engine_sampling
from kvasir_engine.worker.state import Work
from kvasir_engine.worker.trace import Trace

log = logging.getLogger(__name__)

HOLD_POLL_S_MIN = 0.002
HOLD_POLL_S_MAX = 0.05

Start = Callable[[], Awaitable[worker_pb2.PrefillStart]]


class Prefiller:
    """Serves requests for KV."""

    def __init__(self, host: Host, compute: Compute, offers: Offers) -> None:
        self._host = host
        self._compute = compute
        self._offers = offers
        self._count = itertools.count(1)

    @asynccontextmanager
    async def opened(
        self, message: worker_pb2.PrefillRequest, start: Start
    ) -> AsyncIterator[AsyncIterator[worker_pb2.PrefillUpdate]]:
        """Admits a request; its updates are accepted, turn, finished; they end when it is pulled.

        After `turn`, `start` is awaited: it returns when the decode worker has memory.

        Raises:
            KvasirError: it is refused, fails, or is ended by its deadline or by a drain.
        """
        async with self._host.in_flight.scope(
            Work.PREFILL, request_id=message.request_id, timeout_ms=message.timeout_ms
        ) as scope:
            if self._host.settings.vllm_url:
                raise KvasirError(Reason.UNSUPPORTED, "vLLM hands no KV off")
            requests.check_prefill(message, self._host.served().limits)
            async with aclosing(self._updates(message, start, scope)) as updates:
                yield updates

    async def _updates(
        self, message: worker_pb2.PrefillRequest, start: Start, scope: Scope
    ) -> AsyncGenerator[worker_pb2.PrefillUpdate, None]:
        engine = self._host.served().engine
        trace = Trace(prompt_tokens=len(message.token_ids))
        # 1. Accepted: it waits for its turn and holds nothing.
        yield worker_pb2.PrefillUpdate(
            accepted=worker_pb2.PrefillAccepted(source=self._host.address)
        )
        self._offers.begun(message)
        asked = self._host.asked(message)
        async with self._host.admission.turn(asked) as turn:
            # 2. Its turn: the decode worker makes room.
            yield worker_pb2.PrefillUpdate(turn=worker_pb2.PrefillTurn())
            skip_blocks = (await start()).skip_blocks
            requests.check_start(skip_blocks, num_tokens=len(message.token_ids))
            request = self._engine_request(message, scope, skip_blocks=skip_blocks)
            # 3. Computed: KV flows meanwhile; the first token follows its last layer.
            try:
                computing = self._compute.events(
                    request, turn=turn, trace=trace, chunks=chunks_of(message)
                )
                async with aclosing(computing) as events:
                    event = await anext(events)
                    yield _finished(event.token_ids[0], trace)
                    # 4. Held, until the decode worker has it or its time is over.
                    scope.outcome = await self._hold(message.session_id, scope)
            finally:
                if self._host.served().pool.session_pulled(message.session_id):
                    self._host.health.has_crossed = True
                await engine.finish_handoff(request.request_id)
        await self._offers.ended(message)

    async def _hold(self, session_id: int, scope: Scope) -> str:
        pool = self._host.served().pool
        hold_ms = min(self._host.settings.handoff_hold_ms, scope.left_ms())
        until_s = time.monotonic() + hold_ms / 1000
        poll_s = HOLD_POLL_S_MIN
        while not pool.session_pulled(session_id):
            if time.monotonic() > until_s:
                log.warning("KV held for a decode worker was not pulled in %d ms", hold_ms)
                return "not_pulled"
            await asyncio.sleep(poll_s)
            poll_s = min(poll_s * 1.5, HOLD_POLL_S_MAX)
        return "pulled"

    def _engine_request(
        self, message: worker_pb2.PrefillRequest, scope: Scope, *, skip_blocks: int
    ) -> EngineRequest:
        return EngineRequest(
            request_id=f"{message.request_id}#prefill{next(self._count)}",
            prompt=tuple(message.token_ids),
            sampling=engine_sampling(message.sampling),
            tenant_salt=names_salt(message),
            deadline_ms=scope.deadline_ms,
            prefill_only_session=message.session_id,
            skip_blocks=skip_blocks,
        )


def _finished(first_token_id: int, trace: Trace) -> worker_pb2.PrefillUpdate:
    return worker_pb2.PrefillUpdate(
        finished=worker_pb2.PrefillFinished(
            first_token_id=first_token_id,
            tokens_cached_local=trace.tokens_cached_local,
            tokens_cached_fetched=trace.tokens_cached_fetched,
            tokens_computed=trace.tokens_computed,
            kv_bytes_fetched=trace.kv_bytes_moved,
            queue_ms=trace.queue_ms,
            prefill_ms=trace.prefill_ms,
            tokens_from_chunks=trace.tokens_from_chunks,
            tokens_recomputed=trace.tokens_recomputed,
        )
    )
