"""Settings of one simulation. Unknown or out of range: it does not run and says which."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

PolicyName = Literal["kvasir", "round-robin", "least-loaded"]


class SimSettings(BaseModel):
    """A trace, a fleet and a policy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trace: Path
    """Mooncake's jsonl: timestamp (ms), input_length, output_length, hash_ids."""

    policy: PolicyName = "kvasir"
    """How requests are routed."""

    workers: int = Field(default=8, ge=1, le=4_096)
    """Prefill workers; decode is not modelled and takes whatever comes."""

    rate: float = Field(default=9.0, gt=0)
    """Requests per second; the trace's intervals are scaled to it."""

    slo_ttft_ms: int = Field(default=5_000, ge=1)
    """A request attains its SLO when its first token comes within this time."""

    prefill_us_per_token: float = Field(default=160.0, gt=0)
    """Time to compute a prompt token."""

    reuse_us_per_token: float = Field(default=0.0, ge=0)
    """Time per prompt token found in the worker's cache."""

    cache_tokens: int = Field(default=1_198_372, ge=512)
    """KV memory of each worker."""

    max_input: int = Field(default=20_480, ge=1)
    """Longer requests of the trace are left out."""

    requests: int = Field(default=4_000, ge=1)
    """Requests taken from the trace, warm-up included."""

    warmup: int = Field(default=500, ge=0)
    """First requests, which are served but not counted."""

    seed: int = 1
    """Names the requests, by which equal candidates are told apart."""
