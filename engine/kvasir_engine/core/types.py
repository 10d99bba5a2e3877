"""Values that cross the engine's boundary: requests in, token events and load figures out.

All are frozen. Times are monotonic milliseconds of the process; whoever drives the core passes
them in. Texts, addresses and transfers are left to others: the engine knows token ids and blocks.
"""

import enum
from dataclasses import dataclass, field

from kvasir_kvstore.core.block import BLOCK_TOKENS


class FinishReason(enum.StrEnum):
    """Why the output of a served request ended."""

    STOP = "stop"  # the model's end-of-sequence token or one of stop_token_ids: the last token
    LENGTH = "length"  # max_tokens is reached


class Refusal(enum.StrEnum):
    """Why the core ends a request without serving it to its end."""

    INVALID = "invalid"
    NEVER_FITS = "never_fits"
    QUEUE_FULL = "queue_full"
    DUPLICATE = "duplicate"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    FAILED = "failed"


class RefusedError(Exception):
    """The core does not take, or no longer serves, a request."""

    def __init__(
        self,
        refusal: Refusal,
        message: str,
        *,
        param: str | None = None,
        retry_after_ms: int = 0,
    ) -> None:
        super().__init__(message)
        self.refusal = refusal
        self.message = message
        self.param = param
        self.retry_after_ms = retry_after_ms


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens of one request are drawn, and when its output ends.

    The token at absolute position p (prompt included) is drawn from a generator keyed by
    (seed, p). Stop strings are matched on text, see `kvasir_engine.text.OutputText`.
    """

    temperature: float = 0.0
    """0: greedy."""
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 16
    """Counted from the end of the prompt; resume tokens count."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request as the engine takes it."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    tenant_salt: bytes = b""
    deadline_ms: float | None = None
    """Monotonic; None: no deadline. After it the request ends with TIMEOUT."""
    resume_tokens: tuple[int, ...] = ()
    """Tokens that another worker produced already; they count towards max_tokens."""
    prefill_only_session: int | None = None
    """Set: compute the KV for this data-plane session, emit one token, then hold the blocks."""
    skip_blocks: int = 0
    """Leading blocks that the puller of the session has already."""


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """What a request cost so far."""

    queue_ms: float
    """From submission to its first step; for a reservation from activation."""
    prefill_ms: float
    """From its first step to its first token."""
    tokens_cached: int
    """Leading tokens found in this engine's prefix cache."""
    tokens_fetched: int
    """Leading tokens beyond those whose KV came from elsewhere (activation)."""
    tokens_computed: int
    """Prompt and resume tokens that were computed here."""
    num_preemptions: int


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New tokens of one request; several when the consumer is slower than the engine."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    """Set in the last event. STOP: the last token id is the stop token."""
    timing: RequestTiming | None = None
    """Set in the first and in the last event."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """KV memory held for a request that is computed, or filled from elsewhere, later.

    `blocks[i]` holds tokens [i * 32, (i + 1) * 32) of the known tokens (prompt and resume tokens).
    The first `tokens_cached // 32` blocks are shared and must not be written.
    """

    request_id: str
    blocks: tuple[int, ...]
    tokens_cached: int
    names: tuple[bytes, ...]
    """Names of the full blocks of the known tokens, in chain order."""

    @property
    def num_blocks_cached(self) -> int:
        """Leading blocks that are whole already."""
        return self.tokens_cached // BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Bounds of one engine."""

    num_blocks: int
    context_length: int
    """Tokens, prompt and output together."""
    vocab_size: int
    max_batch_tokens: int = 512
    """Tokens computed in one step: bounds the time that running requests wait for a prompt."""
    max_running: int = 64
    """Requests that hold KV memory and are computed, reservations included."""
    max_waiting: int = 256
    """Requests that wait for memory; one more is refused as busy."""
    handoff_hold_ms_max: int = 60_000
    """A puller that has not come by then does not come: its blocks are let go."""

    def __post_init__(self) -> None:
        for name, value in (
            ("num_blocks", self.num_blocks),
            ("context_length", self.context_length),
            ("max_batch_tokens", self.max_batch_tokens),
            ("max_running", self.max_running),
            ("max_waiting", self.max_waiting),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")

    @property
    def kv_tokens_max(self) -> int:
        """Tokens of a request that has all KV memory; the token drawn last needs none."""
        return self.num_blocks * BLOCK_TOKENS + 1

    @property
    def request_tokens_max(self) -> int:
        """Tokens, prompt and output together, of the longest request that can be served."""
        return min(self.context_length, self.kv_tokens_max)

    @property
    def num_running_max(self) -> int:
        """Every running request can have a token in every step."""
        return min(self.max_running, self.max_batch_tokens)


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy an engine is, and how fast."""

    num_waiting: int
    """Requests accepted and not yet prefilled."""
    num_running: int
    """Requests that hold KV memory, reservations and hand-offs included."""
    num_reserved: int
    num_handoffs: int
    """Prefilled requests whose blocks wait to be pulled."""
    prefill_tokens_queued: int
    """Known tokens accepted and not yet computed."""
    blocks_total: int
    blocks_free: int
    """Free or evictable."""
    prefill_us_per_token: float
    """Measured, exponentially weighted; 0: not yet known."""
    decode_ms_per_step: float
    """Measured, exponentially weighted; 0: not yet known."""


@dataclass(frozen=True, slots=True)
class EngineCounters:
    """Totals since the engine started, for metrics."""

    num_steps: int = 0
    tokens_computed: int = 0
    tokens_generated: int = 0
    tokens_cached: int = 0
    num_preemptions: int = 0
    num_step_failures: int = 0
    num_requests_ended: int = 0


@dataclass(frozen=True, slots=True)
class BlockChange:
    """Names of blocks that became, or ceased to be, available in the prefix cache."""

    stored: tuple[bytes, ...]
    removed: tuple[bytes, ...]
    snapshot: bool = False
    """`stored` is all that there is: forget what was known before."""
