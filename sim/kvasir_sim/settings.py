"""Settings of one simulation. Unknown or out of range: it does not run and says which."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

PolicyName = Literal[
    "kvasir",
    "dualmap",
    "round-robin",
    "least-loaded",
    "affinity",
    "min-ttft",
    "preble",
    "chwbl",
    "sglang",
    "dynamo",
    "llm-d",
    "lmetric",
]

CHANGE = re.compile(r"(\d+(?:\.\d+)?):([-+x])(\d+)")


@dataclass(frozen=True, slots=True)
class FleetChange:
    """Workers that join, leave or fail together."""

    at_s: float
    kind: str
    """+: join; -: leave once what they have accepted is done; x: fail, with all that they hold."""

    num_workers: int


class SimSettings(BaseModel):
    """A trace, a fleet and a policy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trace: Path
    """Mooncake's jsonl, Azure's CSV or BurstGPT's CSV; only the first says what prompts share."""

    policy: PolicyName = "kvasir"
    """How requests are routed."""

    workers: int = Field(default=8, ge=1, le=4_096)
    """Prefill workers."""

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
    """Names the requests, by which equal candidates are told apart, and spreads them over the
    replicas."""

    replicas: int = Field(default=1, ge=1, le=256)
    """Router replicas; each request comes to one of them at random."""

    sync_ms: float = Field(default=1_000.0, ge=0)
    """How often workers report to the replicas; between reports a replica knows only what it sent
    itself. 0, or a single replica: everything is known at once."""

    sync_loss: float = Field(default=0.0, ge=0, lt=1)
    """Share of the reports that are lost, each of one worker to one replica."""

    changes: tuple[str, ...] = ()
    """SECONDS:+N workers join, SECONDS:-N leave, SECONDS:xN fail, at this time of the run."""

    slow_workers: int = Field(default=0, ge=0)
    """So many of the workers are slower than the others."""

    slow_factor: float = Field(default=2.0, ge=1)
    """A slow worker takes this many times as long."""

    worker_queue: Literal["fifo", "deadline"] | None = None
    """How workers order what they were given: fifo, or Kvasir's admission queue, which may give a
    request up. Not given: as the policy wants, deadline for kvasir and fifo for the others."""

    kv_node_tokens: int = Field(default=0, ge=0)
    """Tokens held by KV nodes that all workers share; 0: there are none."""

    kv_node_us_per_token: float = Field(default=8.0, ge=0)
    """Time per prompt token fetched from KV nodes, of one fetch that has the path for itself. What
    is faster computed is computed."""

    kv_node_latency_ms: float = Field(default=1.0, ge=0)
    """Time until a fetch begins to bring tokens."""

    decode_workers: int = Field(default=0, ge=0, le=4_096)
    """Workers that decode what the prefill workers hand off. 0: decode takes whatever comes, at
    once, and TPOT is not reported."""

    decode_base_ms: float = Field(default=18.0, gt=0)
    """Time of a decode step, what is in it aside: mostly reading the weights."""

    decode_ms_per_request: float = Field(default=0.2, ge=0)
    """Time that every request adds to a step."""

    decode_us_per_context_token: float = Field(default=0.1, ge=0)
    """Time that every token of context in the batch adds to a step."""

    decode_batch_max: int = Field(default=64, ge=1)
    """Requests that a decode worker runs together; what comes beyond waits there."""

    decode_cache_tokens: int = Field(default=1_198_372, ge=512)
    """KV memory of each decode worker; a request takes its prompt and its whole output."""

    handoff_us_per_token: float = Field(default=10.0, ge=0)
    """Time per prompt token to move its KV from the prefill to the decode worker."""

    slo_tpot_ms: int = Field(default=50, ge=1)
    """A request attains this when its output tokens after the first come at this mean distance, the
    hand-off and waiting for decode included. Counts only with decode workers."""

    @field_validator("changes")
    @classmethod
    def _check_changes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            _parse_change(text)
        return value

    def fleet_changes(self) -> list[FleetChange]:
        """`changes`, in order of time."""
        return sorted(map(_parse_change, self.changes), key=lambda change: change.at_s)


def _parse_change(text: str) -> FleetChange:
    found = CHANGE.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not SECONDS:+N, SECONDS:-N or SECONDS:xN")
    at_s, kind, num_workers = found.groups()
    return FleetChange(float(at_s), kind, int(num_workers))
