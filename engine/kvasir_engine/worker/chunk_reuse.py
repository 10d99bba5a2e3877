"""Reuse of chunks: documents that a prompt holds, whose KV was computed without their neighbours.

A chunk's KV is that of the prompt which is the chunk alone, so it is cached, named, offered and
fetched like every other prefix, and serves at any place of any prompt. A prompt with chunks is
blended of them (`kvasir_engine.blend`). Decides what is blended and what is computed: the full
blocks of a chunk are blended; what stands between, and what could not be had, is computed.

Invariants: a request never fails because a chunk could not be had; nothing is held while it waits
for memory; blocks are borrowed no longer than they are read.
"""

import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing

import numpy as np
from kvasir_kvstore.core.block import BLOCK_TOKENS
from kvasir_proto.errors import KvasirError, Reason

from kvasir_engine.blend import Blend, Part, run_blend
from kvasir_engine.core.types import EngineRequest, Reservation, Sampling, TokenEvent
from kvasir_engine.worker.admission import Turn
from kvasir_engine.worker.chunks import Chunks, whole_blocks
from kvasir_engine.worker.host import Host
from kvasir_engine.worker.offers import Offers
from kvasir_engine.worker.trace import Trace

log = logging.getLogger(__name__)

BUSY = (Reason.BUSY, Reason.OVERLOADED)
Events = Callable[..., AsyncGenerator[TokenEvent, None]]
"""`Compute.events`."""


class ChunkReuse:
    """Blends prompts on this worker's engine."""

    def __init__(self, host: Host, offers: Offers) -> None:
        self._host = host
        self._offers = offers

    async def filled(
        self,
        request: EngineRequest,
        chunks: Chunks,
        *,
        computed: Events,
        turn: Turn,
        trace: Trace,
    ) -> tuple[Reservation, int] | None:
        """Blocks of the request, and how many leading tokens have their KV; None: no memory now.

        Raises:
            KvasirError: the engine refuses or ends the request.
        """
        started_s = time.monotonic()
        engine = self._host.served().engine
        names = self._names(request.prompt[: chunks.end], request.tenant_salt)
        if not all(engine.holds(names)):
            # 1. Every chunk's KV, without holding anything meanwhile.
            for alone in self._alone(request, chunks):
                own = Trace(prompt_tokens=len(alone.prompt))
                if not await _is_computed(computed(alone, turn=turn.part(), trace=own)):
                    break
                trace.chunk_computed(own)
                await self._offers.add(alone.prompt, tenant_salt=alone.tenant_salt)
        # 2. Memory.
        try:
            reservation = await engine.reserve(request)
        except KvasirError as error:
            if error.reason not in BUSY:
                raise
            return None  # the engine computes it all when its turn comes
        # 3. KV.
        try:
            num_filled = await self._blend(request, chunks, reservation, trace)
        except BaseException:
            await engine.release(request.request_id)
            raise
        trace.blend_ms = (time.monotonic() - started_s) * 1000
        return reservation, num_filled

    def _alone(self, request: EngineRequest, chunks: Chunks) -> Iterator[EngineRequest]:
        """The chunks that are not held, each as a prompt of its own."""
        for index, (start, end) in enumerate(chunks.sources):
            token_ids = request.prompt[start : start + whole_blocks(end - start)]
            names = self._names(token_ids, chunks.tenant_salt)
            if not all(self._host.served().engine.holds(names)):
                yield EngineRequest(
                    request_id=f"{request.request_id}/{index}",
                    prompt=token_ids,
                    sampling=Sampling(max_tokens=1, ignore_eos=True),
                    tenant_salt=chunks.tenant_salt,
                    deadline_ms=request.deadline_ms,
                )

    async def _blend(
        self, request: EngineRequest, chunks: Chunks, reservation: Reservation, trace: Trace
    ) -> int:
        """Fills the blocks up to the end of the last chunk; leading tokens that have KV then."""
        start, end = reservation.tokens_cached, chunks.end
        if start >= end:
            return start
        serving = self._host.served()
        borrowed: list[tuple[int, ...]] = []

        def borrow(token_ids: Sequence[int]) -> tuple[int, ...]:
            blocks = serving.engine.borrow(self._names(token_ids, chunks.tenant_salt))
            borrowed.append(blocks)
            return blocks

        try:
            blend = Blend(
                token_ids=np.array(request.prompt[:end], np.int32),
                blocks=np.array(reservation.blocks[: end // BLOCK_TOKENS], np.int32),
                start=start,
                parts=_parts(request.prompt, chunks, start=start, borrow=borrow),
                recompute_permille=chunks.recompute_permille,
            )
            pieces = run_blend(
                serving.model.native,
                serving.model.config,
                blend,
                tokens_max=self._host.settings.max_batch_tokens,
            )
            if not await serving.engine.run_between_steps(pieces):
                log.warning("blending %d chunks failed; computing the prompt", len(chunks.spans))
                return start
        finally:
            for blocks in borrowed:
                serving.engine.give_back(blocks)
        trace.blended(blend, self._host.metrics)
        return end

    def _names(self, token_ids: Sequence[int], salt: bytes) -> list[bytes]:
        return self._host.served().names(token_ids, tenant_salt=salt)


async def _is_computed(events: AsyncGenerator[TokenEvent, None]) -> bool:
    """Waits for the end; False: the engine has no room now."""
    try:
        async with aclosing(events):
            async for _ in events:
                pass
    except KvasirError as error:
        if error.reason not in BUSY:
            raise
        return False
    return True


def _parts(
    prompt: Sequence[int],
    chunks: Chunks,
    *,
    start: int,
    borrow: Callable[[Sequence[int]], tuple[int, ...]],
) -> tuple[Part, ...]:
    """What is held of the chunks, and of what stands before them, from `start` on."""
    parts = []
    for first, end in chunks.sources:
        blocks = borrow(prompt[first:end]) if end > start and first < chunks.end else ()
        skipped = max(start - first, 0)
        count = min(len(blocks) * BLOCK_TOKENS, chunks.end - first) - skipped
        if count > 0:
            is_exact = first == 0
            parts.append(Part(first + skipped, count, blocks, skipped, is_exact))
    return tuple(parts)
