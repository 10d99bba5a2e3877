"""How fast steps run: exponentially weighted, for load figures and retry hints."""

from kvasir_engine.core.decisions import Step

WEIGHT = 0.2
"""Of the newest step: a change of load shows within some ten steps."""
DECODE_TOKENS_MAX = 1
"""A slice of more tokens is prefill."""


class Pace:
    """Measured speed of one engine; 0 where nothing was measured yet."""

    def __init__(self) -> None:
        self.prefill_us_per_token = 0.0
        self.decode_ms_per_step = 0.0

    def note(self, step: Step, elapsed_ms: float) -> None:
        """A step took this long. One with prefill counts as prefill, by all its tokens."""
        if any(len(part.token_ids) > DECODE_TOKENS_MAX for part in step.slices):
            us_per_token = 1000 * elapsed_ms / step.num_tokens
            self.prefill_us_per_token = _blend(self.prefill_us_per_token, us_per_token)
        else:
            self.decode_ms_per_step = _blend(self.decode_ms_per_step, elapsed_ms)


def _blend(old: float, new: float) -> float:
    return new if old == 0 else (1 - WEIGHT) * old + WEIGHT * new
