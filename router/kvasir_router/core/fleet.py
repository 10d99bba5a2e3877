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

from kvasir_router.core.calibrate import Calibration, OutputLength
from kvasir_router.core.keys import KeyTree
from kvasir_router.core.ledger import Ledger
from kvasir_router.core.order import Order
from kvasir_router.core.prefix import PrefixView
from kvasir_router.core.ring import RingPair

PREFILL_US_PER_TOKEN_UNKNOWN = 1_000.0
"""Assumed while no worker has measured itself yet: a small model on a few CPU cores."""


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

    decode_ms_per_step: float = 0.0
    """Measured: the time per output token of what it decodes now; 0 while unknown."""

    peer_us_per_token: float = 0.0
    """Measured: a prompt token fetched from another worker's cache; 0: it fetches none."""

    store_us_per_token: float = 0.0
    """Measured: a prompt token fetched from a KV node; 0: it fetches none."""


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

    warmup_ms: int = 20_000
    """A worker that joins with an empty cache takes its keys over one by one within this time:
    taking all at once it would compute every prompt whole, and be the slowest of its pairs."""


class FleetView:
    """The fleet, kept up to date by `put` and `remove`. One router replica has one.

    `prefix`, `keys`, `ledger`, `calibration` and `output` are its own: others write to them between
    decisions. `stores` are the holders known to `prefix` that are KV nodes, not workers.
    """

    def __init__(
        self,
        *,
        prefix: PrefixView,
        keys: KeyTree,
        ledger: Ledger,
        policy: Policy | None = None,
        block_tokens: int = BLOCK_TOKENS,
        stores: tuple[str, ...] = (),
    ) -> None:
        self.prefix, self.keys, self.ledger = prefix, keys, ledger
        self.policy = policy or Policy()
        self.block_tokens, self.stores = block_tokens, stores
        self.calibration, self.output = Calibration(), OutputLength()
        self._workers: dict[str, WorkerState] = {}
        self.workers: Mapping[str, WorkerState] = MappingProxyType(self._workers)
        """All workers, by name."""
        self._speeds: dict[str, float] = {}  # of those who have measured it
        self._speeds_sum = 0.0
        self._joined_ms: dict[str, int] = {}  # of those who still warm up, oldest first
        self._rings = RingPair.build(())
        self._rings_stale = False
        self._members: set[str] = set()  # who belongs in the rings
        self._mute: set[str] = set()
        self._by_running = Order()
        self._by_room = Order()
        self._by_size = Order()

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

    def put(self, state: WorkerState, *, now_ms: int = 0) -> None:
        """A worker joined, or told anew how it is."""
        name = state.name
        self._workers[name] = state
        if state.can_prefill != (name in self._members):
            self._change_rings(name, joins=state.can_prefill, now_ms=now_ms)
        if state.can_prefill and not state.transfer_healthy:
            self._mute.add(name)
        else:
            self._mute.discard(name)
        self._note_speed(name, state.prefill_us_per_token)
        if state.can_decode:
            self._order(state)
        else:
            self._unorder(name)

    def remove(self, worker: str) -> None:
        """A worker must get no more requests. What it holds is left to the owner of `prefix`."""
        if self._workers.pop(worker, None) is None:
            return
        if worker in self._members:
            self._change_rings(worker, joins=False, now_ms=0)
        self._mute.discard(worker)
        self._note_speed(worker, 0.0)
        self._unorder(worker)
        self.calibration.forget(worker)

    def _change_rings(self, worker: str, *, joins: bool, now_ms: int) -> None:
        self._rings_stale = True
        if not joins:
            self._members.discard(worker)
            self._joined_ms.pop(worker, None)
            return
        self._members.add(worker)
        if not self.prefix.num_blocks.get(worker):
            self._joined_ms[worker] = now_ms

    def _note_speed(self, worker: str, us_per_token: float) -> None:
        old = self._speeds.pop(worker, 0.0)
        if us_per_token:
            self._speeds[worker] = us_per_token
        self._speeds_sum += us_per_token - old

    @property
    def us_per_token_typical(self) -> float:
        """Assumed of a worker that has not measured itself yet: the mean of those that have."""
        if not self._speeds:
            return PREFILL_US_PER_TOKEN_UNKNOWN
        return self._speeds_sum / len(self._speeds)

    def is_any_warming(self, now_ms: int) -> bool:
        """Whether workers still take over their keys, and enough others stand in for them."""
        joined, oldest_ms = self._joined_ms, now_ms - self.policy.warmup_ms
        while joined and joined[first := next(iter(joined))] <= oldest_ms:
            del joined[first]
        return bool(joined) and 2 * len(joined) < len(self._members)

    def share_taken(self, worker: str, now_ms: int) -> float:
        """Share of its keys, from 0 to 1, that a worker has taken over since it joined."""
        joined_ms = self._joined_ms.get(worker)
        return 1.0 if joined_ms is None else (now_ms - joined_ms) / self.policy.warmup_ms

    def _order(self, state: WorkerState) -> None:
        self._order_by_running(state)
        self._by_room.put(state.name, (-state.blocks_free,))
        self._by_size.put(state.name, (-state.blocks_total,))

    def _order_by_running(self, state: WorkerState) -> None:
        self._by_running.put(state.name, (self.running(state.name), -state.blocks_free))

    def _unorder(self, worker: str) -> None:
        for order in (self._by_running, self._by_room, self._by_size):
            order.discard(worker)

    def queued_tokens(self, worker: str) -> int:
        """Prompt tokens that wait at `worker`: reported, and routed since."""
        return self._workers[worker].prefill_tokens_queued + self.ledger.tokens(worker)

    def wait_ms(self, worker: str) -> float:
        """Time that what waits at `worker` takes, calibrated."""
        us = self._workers[worker].prefill_us_per_token or self.us_per_token_typical
        return self.queued_tokens(worker) * us * self.calibration.factor(worker) / 1_000

    def running(self, worker: str) -> int:
        """Requests at `worker`: as reported, and what this router has begun and ended there since.

        Never less than it has open there itself.
        """
        reported = self._workers[worker].num_running + self.ledger.opened_since_report(worker)
        return max(reported, self.ledger.in_flight(worker))

    @property
    def by_running(self) -> Order:
        """Workers that decode, the least busy first, of equal ones that with most memory."""
        for worker in self.ledger.take_changed():
            state = self._workers.get(worker)
            if state is not None and state.can_decode:
                self._order_by_running(state)
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
class Chunk:
    """A part of a prompt whose KV may be that of the part alone."""

    start: int
    """In the prompt, in tokens."""

    names: tuple[bytes, ...]
    """Of its full blocks, as a prompt of its own."""

    num_again: int
    """Tokens that are computed again in this prompt."""


@dataclass(frozen=True, slots=True)
class Blended:
    """How the KV of a prompt comes about that is blended of chunks."""

    names: tuple[bytes, ...]
    """Under which it lies when it is there."""

    chunks: tuple[Chunk, ...]


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
    tpot_slo_ms: int = 0
    """Per output token; 0: none is asked for."""

    waited_ms: int = 0
    """Since it arrived: what of the time to its first token has passed."""

    timeout_ms: int = 600_000
    exclude: frozenset[str] = frozenset()
    """Workers that have already failed or refused this request."""

    blended: Blended | None = None
    """Chunks may be reused; None: all its KV is exact."""

    @property
    def kv_names(self) -> tuple[bytes, ...]:
        """Under which its KV lies; `names` say of which prompts it is one."""
        return self.blended.names if self.blended else self.names

    def key(self, keys: KeyTree) -> bytes:
        """What the rings are asked with."""
        depth = keys.depth(self.names)
        return self.names[depth - 1] if depth else self.short_key
