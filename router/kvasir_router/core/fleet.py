"""What a decision looks at: the request, the workers as last reported, and what they hold.

A `FleetView` holds only workers that may be given new requests: whoever is unreachable, draining or
of another model is left out by the membership, before the core sees it.

Invariant: what a decision needs of all workers together (who runs least, who has most memory, who
cannot send KV) is kept up to date by every report, so that a decision never looks at all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from kvasir_kvstore.core.block import BLOCK_TOKENS

from kvasir_router.core.keys import KeyTree
from kvasir_router.core.ledger import Ledger
from kvasir_router.core.order import Order
from kvasir_router.core.prefix import PrefixView
from kvasir_router.core.ring import RingPair

PREFILL_US_PER_TOKEN_UNKNOWN = 1_000.0
"""Assumed of a worker that has not measured itself yet: a small model on a few CPU cores."""


@dataclass(frozen=True, slots=True)
class WorkerState:
    """One worker, as it last described itself."""

    name: str
    can_prefill: bool
    can_decode: bool
    transfer_healthy: bool = True
    num_waiting: int = 0
    num_running: int = 0
    prefill_tokens_queued: int = 0
    blocks_total: int = 0
    blocks_free: int = 0
    prefill_us_per_token: float = 0.0
    """Measured; 0 while unknown."""

    @property
    def us_per_token(self) -> float:
        """Seconds per prompt token, in microseconds, never 0."""
        return self.prefill_us_per_token or PREFILL_US_PER_TOKEN_UNKNOWN


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator of a fleet may choose about routing."""

    local_prefill_tokens_max: int = 64
    """An uncached suffix up to this length is prefilled where its conversation is decoded: moving
    its KV would cost more than computing it. 0: never."""

    reuse_us_per_token: float = 1.0
    """Cost of a prompt token found in the worker's own cache."""

    decode_slack_requests: int = 8
    """A decode worker is preferred for its cache or its nearness only while it runs at most this
    many requests more than the least busy one."""


class FleetView:
    """The fleet, kept up to date by `put` and `remove`. One router replica has one.

    `prefix`, `keys` and `ledger` are its own: others write to them between decisions.
    """

    def __init__(
        self,
        *,
        prefix: PrefixView,
        keys: KeyTree,
        ledger: Ledger,
        policy: Policy | None = None,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        self.prefix, self.keys, self.ledger = prefix, keys, ledger
        self.policy = policy or Policy()
        self.block_tokens = block_tokens
        self._workers: dict[str, WorkerState] = {}
        self._rings = RingPair.build(())
        self._rings_stale = False
        self._members: set[str] = set()  # who belongs in the rings
        self._mute: set[str] = set()
        self._by_running = Order()
        self._by_room = Order()
        self._by_size = Order()

    @property
    def workers(self) -> Mapping[str, WorkerState]:
        """All workers, by name."""
        return MappingProxyType(self._workers)

    def get(self, worker: str) -> WorkerState | None:
        """One worker; None: it is not in the view."""
        return self._workers.get(worker)

    @property
    def rings(self) -> RingPair:
        """The rings of all who prefill; built when first read after a change of members."""
        if self._rings_stale:
            self._rings = self._rings.changed(self._members)
            self._rings_stale = False
        return self._rings

    @property
    def mute(self) -> set[str]:
        """Prefill workers that cannot send KV."""
        return self._mute

    def put(self, state: WorkerState) -> None:
        """A worker joined, or told anew how it is."""
        name = state.name
        self._workers[name] = state
        if state.can_prefill != (name in self._members):
            (self._members.add if state.can_prefill else self._members.discard)(name)
            self._rings_stale = True
        if state.can_prefill and not state.transfer_healthy:
            self._mute.add(name)
        else:
            self._mute.discard(name)
        if state.can_decode:
            self._order(state)
        else:
            self._unorder(name)

    def remove(self, worker: str) -> None:
        """A worker must get no more requests. What it holds is left to the owner of `prefix`."""
        if self._workers.pop(worker, None) is None:
            return
        self._rings_stale |= worker in self._members
        self._members.discard(worker)
        self._mute.discard(worker)
        self._unorder(worker)

    def _order(self, state: WorkerState) -> None:
        self._by_running.put(state.name, (self.running(state.name), -state.blocks_free))
        self._by_room.put(state.name, (-state.blocks_free,))
        self._by_size.put(state.name, (-state.blocks_total,))

    def _unorder(self, worker: str) -> None:
        for order in (self._by_running, self._by_room, self._by_size):
            order.discard(worker)

    def queued_tokens(self, worker: str) -> int:
        """Prompt tokens that wait at `worker`: reported, and routed since."""
        return self._workers[worker].prefill_tokens_queued + self.ledger.tokens(worker)

    def running(self, worker: str) -> int:
        """Requests at `worker`: as reported, or as this router knows, whichever is more."""
        return max(self._workers[worker].num_running, self.ledger.in_flight(worker))

    @property
    def by_running(self) -> Order:
        """Workers that decode, the least busy first, of equal ones that with most memory."""
        for worker in self.ledger.take_changed():
            state = self._workers.get(worker)
            if state is not None and state.can_decode:
                self._order(state)
        return self._by_running

    @property
    def by_room(self) -> Order:
        """Workers that decode, that with most free memory first."""
        return self._by_room

    @property
    def blocks_total_max(self) -> int:
        """Blocks of the largest worker that decodes."""
        key = self._by_size.least_key()
        return int(-key[0]) if key else 0


@dataclass(frozen=True, slots=True)
class Request:
    """What of a request matters to routing."""

    request_id: str
    num_tokens: int
    names: tuple[bytes, ...]
    """Names of the prompt's full blocks."""

    short_key: bytes
    """The key of a prompt that has no full block: a hash of its tokens."""

    max_tokens: int = 256
    ttft_slo_ms: int = 5_000
    timeout_ms: int = 600_000
    exclude: frozenset[str] = frozenset()
    """Workers that have already failed or refused this request."""

    def key(self, keys: KeyTree) -> bytes:
        """What the rings are asked with."""
        depth = keys.depth(self.names)
        return self.names[depth - 1] if depth else self.short_key
