"""Computes a request on this worker's engine, after fetching from the KV tier what is worth it.

Decides, before a prompt is computed, whether its missing blocks are fetched or computed: whichever
takes less time by the rates measured so far (kvasir_kvstore/core/fetch.py); a fetch that turns out
to be slower is stopped. Fetching is an optimisation: whatever it does not bring is computed, and a
request never fails for it.
"""

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from kvasir_kvstore.client import KvTier, Wanted
from kvasir_kvstore.core.block import BLOCK_TOKENS
from kvasir_kvstore.core.fetch import FetchPlan, FetchWatch
from kvasir_proto.errors import KvasirError, Reason

from kvasir_engine.core.types import EngineRequest, Reservation, TokenEvent
from kvasir_engine.worker.admission import Turn
from kvasir_engine.worker.chunk_reuse import ChunkReuse
from kvasir_engine.worker.chunks import Chunks
from kvasir_engine.worker.host import Host
from kvasir_engine.worker.trace import Trace

log = logging.getLogger(__name__)


class Compute:
    """Prompts computed here: of own requests, and of hand-offs to decode workers."""

    def __init__(self, host: Host, chunk_reuse: ChunkReuse) -> None:
        self._host = host
        self._chunk_reuse = chunk_reuse

    async def events(
        self,
        request: EngineRequest,
        *,
        turn: Turn,
        trace: Trace,
        chunks: Chunks | None = None,
    ) -> AsyncGenerator[TokenEvent, None]:
        """The engine's events for this request, whose turn it is; `chunks` of it are reused.

        Raises:
            KvasirError: the engine refuses or ends it.
        """
        engine = self._host.served().engine
        # 1. Blend chunks, or fetch if that is faster.
        if chunks is not None:
            filled = await self._chunk_reuse.filled(
                request, chunks, computed=self.events, turn=turn, trace=trace
            )
        else:
            filled = await self._fetched(request, trace)
        # 2. Compute the rest.
        if filled is None:
            events = engine.generate(request)
        else:
            events = engine.activate(request.request_id, computed_tokens=filled[1])
        turn.entered()
        async with aclosing(events):
            is_first = True
            async for event in events:
                if is_first and event.timing is not None:
                    trace.prefilled_here(event.timing, self._host.metrics, waited_ms=turn.waited_ms)
                    turn.computed()
                is_first = False
                yield event

    async def _fetched(
        self, request: EngineRequest, trace: Trace
    ) -> tuple[Reservation, int] | None:
        """Blocks, and how many leading tokens have their KV; None: nothing was worth fetching."""
        tier = self._host.served().tier
        if tier is None:
            return None
        names, num_held = self._wanted(request)
        rates = self._host.fetch_rates
        plan = rates.plan(
            num_blocks=len(names) - num_held, compute_ms_per_block=self._compute_ms_per_block()
        )
        if plan is None:
            tier.note(Wanted.DECLINED, len(names) - num_held)
            self._learn_path(tier, names, num_held)
            return None
        engine = self._host.served().engine
        try:
            reservation = await engine.reserve(request)
        except KvasirError as error:
            if error.reason not in (Reason.BUSY, Reason.OVERLOADED):
                raise
            tier.note(Wanted.NO_MEMORY, len(names) - num_held)
            return None  # no memory now: wait for it in the engine's queue
        rates.num_running += 1
        try:
            num_fetched = await self._fetch(tier, names, reservation, plan=plan, trace=trace)
        except BaseException:
            await engine.release(request.request_id)
            raise
        finally:
            rates.num_running -= 1
        return reservation, reservation.tokens_cached + num_fetched * BLOCK_TOKENS

    async def _fetch(
        self,
        tier: KvTier,
        names: list[bytes],
        reservation: Reservation,
        *,
        plan: FetchPlan,
        trace: Trace,
    ) -> int:
        """Fetches the blocks that follow the cached ones; returns how many came."""
        skip = reservation.num_blocks_cached
        missing, blocks = names[skip:], list(reservation.blocks[skip : len(names)])
        if not missing:
            return 0
        started_s = time.monotonic()
        watch = FetchWatch(plan)

        def elapsed_ms() -> float:
            return (time.monotonic() - started_s) * 1000

        result = await tier.locate_and_fetch(
            missing,
            blocks,
            timeout_ms=self._host.settings.fetch_timeout_ms,
            chain_head=names[0],
            goes_on=lambda num_arrived: watch.goes_on(
                elapsed_ms=elapsed_ms(), num_arrived=num_arrived
            ),
        )
        num_fetched = result.num_fetched_leading
        if num_fetched or result.problem == "slow":
            self._host.fetch_rates.fetched(
                locate_ms=result.locate_ms,
                transfer_ms=elapsed_ms() - result.locate_ms,
                num_arrived=max(num_fetched, watch.num_arrived),
            )
        trace.tokens_cached_fetched = num_fetched * BLOCK_TOKENS
        trace.kv_bytes_moved += result.bytes_moved
        self._host.metrics.kv_bytes.labels("fetch").inc(result.bytes_moved)
        self._host.metrics.transfers.labels("fetch", result.problem or "ok").inc()
        if result.problem:
            log.warning("fetching KV blocks: %s; computing them", result.problem)
            self._learn_path(tier, names, skip)
        return num_fetched

    def _learn_path(self, tier: KvTier, names: list[bytes], num_held: int) -> None:
        """Has the path probed beside computing, if no request has shown what it takes."""
        rates = self._host.fetch_rates
        if len(names) > num_held and rates.path.wants_probe:
            tier.probe(names[num_held:], names[0], rates.probed)

    def _wanted(self, request: EngineRequest) -> tuple[list[bytes], int]:
        """Names of the blocks a prompt starts with, and how many of them are here (a hint).

        Not the block of the last token: that one is computed, for its logits.
        """
        tokens = [*request.prompt, *request.resume_tokens]
        names = self._host.served().names(tokens[:-1], tenant_salt=request.tenant_salt)
        return names, self._host.hub.num_leading_held(names)

    def _compute_ms_per_block(self) -> float:
        load = self._host.served().engine.load()
        return load.prefill_us_per_token * BLOCK_TOKENS / 1000
