"""How many workers a load needs to stay within its SLO, and what a fleet would achieve.

Prefill is a queue M/G/n: the wait of Allen and Cunneen with Sakasegawa's approximation for n
servers (Sakasegawa 1977; Whitt 1993, section 2), exponential beyond zero. Prompt lengths are
log-normal and enter by QUANTILES equal shares, so that TTFT = wait + own compute is met for a share
of requests, not for a mean. Decode is a set of requests in flight by Little's law, with a normal
margin, bounded by the step time and by KV memory.

Numbers of workers are real here; whole workers are the business of the search.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

from kvasir_operator.core.planner.facts import Demand, Slo, Speed

QUANTILES = 32
CATCH_UP_S = 30.0  # tokens that wait are to be computed within this time
BISECTIONS = 20
SEARCHED_MAX = 1e6  # workers, or milliseconds
NORMAL = NormalDist()
SCORES = tuple(NORMAL.inv_cdf((i + 0.5) / QUANTILES) for i in range(QUANTILES))


@dataclass(frozen=True, slots=True)
class PrefillLoad:
    """The work that reaches prefill: prompts by equal shares of requests, shortest first."""

    requests_per_s: float
    prompts: tuple[float, ...]  # uncached tokens
    dispersion: float

    @property
    def tokens(self) -> float:
        """Mean uncached tokens."""
        return sum(self.prompts) / len(self.prompts)

    @property
    def cv2(self) -> float:
        """Squared coefficient of variation of the lengths."""
        mean = self.tokens
        return sum((p - mean) ** 2 for p in self.prompts) / len(self.prompts) / mean**2

    def from_share(self, first: int) -> "PrefillLoad":
        """Only the prompts from the share with index `first` on."""
        kept = self.prompts[first:]
        share = len(kept) / len(self.prompts)
        return PrefillLoad(self.requests_per_s * share, kept, self.dispersion)


def prefill_load(demand: Demand) -> PrefillLoad:
    """The demand as shares; what waits already counts as additional requests."""
    mean = max(demand.uncached_tokens, 1e-6)
    sigma2 = math.log1p(max(demand.uncached_cv2, 0.0))
    raw = [math.exp(z * math.sqrt(sigma2) - sigma2 / 2) for z in SCORES]
    scale = mean * len(raw) / sum(raw)  # the shares' mean is the demand's, whatever the tail
    catching_up = demand.queued_tokens / CATCH_UP_S / max(mean, 1.0)
    return PrefillLoad(
        requests_per_s=demand.requests_per_s + catching_up,
        prompts=tuple(scale * share for share in raw),
        dispersion=max(demand.dispersion, 1.0),
    )


def num_feasible(load: PrefillLoad, speed: Speed, ttft_ms: float) -> int:
    """Shares whose own compute alone keeps the TTFT objective; a prefix of the shares."""
    us = speed.prefill_us_per_token
    return sum(prompt * us / 1000 <= ttft_ms for prompt in load.prompts)


def ttft_attainment(load: PrefillLoad, speed: Speed, *, workers: float, ttft_ms: float) -> float:
    """Share of requests whose first token comes in time."""
    waits = _waits(load, speed, workers)
    if waits is None:
        return 0.0
    probability, mean_ms = waits
    met = 0.0
    for prompt in load.prompts:
        left_ms = ttft_ms - prompt * speed.prefill_us_per_token / 1000
        if left_ms >= 0:
            met += 1.0 - probability * math.exp(-left_ms / mean_ms) if mean_ms > 0 else 1.0
    return met / len(load.prompts)


def _waits(load: PrefillLoad, speed: Speed, workers: float) -> tuple[float, float] | None:
    """Probability of a wait and its mean when there is one, in ms; None: the queue only grows."""
    service_ms = load.tokens * speed.prefill_us_per_token / 1000
    utilisation = load.requests_per_s * service_ms / 1000 / workers
    if utilisation >= 1:
        return None
    probability = utilisation ** (math.sqrt(2 * (workers + 1)) - 1)
    variability = (load.dispersion + load.cv2) / 2
    return probability, variability * service_ms / (workers * (1 - utilisation))


def prefill_workers(load: PrefillLoad, speed: Speed, slo: Slo) -> float:
    """Workers of this speed that keep the TTFT objective.

    Prompts that no wait would save are left out of the objective: they cost capacity, but no
    number of workers brings them in time.
    """
    if load.requests_per_s == 0:
        return 0.0
    feasible = num_feasible(load, speed, slo.ttft_ms) / len(load.prompts)
    if feasible == 0:
        return math.inf
    goal = slo.attainment if feasible > slo.attainment else slo.attainment * feasible

    def is_enough(workers: float) -> bool:
        return ttft_attainment(load, speed, workers=workers, ttft_ms=slo.ttft_ms) >= goal

    busy = load.requests_per_s * load.tokens * speed.prefill_us_per_token / 1e6
    return _least(is_enough, busy)


def decode_workers(demand: Demand, speed: Speed, slo: Slo) -> float:
    """Workers of this speed that keep the TPOT objective and hold all requests' KV."""
    tokens_per_ms = demand.decode_tokens_per_s / 1000
    if tokens_per_ms == 0:
        return 0.0
    batch = batch_max(demand, speed, slo)
    if batch < 1:
        return math.inf
    margin = NORMAL.inv_cdf(slo.attainment)

    def is_enough(workers: float) -> bool:
        requests = requests_in_flight(demand, speed, workers=workers)
        return requests is not None and requests + margin * math.sqrt(requests) <= batch * workers

    return _least(is_enough, tokens_per_ms * speed.decode_ms_per_request)


def batch_max(demand: Demand, speed: Speed, slo: Slo) -> float:
    """Requests that one worker may decode at a time, by step time and by KV memory."""
    spare_ms = slo.tpot_ms - speed.decode_base_ms
    if spare_ms < 0:
        return 0.0
    by_time = spare_ms / speed.decode_ms_per_request if speed.decode_ms_per_request else math.inf
    by_memory = speed.kv_tokens / max(demand.prompt_tokens + demand.output_tokens, 1.0)
    return min(by_time, by_memory)


def requests_in_flight(demand: Demand, speed: Speed, *, workers: float) -> float | None:
    """Requests being decoded, by Little's law; None: they pile up without end."""
    tokens_per_ms = demand.decode_tokens_per_s / 1000
    pressure = tokens_per_ms * speed.decode_ms_per_request / workers
    return None if pressure >= 1 else tokens_per_ms * speed.decode_base_ms / (1 - pressure)


def tpot_ms(demand: Demand, speed: Speed, *, workers: float) -> float | None:
    """Mean time of a decode step; None: requests pile up without end."""
    requests = requests_in_flight(demand, speed, workers=workers)
    if requests is None:
        return None
    return speed.decode_base_ms + speed.decode_ms_per_request * max(requests / workers, 1.0)


def ttft_ms(load: PrefillLoad, speed: Speed, *, workers: float, share: float) -> float | None:
    """The time within which this share of requests has its first token; None: without end."""
    if _waits(load, speed, workers) is None:
        return None

    def is_enough(limit_ms: float) -> bool:
        return ttft_attainment(load, speed, workers=workers, ttft_ms=limit_ms) >= share

    return _least(is_enough, 0.0)


def _least(is_enough: Callable[[float], bool], low: float) -> float:
    """The least number above `low` that is enough, for a test that stays true; inf: none is."""
    high = max(2 * low, 1.0)
    while not is_enough(high):
        low, high = high, 2 * high
        if high > SEARCHED_MAX:
            return math.inf
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if middle > 0 and is_enough(middle) else (middle, high)
    return high
