"""Drain: no new requests, the running ones end, and what the cache holds moves to the KV tier.

Decides when a worker may be removed. Bounded: after its time the requests that are left end with
reason `draining` (the router continues them elsewhere) and blocks not yet offered are given up.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator

from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import worker_pb2

from kvasir_engine.worker.host import Host
from kvasir_engine.worker.offers import Offers

log = logging.getLogger(__name__)

PROGRESS_S = 0.1
END_S = 5.0
"""Requests that were told to end have this long to free what they hold."""


class Drain:
    """Drains one worker. Once begun it is not taken back; a caller may leave and come again."""

    def __init__(self, host: Host, offers: Offers) -> None:
        self._host = host
        self._offers = offers

    async def run(self, *, timeout_ms: int) -> AsyncGenerator[worker_pb2.DrainProgress, None]:
        """Progress every PROGRESS_S, the last one with `drained` set."""
        state = self._host.state
        until_s = time.monotonic() + (timeout_ms or self._host.settings.drain_timeout_ms) / 1000
        # 1. Nothing new.
        if not state.draining:
            state.draining = True
            log.info("draining: %d requests in flight", state.num_in_flight)
            self._host.hub.description_changed()
        # 2. The last requests run; meanwhile what the cache holds is offered.
        while time.monotonic() < until_s:
            num_blocks_left = await self._offers.advance_held()
            if not state.num_in_flight and not num_blocks_left:
                break
            yield self._progress(num_blocks_left)
            await asyncio.sleep(PROGRESS_S)
        # 3. Time is over for whatever is left.
        await self._end_requests()
        num_blocks_left = await self._offers.advance_held()
        log.info(
            "drained: %d requests and %d blocks are left", state.num_in_flight, num_blocks_left
        )
        yield self._progress(num_blocks_left, drained=True)

    async def _end_requests(self) -> None:
        state = self._host.state
        if not state.num_in_flight:
            return
        num = state.end_all(KvasirError(Reason.DRAINING, "the worker has drained"))
        log.warning("drain: ended %d requests that took too long", num)
        until_s = time.monotonic() + END_S
        while state.num_in_flight and time.monotonic() < until_s:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def _progress(self, num_blocks_left: int, *, drained: bool = False) -> worker_pb2.DrainProgress:
        return worker_pb2.DrainProgress(
            num_requests_left=self._host.state.num_in_flight,
            num_blocks_left=num_blocks_left,
            drained=drained,
        )
