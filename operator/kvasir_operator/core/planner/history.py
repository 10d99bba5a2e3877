"""From telemetry to loads: what is asked at present, and the most that was asked lately.

A history holds the samples of one keep window. The present load takes its rate from the last
minute, and as much more as the rate has grown against the minutes before, because new workers take
a while to start; lengths of prompts and outputs vary more and are averaged over five minutes.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from kvasir_operator.core.planner.facts import Demand, Load, Observed

RATE_MS = 60_000
SHAPE_MS = 300_000
DISPERSION_MAX = 4.0  # growth within the window looks like burstiness
SAMPLES_MAX = 4_096


@dataclass(frozen=True, slots=True)
class Sample:
    """What happened between two looks at the telemetry; sums over requests."""

    start_ms: int
    end_ms: int
    arrivals: int = 0
    measured: int = 0  # requests whose lengths are in the sums below
    uncached_tokens: float = 0.0
    uncached_tokens_squared: float = 0.0
    prompt_tokens: float = 0.0
    output_tokens: float = 0.0
    judged: int = 0  # requests of which it is known whether they met the SLO
    attained: int = 0
    queued_tokens: float = 0.0  # at the end
    queue_age_ms: float = 0.0  # at the end

    @property
    def span_ms(self) -> int:
        """Length of the interval."""
        return self.end_ms - self.start_ms


SUMS = tuple(field.name for field in fields(Sample) if field.name not in ("start_ms", "end_ms"))
LATEST = ("queued_tokens", "queue_age_ms")


class History:
    """Samples in order of time, each with the load that it made the present one."""

    def __init__(self, *, keep_ms: int) -> None:
        self._keep_ms = keep_ms
        self._samples: deque[Sample] = deque(maxlen=SAMPLES_MAX)
        self._loads: deque[tuple[int, Load]] = deque(maxlen=SAMPLES_MAX)
        self._began_ms: int | None = None

    def add(self, sample: Sample) -> None:
        """The next sample; it begins where the last one ended, or later."""
        assert sample.span_ms > 0, sample
        if self._began_ms is None:
            self._began_ms = sample.start_ms
        self._samples.append(sample)
        self._loads.append((sample.end_ms, self._load()))
        limit_ms = sample.end_ms - max(self._keep_ms, 2 * SHAPE_MS)
        while self._samples[0].end_ms <= limit_ms:
            self._samples.popleft()
        while self._loads[0][0] <= sample.end_ms - self._keep_ms:
            self._loads.popleft()

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been measured: no load is known, not even that there is none."""
        return not self._samples

    def now(self) -> Load:
        """The present load."""
        return self._loads[-1][1]

    def kept(self) -> Load | None:
        """Per role, the largest load of the keep window; None: the window is not yet full."""
        assert self._began_ms is not None
        if self._samples[-1].end_ms - self._began_ms < self._keep_ms:
            return None
        loads = [load for _, load in self._loads]
        prefill = max((load.prefill for load in loads), key=lambda d: d.prefill_tokens_per_s)
        decode = max((load.decode for load in loads), key=lambda d: d.decode_tokens_per_s)
        return Load(replace(prefill, queued_tokens=0.0), decode)

    def observed(self) -> Observed:
        """How the requests of the last five minutes fared."""
        recent = self._since(SHAPE_MS)
        judged = sum(sample.judged for sample in recent)
        prompt = sum(sample.prompt_tokens for sample in recent)
        uncached = sum(sample.uncached_tokens for sample in recent)
        return Observed(
            attainment=sum(sample.attained for sample in recent) / judged if judged else None,
            queue_age_ms=self._samples[-1].queue_age_ms,
            hit_rate=1 - uncached / prompt if prompt else None,
        )

    def _since(self, span_ms: int) -> list[Sample]:
        limit_ms = self._samples[-1].end_ms - span_ms
        return [sample for sample in self._samples if sample.end_ms > limit_ms]

    def _load(self) -> Load:
        shape, recent = self._since(SHAPE_MS), self._since(RATE_MS)
        total = _total(shape)
        count = max(total.measured, 1)
        rate = _rate(recent)
        earlier = _rate(shape[: -len(recent)] or recent)
        mean = total.uncached_tokens / count
        variance = max(total.uncached_tokens_squared / count - mean**2, 0.0)
        demand = Demand(
            requests_per_s=rate + max(rate - earlier, 0.0) / 2,
            uncached_tokens=mean,
            uncached_cv2=variance / mean**2 if mean else 0.0,
            prompt_tokens=total.prompt_tokens / count,
            output_tokens=total.output_tokens / count,
            dispersion=_dispersion(shape),
            queued_tokens=self._samples[-1].queued_tokens,
        )
        return Load(demand, demand)


def _total(samples: Sequence[Sample]) -> Sample:
    sums = {name: sum(getattr(sample, name) for sample in samples) for name in SUMS}
    last = {name: getattr(samples[-1], name) for name in LATEST}
    return Sample(samples[0].start_ms, samples[-1].end_ms, **{**sums, **last})


def _rate(samples: Sequence[Sample]) -> float:
    span_ms = sum(sample.span_ms for sample in samples)
    return 1000 * sum(sample.arrivals for sample in samples) / span_ms


def _dispersion(samples: Sequence[Sample]) -> float:
    """Variance over mean of the arrivals per sample, of samples of one length; 1 if unknown."""
    mean = sum(sample.arrivals for sample in samples) / len(samples)
    if len(samples) < 4 or mean == 0:
        return 1.0
    variance = sum((sample.arrivals - mean) ** 2 for sample in samples) / (len(samples) - 1)
    return min(max(variance / mean, 1.0), DISPERSION_MAX)
