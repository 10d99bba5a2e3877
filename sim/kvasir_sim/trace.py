"""Request traces: what came when, how long it was, and which prefix blocks it shares."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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


def load_mooncake(path: Path, *, max_input: int, count: int) -> list[TraceRequest]:
    """The first `count` requests of a Mooncake trace with at most `max_input` tokens.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is malformed, or nothing is left.
    """
    with path.open() as lines:
        fitting = (r for r in _parse(path, lines) if r.input_tokens <= max_input)
        taken = list(itertools.islice(fitting, count))
    if not taken:
        raise ValueError(f"{path} holds no request of up to {max_input} tokens")
    return taken


def _parse(path: Path, lines: Iterator[str]) -> Iterator[TraceRequest]:
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            yield TraceRequest(
                float(row["timestamp"]),
                int(row["input_length"]),
                int(row["output_length"]),
                tuple(_name(int(block)) for block in row["hash_ids"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a request of a Mooncake trace") from error


def _name(block: int) -> bytes:
    return hashlib.blake2b(block.to_bytes(8, "little"), digest_size=16).digest()


def at_rate(requests: Sequence[TraceRequest], rate_rps: float) -> list[float]:
    """Arrival times in ms, from 0, with the intervals scaled to a mean rate."""
    first_ms = requests[0].arrival_ms
    span_ms = requests[-1].arrival_ms - first_ms
    wanted_ms = (len(requests) - 1) * 1_000 / rate_rps
    scale = wanted_ms / span_ms if span_ms else 0.0
    return [(request.arrival_ms - first_ms) * scale for request in requests]
