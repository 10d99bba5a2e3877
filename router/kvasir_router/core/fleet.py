"""What a decision looks at: the request, the workers as last reported, and what they hold.

A `FleetView` holds only workers that may be given new requests: whoever is unreachable, draining or
of another model is left out by the membership, before the core sees it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvasir_kvstore.core.block import BLOCK_TOKENS

from kvasir_router.core.keys import KeyTree
from kvasir_router.core.ledger import Ledger
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


@dataclass(frozen=True, slots=True)
class FleetView:
    """A snapshot. `prefix`, `keys` and `ledger` are read, never written, by a decision."""

    workers: Mapping[str, WorkerState]
    rings: RingPair
    prefix: PrefixView = field(repr=False)
    keys: KeyTree = field(repr=False)
    ledger: Ledger = field(repr=False)
    policy: Policy = Policy()
    block_tokens: int = BLOCK_TOKENS

    def queued_tokens(self, worker: str) -> int:
        """Prompt tokens that wait at `worker`: reported, and routed since."""
        return self.workers[worker].prefill_tokens_queued + self.ledger.tokens(worker)

    def running(self, worker: str) -> int:
        """Requests at `worker`: as reported, or as this router knows, whichever is more."""
        return max(self.workers[worker].num_running, self.ledger.in_flight(worker))


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
