"""What a plan looks at, and what it is.

A pool's workers serve in its own role; `lent` of them serve in the other one, without a restart.
Rates are per second, times in milliseconds, money in hundredths of a currency unit per hour.
"""

import enum
from dataclasses import dataclass, field


class Role(enum.StrEnum):
    """What a worker does."""

    PREFILL = "prefill"
    DECODE = "decode"

    @property
    def other(self) -> "Role":
        """The role that a flip leads to."""
        return Role.DECODE if self is Role.PREFILL else Role.PREFILL


@dataclass(frozen=True, slots=True)
class Speed:
    """The measured profile of one worker. A decode step over b requests takes base + b * slope."""

    prefill_us_per_token: float
    decode_base_ms: float
    decode_ms_per_request: float
    kv_tokens: int  # tokens whose KV the worker's memory holds


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """One pool of equal workers, as it is and as far as it may go."""

    name: str
    role: Role
    speed: Speed
    replicas: int
    lent: int = 0
    replicas_min: int = 1
    replicas_max: int = 100
    hourly_cents: int = 0
    watts: int = 0
    accelerators: int = 0

    def serving(self, role: Role) -> int:
        """Workers that serve in `role`."""
        return self.replicas - self.lent if role is self.role else self.lent


@dataclass(frozen=True, slots=True)
class Demand:
    """A load. `uncached` is what of a prompt must be computed, `prompt` what must be held."""

    requests_per_s: float = 0.0
    uncached_tokens: float = 0.0  # mean
    uncached_cv2: float = 0.0  # squared coefficient of variation
    prompt_tokens: float = 0.0  # mean
    output_tokens: float = 0.0  # mean
    dispersion: float = 1.0  # variance over mean of arrival counts; 1: Poisson
    queued_tokens: float = 0.0  # prompt tokens that already wait and must be caught up with

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens to compute."""
        return self.requests_per_s * self.uncached_tokens

    @property
    def decode_tokens_per_s(self) -> float:
        """Output tokens to produce."""
        return self.requests_per_s * self.output_tokens


@dataclass(frozen=True, slots=True)
class Load:
    """The demand on each role: they may stem from different moments of a window."""

    prefill: Demand
    decode: Demand

    def of(self, role: Role) -> Demand:
        """The demand on one role."""
        return self.prefill if role is Role.PREFILL else self.decode


@dataclass(frozen=True, slots=True)
class Slo:
    """Which share of requests must meet which times."""

    ttft_ms: float
    tpot_ms: float
    attainment: float = 0.95


@dataclass(frozen=True, slots=True)
class Limits:
    """What a plan may not exceed. None: no limit."""

    prefill_percent_min: int = 0  # of all serving workers
    prefill_percent_max: int = 100
    replicas: int | None = None
    accelerators: int | None = None
    hourly_cents: int | None = None
    watts: int | None = None


@dataclass(frozen=True, slots=True)
class Pace:
    """How eagerly plans change."""

    headroom: float = 0.15  # spare capacity over the present load
    hysteresis: float = 0.10  # and this much more before anything is given up
    shrink_dwell_ms: int = 300_000  # since the last change of any replicas
    flip_dwell_ms: int = 60_000  # since the last role flip
    flips_allowed: bool = True


@dataclass(frozen=True, slots=True)
class Memory:
    """When plans last changed something; kept in the status. None: never."""

    scaled_ms: int | None = None
    flipped_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Observed:
    """How requests fare at present. None: nothing was observed."""

    attainment: float | None = None
    queue_age_ms: float = 0.0
    hit_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Inputs:
    """All that a plan depends on, the time aside."""

    pools: tuple[PoolFacts, ...]
    now: Load
    kept: Load | None  # the most of the keep window; None: not yet a whole window, never shrink
    slo: Slo
    limits: Limits = Limits()
    pace: Pace = Pace()
    memory: Memory = Memory()
    observed: Observed = Observed()


class PlanReason(enum.StrEnum):
    """Why a plan is as it is."""

    STEADY = "Steady"  # the present fleet is right
    GROWING = "Growing"  # more workers are needed
    FLIPPING = "Flipping"  # the same workers in other roles suffice
    SHRINKING = "Shrinking"  # fewer or cheaper workers suffice
    HOLDING = "Holding"  # fewer would do, but something speaks against it now
    LIMITED = "Limited"  # a limit forbids what the SLO needs


@dataclass(frozen=True, slots=True)
class PoolTarget:
    """What a plan wants of one pool."""

    name: str
    replicas: int
    lent: int


@dataclass(frozen=True, slots=True)
class Rejection:
    """Something that the plan would have wanted, and why it is not so."""

    what: str
    why: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a fleet would do under a load."""

    ttft_ms: float | None  # at the SLO's attainment; None: it falls behind without end
    tpot_ms: float | None
    prefill_utilisation: float
    decode_utilisation: float
    attainment: float  # share of requests that meet the TTFT objective
    hourly_cents: int
    watts: int
    accelerators: int


@dataclass(frozen=True, slots=True)
class Term:
    """Workers of one pool that its role's load would need if they served it alone."""

    pool: str
    role: Role
    workers: float
    load: str  # "now" or "kept"


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """One plan, to be carried out as a whole."""

    reason: PlanReason
    message: str
    targets: tuple[PoolTarget, ...]
    memory: Memory
    predicted: Prediction  # of the targets
    present: Prediction  # of the fleet as it is
    terms: tuple[Term, ...] = ()
    rejected: tuple[Rejection, ...] = field(default=())
