"""Kvasir's own policy: the production core, fed as the live router feeds it.

Nothing of a decision is repeated here. `kvasir` calls `pick` with the view that a router would
have: the reports that came through, its own ledger and its own hotness tree.
"""

from collections.abc import Iterator, Mapping, Sequence

from kvasir_router.core.choose import Rejected, pick
from kvasir_router.core.fleet import FleetView, Policy, Request, WorkerState
from kvasir_router.core.keys import KeyTree
from kvasir_router.core.ledger import Ledger
from kvasir_router.core.ring import RingPair

from kvasir_sim.policy import Action, Refuse, RoutingPolicy, Send
from kvasir_sim.settings import SimSettings
from kvasir_sim.trace import BLOCK_TOKENS, TraceRequest
from kvasir_sim.view import ReplicaView
from kvasir_sim.worker import Job

DECODE = WorkerState("decode", can_prefill=False, can_decode=True, blocks_total=2**40)
PATIENCE_MS = 600_000
"""A request waits this long before it is refused."""


class _States(Mapping[str, WorkerState]):
    """Workers' states, made when asked for: a decision looks at few of them."""

    def __init__(self, view: ReplicaView) -> None:
        self.now_ms = 0.0
        self._view = view

    def __getitem__(self, name: str) -> WorkerState:
        if name == DECODE.name:
            return DECODE
        return WorkerState(
            name,
            can_prefill=True,
            can_decode=False,
            prefill_tokens_queued=self._view.pending_tokens(name, self.now_ms),
            prefill_us_per_token=self._view.us_per_token(name),
        )

    def __iter__(self) -> Iterator[str]:
        return iter((DECODE.name, *self._view.members))

    def __len__(self) -> int:
        return 1 + len(self._view.members)


class KvasirPolicy(RoutingPolicy):
    """The production core."""

    def __init__(self, view: ReplicaView, settings: SimSettings, replica: int) -> None:
        super().__init__(view, settings, replica)
        self._keys, self._states = KeyTree(), _States(view)
        self._policy = Policy(
            local_prefill_tokens_max=0, reuse_us_per_token=settings.reuse_us_per_token
        )
        self._fleet = self._see()

    def arrived(self, job: Job, now_ms: float) -> Sequence[Action]:
        """As the router does: count the key, then pick."""
        self._keys.observe(
            job.request.names, num_workers=len(self.view.members), now_ms=int(now_ms)
        )
        self._states.now_ms = now_ms
        decision = pick(self._fleet, self._describe(job.index, job.request), now_ms=int(now_ms))
        if isinstance(decision, Rejected):
            return (Refuse(job),)
        return (Send(job, decision.computes),)

    def members(self, now_ms: float) -> Sequence[Action]:
        """New rings."""
        self._fleet = self._see()
        return ()

    def _see(self) -> FleetView:
        return FleetView(
            self._states,
            RingPair.build(self.view.members),
            self.view.blocks,
            self._keys,
            Ledger(),
            self._policy,
            block_tokens=BLOCK_TOKENS,
        )

    def _describe(self, index: int, request: TraceRequest) -> Request:
        return Request(
            request_id=f"{self.settings.seed}/{index}",
            num_tokens=request.input_tokens,
            names=request.names,
            short_key=b"\0" * 16,
            max_tokens=request.output_tokens,
            ttft_slo_ms=request.ttft_slo_ms or self.settings.slo_ttft_ms,
            timeout_ms=PATIENCE_MS,
        )
