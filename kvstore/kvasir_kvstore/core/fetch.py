"""Fetch or recompute: whether blocks are fetched from the KV tier, and when to stop. Pure.

Two questions, in this order. Before: is the fetch expected to take less time than computing, by
what the path and the engine did lately (`plan_fetch`)? During: is it still (`FetchWatch`)? What has
arrived when it stops is a prefix that need not be computed, so a path that is or becomes slow costs
a request at most `loss_ms_max`, whatever was expected of it: a small share of what its prompt takes
to compute, also for the first fetches over a path. That bound is also what makes it cheap to try a
path again that was slow. A prompt too short to learn a path at that price is computed; the path is
then probed beside it, at no request's cost (`wants_probe`).
"""

from dataclasses import dataclass

LOSS_SHARE_MAX = 0.03
"""Of the time that computing the prompt takes: what a fetch that disappoints may cost."""
GAIN_MIN = 1.1
"""A fetch must be expected to be so much faster: near the break-even there is nothing to win."""
FIRST_LOSS_MS_MIN = 8.0
"""A bound below this is over before a path that nobody knows could show anything."""
LATENCY_SPREAD = 2.0
"""A path that answers this much later than usual may still be as fast as ever."""
RETRY_EVERY = 32
"""A path that is not worth it is tried again this often."""
_WEIGHT = 0.3
"""Of the newest measurement in a running mean."""


@dataclass(frozen=True, slots=True)
class PathRates:
    """What fetches over a path took lately."""

    latency_ms: float = 0.0
    """Until the blocks were found."""
    ms_per_block: float = 0.0
    """Of one fetch that has the path for itself; 0: not known."""
    was_in_vain: bool = False
    """It is not known though a fetch was tried: it had to end before a block was here."""

    @property
    def wants_probe(self) -> bool:
        """A fetch that no request waits for would tell something."""
        return not self.ms_per_block

    def after(
        self, *, latency_ms: float, transfer_ms: float, num_arrived: float, num_fetches: int
    ) -> "PathRates":
        """With one more fetch, during which `num_fetches` shared the path.

        One that was stopped before anything arrived shows only that a block takes longer; of a path
        that is not known it shows nothing, since getting ready may have taken that time.
        """
        ms_per_block = transfer_ms / max(num_arrived, 1.0) / max(num_fetches, 1)
        if num_arrived < 1:
            if not self.ms_per_block:
                return PathRates(was_in_vain=True)
            ms_per_block = max(ms_per_block, self.ms_per_block)
        if not self.ms_per_block:
            return PathRates(latency_ms, max(ms_per_block, 1e-6))
        return PathRates(
            _blend(self.latency_ms, latency_ms), _blend(self.ms_per_block, ms_per_block)
        )


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """A fetch that is worth trying."""

    loss_ms_max: float
    """It is stopped once it has cost so much more than stopping earlier would have."""
    ms_per_block_computed: float


def plan_fetch(
    *,
    num_blocks: int,
    path: PathRates,
    num_fetches: int,
    compute_ms_per_block: float,
    is_retry: bool = False,
) -> FetchPlan | None:
    """How to fetch `num_blocks` instead of computing them; None: compute them.

    Args:
        num_blocks: of the prompt that are not here.
        num_fetches: that share the path now.
        compute_ms_per_block: 0: not known, so that there is no bound; computing tells it.
        is_retry: try though it is not expected to be worth it.
    """
    if num_blocks == 0 or not compute_ms_per_block:
        return None
    compute_ms = num_blocks * compute_ms_per_block
    loss_ms_max = LOSS_SHARE_MAX * compute_ms
    if not path.ms_per_block:
        is_worth_it = loss_ms_max >= FIRST_LOSS_MS_MIN and (is_retry or not path.was_in_vain)
        return FetchPlan(loss_ms_max, compute_ms_per_block) if is_worth_it else None
    fetch_ms = path.latency_ms + num_blocks * path.ms_per_block * (num_fetches + 1)
    if fetch_ms * GAIN_MIN < compute_ms:
        patience_ms = LATENCY_SPREAD * (path.latency_ms + path.ms_per_block * (num_fetches + 1))
        return FetchPlan(max(loss_ms_max, patience_ms), compute_ms_per_block)
    return FetchPlan(loss_ms_max, compute_ms_per_block) if is_retry else None


@dataclass(slots=True)
class FetchWatch:
    """One fetch in progress: whether it is still worth it."""

    plan: FetchPlan
    num_arrived: float = 0.0
    """Blocks; a block of which half is here counts half."""
    gain_ms_max: float = 0.0

    def goes_on(self, *, elapsed_ms: float, num_arrived: float) -> bool:
        """False: what it has cost since it was worth most exceeds the plan's bound."""
        self.num_arrived = num_arrived
        gain_ms = num_arrived * self.plan.ms_per_block_computed - elapsed_ms
        self.gain_ms_max = max(self.gain_ms_max, gain_ms)
        return self.gain_ms_max - gain_ms <= self.plan.loss_ms_max


def _blend(old: float, new: float) -> float:
    return old + _WEIGHT * (new - old)
