"""Settings of a simulated day. Unknown or out of range: it does not run and says which."""

from kvasir_operator.core.planner.facts import Slo, Speed
from pydantic import BaseModel, ConfigDict, Field


class PlanSimSettings(BaseModel):
    """A day of load, the workers, and how fast a fleet can change."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hours: float = Field(default=24.0, ge=0.5, le=168)
    """Length of the trace, which begins at midnight."""

    rate: float = Field(default=4.0, gt=0, le=100)
    """Requests per second, mean over a whole day."""

    slo_ttft_ms: int = Field(default=3_000, ge=1)
    """Time to first token that a request should meet."""

    slo_tpot_ms: int = Field(default=50, ge=1)
    """Time per output token that it should meet, too."""

    slo_attainment: float = Field(default=0.95, gt=0, lt=1)
    """Share of the requests that should meet both."""

    prefill_us_per_token: float = Field(default=300.0, gt=0)
    """Time to compute a prompt token."""

    decode_base_ms: float = Field(default=18.0, gt=0)
    """Time of a decode step, the requests in it aside."""

    decode_ms_per_request: float = Field(default=0.8, ge=0)
    """Time that every request adds to a decode step."""

    kv_tokens: int = Field(default=300_000, ge=1)
    """Tokens whose KV one worker holds."""

    startup_s: int = Field(default=90, ge=0, le=3_600)
    """From the order of a worker to its first request."""

    flip_s: int = Field(default=15, ge=0, le=600)
    """A worker that changes its role serves nobody for this long."""

    drain_s: int = Field(default=30, ge=0, le=600)
    """A worker that is given up is paid for this much longer."""

    seed: int = 1
    """Of the trace."""

    @property
    def slo(self) -> Slo:
        """The objectives as the planner takes them."""
        return Slo(self.slo_ttft_ms, self.slo_tpot_ms, self.slo_attainment)

    @property
    def speed(self) -> Speed:
        """The workers' profile as the planner takes it."""
        return Speed(
            self.prefill_us_per_token,
            self.decode_base_ms,
            self.decode_ms_per_request,
            self.kv_tokens,
        )
