"""What experience adds to estimates: how wrong a worker's TTFT was, how long outputs are.

The estimate of TTFT is built from what a worker measures of itself. What that leaves out (its order
of service, its network, its neighbours) shows in the first tokens: per worker one factor on the
estimate follows the ratio of actual to uncalibrated time, in logarithms. Robust: a step is bounded,
so that one outlier moves little; the factor is bounded, so that no history blinds.

Invariant: what was not observed changes nothing; equal observations give equal factors.
"""

import math

GAIN = 0.1
"""Share of an observed deviation that the factor takes over."""

STEP_MAX = 0.05
"""Largest change of the factor per observation, as a logarithm: 5 %."""

FACTOR_MAX = 4.0
"""Factors stay between its inverse and it: beyond that the worker's own figures are wrong."""

FLOOR_MS = 20.0
"""Added to both times: below it, ratios are noise of the network and of timers."""

OUTPUT_TOKENS_UNKNOWN = 256
OUTPUT_SHARE = 0.75
"""Outputs up to the expected length: memory is asked for three of four outputs whole."""


class Calibration:
    """Factors and errors, per worker."""

    def __init__(self) -> None:
        self._factor: dict[str, float] = {}
        self._error: dict[str, float] = {}

    def factor(self, worker: str) -> float:
        """What an estimate for `worker` is to be multiplied with."""
        return self._factor.get(worker, 1.0)

    def error(self, worker: str) -> float:
        """Typical size of ln(actual / predicted) at `worker` of late; 0 before any observation."""
        return self._error.get(worker, 0.0)

    def observe(self, worker: str, *, uncalibrated_ms: float, actual_ms: float) -> None:
        """A first token came `actual_ms` after the decision that had estimated another time."""
        ratio = math.log((actual_ms + FLOOR_MS) / (uncalibrated_ms + FLOOR_MS))
        old = math.log(self.factor(worker))
        step = max(-STEP_MAX, min(STEP_MAX, GAIN * (ratio - old)))
        bound = math.log(FACTOR_MAX)
        self._factor[worker] = math.exp(max(-bound, min(bound, old + step)))
        error = self.error(worker)
        self._error[worker] = error + GAIN * (abs(ratio - old) - error)

    def forget(self, worker: str) -> None:
        """`worker` has left the fleet."""
        self._factor.pop(worker, None)
        self._error.pop(worker, None)


class OutputLength:
    """The length that three of four outputs do not exceed, followed step by step."""

    def __init__(self) -> None:
        self._log_tokens = math.log(OUTPUT_TOKENS_UNKNOWN)
        self.tokens = OUTPUT_TOKENS_UNKNOWN
        """Output tokens to expect of a request."""

    def observe(self, tokens: int) -> None:
        """An output ended by itself after so many tokens."""
        is_longer = tokens > math.exp(self._log_tokens)
        step = STEP_MAX * (OUTPUT_SHARE if is_longer else OUTPUT_SHARE - 1)
        self._log_tokens = max(0.0, self._log_tokens + step)
        self.tokens = round(math.exp(self._log_tokens))
