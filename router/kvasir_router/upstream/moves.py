"""Requests without a first token, and their moves away from hot workers.

On a tick the core says which waiting requests should wait at their other candidate; the worker is
asked to hand exactly those back, and does so for those that it has not begun. What comes back takes
the way of any request that a worker hands back. Each request moves at most once.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterator

import grpc.aio

from kvasir_router.core.choose import Route
from kvasir_router.core.fleet import Request
from kvasir_router.core.rebalance import Move, Queued, rebalance
from kvasir_router.membership.fleet import Fleet, now_ms
from kvasir_router.metrics import RouterMetrics

log = logging.getLogger(__name__)

TICK_MS = 250
HAND_BACK_TIMEOUT_S = 1.0


class Moves:
    """One router's waiting requests."""

    def __init__(self, fleet: Fleet, metrics: RouterMetrics) -> None:
        self._fleet, self._metrics = fleet, metrics
        self._queued: dict[str, Queued] = {}
        self._asked: set[str] = set()  # each moves at most once
        self._coming_back: set[str] = set()

    @contextlib.contextmanager
    def waiting(self, request: Request, route: Route) -> Iterator[None]:
        """Until its first token, or the attempt's end, the request may move."""
        key = request.request_id
        if key not in self._asked:
            self._queued[key] = Queued(request, route.computes, now_ms())
        try:
            yield
        finally:
            self._queued.pop(key, None)

    def begun(self, request_id: str) -> None:
        """Its first token came."""
        self._queued.pop(request_id, None)

    def take_moved(self, request_id: str) -> bool:
        """Whether a request that came back did so because this router asked; true once."""
        is_moved = request_id in self._coming_back
        self._coming_back.discard(request_id)
        return is_moved

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self._asked.discard(request_id)
        self._coming_back.discard(request_id)

    async def run(self) -> None:
        """Moves what should move, for ever."""
        while True:
            await asyncio.sleep(TICK_MS / 1_000)
            if self._queued:
                await self._tick()

    async def _tick(self) -> None:
        moves = rebalance(self._fleet.view(), self._queued.values(), now_ms=now_ms())
        by_source: dict[str, list[Move]] = {}
        for move in moves:
            by_source.setdefault(move.source, []).append(move)
        await asyncio.gather(*(self._ask(source, those) for source, those in by_source.items()))

    async def _ask(self, source: str, moves: list[Move]) -> None:
        request_ids = [move.request_id for move in moves if move.request_id in self._queued]
        self._asked.update(request_ids)
        self._coming_back.update(request_ids)
        for request_id in request_ids:
            del self._queued[request_id]
        try:
            num_moved = await self._fleet.hand_back(
                source, request_ids, timeout_s=HAND_BACK_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            log.warning("worker %s was asked to hand requests back: %s", source, error.code().name)
            return
        self._metrics.moves.inc(num_moved)
        log.info("%d of %d requests move away from %s", num_moved, len(request_ids), source)
