"""Kvasir's own policy: the production core, fed as the live router feeds it.

Nothing of a decision is repeated here. `kvasir` calls `pick` with the view that a router would
have: the reports that came through, its own ledger and its own hotness tree. On a tick it calls
`rebalance` with the requests that wait, and passes its extended keys on to the other replicas.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvasir_router.core.choose import Rejected, pick
from kvasir_router.core.fleet import FleetView, Policy, Request, WorkerState
from kvasir_router.core.keys import KeyLimits, KeyTree
from kvasir_router.core.ledger import Ledger
from kvasir_router.core.rebalance import MOVES_MAX, Queued, hand_back, rebalance

from kvasir_sim.policy import Action, Recall, Refuse, RoutingPolicy, Send, Why
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

    def __init__(
        self, known: ReplicaView, policy: Policy, *, decode_blocks: int, replica: int
    ) -> None:
        super().__init__(
            prefix=known.blocks,
            keys=KeyTree(
                KeyLimits(start_blocks=KEY_TOKENS // BLOCK_TOKENS), replica=b"%d" % replica
            ),
            ledger=Ledger(),
            policy=policy,
            block_tokens=BLOCK_TOKENS,
        )
        self.now_ms = 0.0
        self._known, self._decode_blocks = known, decode_blocks
        self.put(DECODE)

    def follow_decode(self, now_ms: float) -> None:
        """Takes decode workers as they report; the one that takes whatever comes goes."""
        self.remove(DECODE.name)
        for name, report in self._known.decode.items():
            state = WorkerState(
                name,
                can_prefill=False,
                can_decode=True,
                num_running=report.num_running,
                blocks_total=self._decode_blocks,
                blocks_free=report.tokens_free // BLOCK_TOKENS,
                decode_ms_per_step=report.ms_per_step,
            )
            self.ledger.reported(name, now_ms=int(now_ms))
            self.put(state)

    def queued_tokens(self, worker: str) -> int:
        """Read when asked for: a decision looks at few workers."""
        if not self.workers[worker].can_prefill:
            return 0
        return self._known.pending_tokens(worker, self.now_ms)

    def follow_members(self, now_ms: float) -> None:
        """Makes the rings those of the members."""
        for gone in [name for name, state in self.workers.items() if state.can_prefill]:
            if gone not in self._known.members:
                self.remove(gone)
        for name in self._known.members:
            if name not in self.workers:
                us = self._known.us_per_token(name)
                state = WorkerState(
                    name, can_prefill=True, can_decode=False, prefill_us_per_token=us
                )
                self.put(state, now_ms=int(now_ms))


@dataclass(slots=True)
class _Open:
    """A request that has no first token yet."""

    job: Job
    exclude: frozenset[str] = frozenset()
    """Workers that gave it back."""

    num_handed_back: int = 0
    is_recalled: bool = False
    """Each moves at most once."""


class KvasirPolicy(RoutingPolicy):
    """The production core."""

    discipline = "deadline"
    tick_ms = 250.0
    """As the live router's. There, news of keys are told as soon."""

    def __init__(self, view: ReplicaView, settings: SimSettings, replica: int) -> None:
        super().__init__(view, settings, replica)
        policy = Policy(local_prefill_tokens_max=0, reuse_us_per_token=settings.reuse_us_per_token)
        self._fleet = _Seen(
            view,
            policy,
            decode_blocks=settings.decode_cache_tokens // BLOCK_TOKENS,
            replica=replica,
        )
        self._fleet.follow_members(0.0)
        self._open: dict[str, _Open] = {}
        self._waiting: dict[str, Queued] = {}
        """Those that may move, the longest known first."""
        self._peers: list[KvasirPolicy] = []
        self._told_version = 0

    def meet(self, peers: Sequence[RoutingPolicy]) -> None:
        """Extended keys are exchanged with them."""
        self._peers = [peer for peer in peers if isinstance(peer, KvasirPolicy)]

    def arrived(self, job: Job, now_ms: float) -> Sequence[Action]:
        """As the router does: count the key, then pick."""
        self._fleet.keys.observe(
            job.request.names, num_workers=len(self.view.members), now_ms=int(now_ms)
        )
        return self._route(_Open(job), now_ms)

    def returned(self, job: Job, worker: str, why: Why, now_ms: float) -> Sequence[Action]:
        """To another worker."""
        known = self._open[self._id(job)]
        if why is Why.BUSY:
            known.num_handed_back += 1
            return self._route(known, now_ms, refused_by=worker)
        known.exclude |= {worker}
        return self._route(known, now_ms)

    def refused(self, job: Job, worker: str, now_ms: float) -> Sequence[Action]:
        """It goes nowhere else."""
        self._forget(self._id(job))
        self._fleet.ledger.closed(job.decode)
        return ()

    def decode_reported(self, now_ms: float) -> None:
        """As load reports reach a router."""
        self._fleet.follow_decode(now_ms)

    def ended(self, job: Job, now_ms: float) -> None:
        """Its decode worker has one fewer."""
        self._fleet.ledger.closed(job.decode)
        self._fleet.output.observe(job.request.output_tokens)

    def first_token(self, job: Job, worker: str, now_ms: float) -> Sequence[Action]:
        """It waits no more."""
        self._forget(self._id(job))
        return ()

    def tick(self, now_ms: float) -> Sequence[Action]:
        """Tells what keys are new, and asks hot workers for what should wait elsewhere."""
        self._tell_keys(now_ms)
        self._fleet.now_ms = now_ms
        moves = rebalance(self._fleet, self._waiting.values(), now_ms=int(now_ms))
        for move in moves:
            self._open[move.request_id].is_recalled = True
            del self._waiting[move.request_id]
        return [Recall(self._open[move.request_id].job, move.source) for move in moves]

    def members(self, now_ms: float) -> Sequence[Action]:
        """New rings."""
        self._fleet.follow_members(now_ms)
        return ()

    def _tell_keys(self, now_ms: float) -> None:
        keys = self._fleet.keys
        if keys.shared_version != self._told_version:
            self._told_version = keys.shared_version
            for peer in self._peers:
                peer._fleet.keys.merge(keys.shared(), now_ms=int(now_ms))

    def _route(
        self, known: _Open, now_ms: float, *, refused_by: str | None = None
    ) -> Sequence[Action]:
        self._fleet.now_ms = now_ms
        request = self._describe(known, now_ms)
        if refused_by is None:
            decision = pick(self._fleet, request, now_ms=int(now_ms))
        else:
            known.exclude |= {refused_by}
            decision = hand_back(self._fleet, request, refused_by=refused_by, now_ms=int(now_ms))
        request_id = request.request_id
        self._waiting.pop(request_id, None)
        if known.job.decode:
            self._fleet.ledger.closed(known.job.decode)
        if isinstance(decision, Rejected):
            self._forget(request_id)
            return (Refuse(known.job),)
        self._open[request_id] = known
        if not known.is_recalled:
            self._waiting[request_id] = Queued(request, decision.computes, int(now_ms))
        self._fleet.ledger.opened(decision.decode)
        may_move = known.num_handed_back < MOVES_MAX
        return (Send(known.job, decision.computes, may_move=may_move, decode=decision.decode),)

    def _forget(self, request_id: str) -> None:
        self._open.pop(request_id, None)
        self._waiting.pop(request_id, None)

    def _id(self, job: Job) -> str:
        return f"{self.settings.seed}/{job.index}"

    def _describe(self, known: _Open, now_ms: float) -> Request:
        job, request = known.job, known.job.request
        return Request(
            request_id=self._id(job),
            num_tokens=request.input_tokens,
            names=request.names,
            short_key=b"\0" * 16,
            max_tokens=request.output_tokens,
            tpot_slo_ms=self.settings.slo_tpot_ms if self.settings.decode_workers else 0,
            ttft_slo_ms=request.ttft_slo_ms or self.settings.slo_ttft_ms,
            timeout_ms=PATIENCE_MS,
            exclude=known.exclude,
            waited_ms=int(now_ms - job.arrival_ms),
        )
