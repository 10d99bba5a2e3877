"""Routing policies: Kvasir's own core, and the baselines it is compared with.

A policy sees exact state. `kvasir` calls the production `pick` with the view that the live router
would build; nothing of the decision is repeated here.
"""

import itertools
from collections.abc import Mapping
from typing import Protocol

from kvasir_router.core.choose import Rejected, pick
from kvasir_router.core.fleet import FleetView, Policy, Request, WorkerState
from kvasir_router.core.keys import KeyTree
from kvasir_router.core.ledger import Ledger
from kvasir_router.core.prefix import PrefixView
from kvasir_router.core.ring import RingPair

from kvasir_sim.settings import SimSettings
from kvasir_sim.trace import BLOCK_TOKENS, TraceRequest
from kvasir_sim.worker import SimWorker

DECODE = WorkerState("decode", can_prefill=False, can_decode=True, blocks_total=2**40)
PATIENCE_MS = 600_000
"""A request waits this long before it is refused."""


class RoutingPolicy(Protocol):
    """Chooses a worker for each request."""

    def choose(self, index: int, request: TraceRequest, now_ms: float) -> str | None:
        """The worker's name; None: refused."""

    def stored(self, worker: str, names: tuple[bytes, ...], evicted: list[bytes]) -> None:
        """A worker's cache changed."""


class KvasirPolicy:
    """The production core."""

    def __init__(self, workers: Mapping[str, SimWorker], settings: SimSettings) -> None:
        self._workers, self._settings = workers, settings
        self._rings = RingPair.build(workers)
        blocks = settings.cache_tokens // BLOCK_TOKENS + 1
        self._prefix = PrefixView(blocks_max=2 * blocks * len(workers))
        self._keys, self._ledger = KeyTree(), Ledger()
        self._policy = Policy(
            local_prefill_tokens_max=0, reuse_us_per_token=settings.reuse_us_per_token
        )

    def choose(self, index: int, request: TraceRequest, now_ms: float) -> str | None:
        """As the router does: count the key, then pick."""
        num_workers = len(self._workers)
        self._keys.observe(request.names, num_workers=num_workers, now_ms=int(now_ms))
        decision = pick(self._view(now_ms), self._describe(index, request), now_ms=int(now_ms))
        return None if isinstance(decision, Rejected) else decision.computes

    def stored(self, worker: str, names: tuple[bytes, ...], evicted: list[bytes]) -> None:
        """The worker's event."""
        self._prefix.stored(worker, names)
        self._prefix.removed(worker, evicted)

    def _describe(self, index: int, request: TraceRequest) -> Request:
        return Request(
            request_id=f"{self._settings.seed}/{index}",
            num_tokens=request.input_tokens,
            names=request.names,
            short_key=b"\0" * 16,
            max_tokens=request.output_tokens,
            ttft_slo_ms=self._settings.slo_ttft_ms,
            timeout_ms=PATIENCE_MS,
        )

    def _view(self, now_ms: float) -> FleetView:
        us = self._settings.prefill_us_per_token
        states = {
            name: WorkerState(
                name,
                can_prefill=True,
                can_decode=False,
                prefill_tokens_queued=worker.pending_tokens(now_ms),
                prefill_us_per_token=us,
            )
            for name, worker in self._workers.items()
        }
        return FleetView(
            {**states, DECODE.name: DECODE},
            self._rings,
            self._prefix,
            self._keys,
            self._ledger,
            self._policy,
            block_tokens=BLOCK_TOKENS,
        )


class RoundRobin:
    """One worker after the other."""

    def __init__(self, workers: Mapping[str, SimWorker]) -> None:
        self._next = itertools.cycle(workers)

    def choose(self, index: int, request: TraceRequest, now_ms: float) -> str | None:
        """The next one."""
        return next(self._next)

    def stored(self, worker: str, names: tuple[bytes, ...], evicted: list[bytes]) -> None:
        """Of no interest."""


class LeastLoaded:
    """The worker with the fewest prompt tokens pending, cached ones not counted."""

    def __init__(self, workers: Mapping[str, SimWorker]) -> None:
        self._workers = workers

    def choose(self, index: int, request: TraceRequest, now_ms: float) -> str | None:
        """The least pending; ties go to the first."""
        return min(self._workers, key=lambda name: self._workers[name].pending_tokens(now_ms))

    def stored(self, worker: str, names: tuple[bytes, ...], evicted: list[bytes]) -> None:
        """Of no interest."""


def make_policy(workers: Mapping[str, SimWorker], settings: SimSettings) -> RoutingPolicy:
    """The policy of this name."""
    match settings.policy:
        case "kvasir":
            return KvasirPolicy(workers, settings)
        case "round-robin":
            return RoundRobin(workers)
        case "least-loaded":
            return LeastLoaded(workers)
