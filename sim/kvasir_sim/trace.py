"""Request traces: what came when, how long it was, and which prefix blocks it shares."""

from collections.abc import Sequence
from dataclasses import dataclass

BLOCK_TOKENS = 512
"""Tokens that one of Mooncake's hash ids stands for."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. `names` are those of its prefix blocks, the last one perhaps in part."""

    arrival_ms: float
    input_tokens: int
    output_tokens: int
    names: tuple[bytes, ...]
    ttft_slo_ms: int = 0
    """0: that of the run."""

    session: str = ""
    """Requests of one conversation or agent; empty: none."""

    tenant: str = ""
    priority: int = 0
    """Greater is more important."""


def at_rate(requests: Sequence[TraceRequest], rate_rps: float) -> list[float]:
    """Arrival times in ms, from 0, with the intervals scaled to a mean rate."""
    first_ms = requests[0].arrival_ms
    span_ms = requests[-1].arrival_ms - first_ms
    wanted_ms = (len(requests) - 1) * 1_000 / rate_rps
    scale = wanted_ms / span_ms if span_ms else 0.0
    return [(request.arrival_ms - first_ms) * scale for request in requests]
