"""Kvasir's own policy: the production core, fed as the live router feeds it.

Nothing of a decision is repeated here. `kvasir` calls `pick` with the view that a router would
have: the reports that came through, its own ledger and its own hotness tree.
"""

from collections.abc import Sequence

from kvasir_router.core.choose import Rejected, Route, excluding, pick
from kvasir_router.core.fleet import FleetView, Policy, Request, WorkerState
from kvasir_router.core.keys import KeyLimits, KeyTree
from kvasir_router.core.ledger import Ledger
from kvasir_router.core.rebalance import MOVES_MAX, hand_back

from kvasir_sim.policy import Action, Refuse, RoutingPolicy, Send, Why
from kvasir_sim.settings import SimSettings
from kvasir_sim.trace import BLOCK_TOKENS
from kvasir_sim.view import ReplicaView
from kvasir_sim.worker import Job

DECODE = WorkerState("decode", can_prefill=False, can_decode=True, blocks_total=2**40)
KEY_TOKENS = 1_024
"""Prompts at least this long begin with a key of this length, as in DualMap."""

PATIENCE_MS = 600_000
"""A request waits this long before it is refused."""


class _Seen(FleetView):
    """A router's view whose queues are those that the simulated replica knows."""

    def __init__(self, known: ReplicaView, policy: Policy) -> None:
        super().__init__(
            prefix=known.blocks,
            keys=KeyTree(KeyLimits(start_blocks=KEY_TOKENS // BLOCK_TOKENS)),
            ledger=Ledger(),
            policy=policy,
            block_tokens=BLOCK_TOKENS,
        )
        self.now_ms = 0.0
        self._known = known
        self.put(DECODE)

    def queued_tokens(self, worker: str) -> int:
        """Read when asked for: a decision looks at few workers."""
        if worker == DECODE.name:
            return 0
        return self._known.pending_tokens(worker, self.now_ms)

    def follow_members(self, now_ms: float) -> None:
        """Makes the rings those of the members."""
        for gone in self.workers.keys() - {DECODE.name, *self._known.members}:
            self.remove(gone)
        for name in self._known.members:
            if name not in self.workers:
                us = self._known.us_per_token(name)
                state = WorkerState(
                    name, can_prefill=True, can_decode=False, prefill_us_per_token=us
                )
                self.put(state, now_ms=int(now_ms))


class KvasirPolicy(RoutingPolicy):
    """The production core."""

    discipline = "deadline"

    def __init__(self, view: ReplicaView, settings: SimSettings, replica: int) -> None:
        super().__init__(view, settings, replica)
        policy = Policy(local_prefill_tokens_max=0, reuse_us_per_token=settings.reuse_us_per_token)
        self._fleet = _Seen(view, policy)
        self._fleet.follow_members(0.0)
        self._gave_up: dict[int, frozenset[str]] = {}
        """Workers that gave a request back, by its number."""

    def arrived(self, job: Job, now_ms: float) -> Sequence[Action]:
        """As the router does: count the key, then pick."""
        self._fleet.keys.observe(
            job.request.names, num_workers=len(self.view.members), now_ms=int(now_ms)
        )
        self._fleet.now_ms = now_ms
        return self._answer(job, pick(self._fleet, self._describe(job, now_ms), now_ms=int(now_ms)))

    def returned(self, job: Job, worker: str, why: Why, now_ms: float) -> Sequence[Action]:
        """To another worker."""
        self._fleet.now_ms = now_ms
        request = self._describe(job, now_ms)
        self._gave_up[job.index] = request.exclude | {worker}
        if why is Why.FAILED:
            decision = pick(self._fleet, excluding(request, worker), now_ms=int(now_ms))
        else:
            decision = hand_back(self._fleet, request, refused_by=worker, now_ms=int(now_ms))
        return self._answer(job, decision)

    def members(self, now_ms: float) -> Sequence[Action]:
        """New rings."""
        self._fleet.follow_members(now_ms)
        return ()

    def _answer(self, job: Job, decision: Route | Rejected) -> Sequence[Action]:
        if isinstance(decision, Rejected):
            self._gave_up.pop(job.index, None)
            return (Refuse(job),)
        num_moves = len(self._gave_up.get(job.index, ()))
        return (Send(job, decision.computes, may_move=num_moves < MOVES_MAX),)

    def _describe(self, job: Job, now_ms: float) -> Request:
        request = job.request
        return Request(
            request_id=f"{self.settings.seed}/{job.index}",
            num_tokens=request.input_tokens,
            names=request.names,
            short_key=b"\0" * 16,
            max_tokens=request.output_tokens,
            ttft_slo_ms=request.ttft_slo_ms or self.settings.slo_ttft_ms,
            timeout_ms=PATIENCE_MS,
            exclude=self._gave_up.get(job.index, frozenset()),
            waited_ms=int(now_ms - job.arrival_ms),
        )
