"""A worker's profile from what workers report while they serve."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

SPREAD_MIN = 0.25  # variance of the batch from which on a slope can be told from noise
SLOPE_UNKNOWN = 0.02  # of a step's time, per request, until then
BASE_MIN = 0.1  # of the mean step: a steep line through noise must not leave nothing


@dataclass(frozen=True, slots=True)
class StepSample:
    """A worker's decode step over so many requests."""

    requests: int
    step_ms: float


def decode_profile(samples: Sequence[StepSample]) -> tuple[float, float] | None:
    """(base, per request) in ms of a decode step, by least squares; None: nothing measured."""
    if not samples:
        return None
    count = len(samples)
    requests = sum(sample.requests for sample in samples) / count
    step_ms = sum(sample.step_ms for sample in samples) / count
    spread = sum((sample.requests - requests) ** 2 for sample in samples) / count
    joint = sum((s.requests - requests) * (s.step_ms - step_ms) for s in samples) / count
    slope = max(joint / spread, 0.0) if spread >= SPREAD_MIN else SLOPE_UNKNOWN * step_ms
    base = max(step_ms - slope * requests, BASE_MIN * step_ms)
    return base, slope


def typical(values: Sequence[float]) -> float:
    """The median of what was measured; 0: nothing was."""
    measured = [value for value in values if value > 0]
    return median(measured) if measured else 0.0
