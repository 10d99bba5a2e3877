"""A day of requests: three kinds of use with rhythms of their own, and bursts.

Chat follows the daylight, questions over documents the office hours (long prompts, short answers),
writing the evening (short prompts, long answers). Every hour or so one of them bursts to a multiple
of its rate for some minutes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
STEP_S = 10
BURSTS_PER_HOUR = 1.2
BURST_FACTOR = (1.6, 3.0)
BURST_S = (90, 480)


@dataclass(frozen=True, slots=True)
class Use:
    """One kind of use: when, and how long its prompts and outputs are (mean, log-normal sigma)."""

    share: float  # of the day's requests
    peak_hour: float
    width_hours: float
    floor: float  # rate at the quietest hour over that of the peak
    prompt: tuple[float, float]
    output: tuple[float, float]


USES = (
    Use(0.55, 15.0, 5.0, 0.15, (1_500.0, 0.9), (220.0, 0.7)),
    Use(0.25, 11.0, 2.5, 0.03, (5_000.0, 0.5), (120.0, 0.6)),
    Use(0.20, 20.5, 2.0, 0.05, (500.0, 0.8), (700.0, 0.5)),
)
PROMPT_MAX, OUTPUT_MAX = 8_000, 4_000


@dataclass(frozen=True, slots=True)
class Day:
    """Requests in order of arrival."""

    arrivals_s: Floats
    prompts: Floats
    outputs: Floats
    duration_s: int


def make_day(*, hours: float, rate_rps: float, seed: int) -> Day:
    """A trace from midnight on; the same seed gives the same one."""
    source = np.random.default_rng(seed)
    duration_s = int(hours * 3600)
    parts = [_use_of_day(use, duration_s, rate_rps, source) for use in USES]
    arrivals, prompts, outputs = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(arrivals, kind="stable")
    return Day(arrivals[order], prompts[order], outputs[order], duration_s)


def _use_of_day(
    use: Use, duration_s: int, rate_rps: float, source: np.random.Generator
) -> tuple[Floats, Floats, Floats]:
    rates = use.share * rate_rps * _rhythm(use, duration_s) * _bursts(duration_s, source)
    counts = source.poisson(rates * STEP_S)
    starts = np.repeat(np.arange(len(counts)) * float(STEP_S), counts)
    arrivals = starts + source.uniform(0, STEP_S, len(starts))
    return (
        arrivals,
        _lengths(use.prompt, len(arrivals), PROMPT_MAX, source),
        _lengths(use.output, len(arrivals), OUTPUT_MAX, source),
    )


def _rhythm(use: Use, duration_s: int) -> Floats:
    """Rate over the day's mean, per step."""

    def shape(hours: Floats) -> Floats:
        apart = np.abs((hours - use.peak_hour + 12) % 24 - 12)
        bell: Floats = use.floor + (1 - use.floor) * np.exp(-0.5 * (apart / use.width_hours) ** 2)
        return bell

    hours = np.arange(0, duration_s, STEP_S) / 3600
    return shape(hours) / float(shape(np.arange(0, 24, 0.05)).mean())


def _bursts(duration_s: int, source: np.random.Generator) -> Floats:
    """Factor of the rate, per step."""
    factors = np.ones(len(range(0, duration_s, STEP_S)))
    for _ in range(int(source.poisson(BURSTS_PER_HOUR * duration_s / 3600 / len(USES)))):
        begin = int(source.integers(0, len(factors)))
        length = int(source.integers(*BURST_S) / STEP_S)
        factors[begin : begin + length] *= source.uniform(*BURST_FACTOR)
    return factors


def _lengths(
    shape: tuple[float, float], count: int, most: int, source: np.random.Generator
) -> Floats:
    mean, sigma = shape
    drawn = source.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(np.round(drawn), 1, most)
