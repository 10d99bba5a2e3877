"""Readers of request traces: Mooncake's jsonl, Azure's CSV and BurstGPT's CSV.

The first line tells the format. Lines are read as they are asked for; a malformed one is refused by
its number. Mooncake's `hash_ids` say which blocks of a prompt equal those of another; the CSV
formats do not say, so that their requests share nothing (`kvasir sim generate --lengths` gives them
prefixes). Beyond Mooncake's own keys a line may have `session`, `tenant`, `priority` and
`ttft_slo_ms`, as generated traces do.

Sources: Mooncake, FAST 25 (kvcache-ai/Mooncake, FAST25-release/traces); Azure LLM inference traces
2023 and 2024 (Azure/AzurePublicDataset); BurstGPT (HPMLL/BurstGPT).
"""

import csv
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from kvasir_sim.trace import BLOCK_TOKENS, TraceRequest

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT_COLUMNS = ("Timestamp", "Request tokens", "Response tokens")

Row = dict[str, str]


def load_trace(path: Path, *, max_input: int, count: int) -> list[TraceRequest]:
    """The first `count` requests of a trace with at most `max_input` tokens, in order of arrival.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is malformed, the format is unknown, or nothing is left.
    """
    with path.open(newline="") as lines:
        fitting = (r for r in _requests(path, lines) if 0 < r.input_tokens <= max_input)
        taken = list(itertools.islice(fitting, count))
    if not taken:
        raise ValueError(f"{path} holds no request of up to {max_input} tokens")
    return sorted(taken, key=lambda request: request.arrival_ms)


def _requests(path: Path, lines: Iterator[str]) -> Iterator[TraceRequest]:
    first = next(lines, "")
    if first.lstrip().startswith("{"):
        yield from _mooncake(path, itertools.chain([first], lines))
        return
    columns = next(csv.reader([first]), [])
    rows = csv.DictReader(lines, fieldnames=columns)
    if set(AZURE_COLUMNS) <= set(columns):
        yield from _csv(path, rows, "Azure", _azure_row)
    elif set(BURSTGPT_COLUMNS) <= set(columns):
        yield from _csv(path, rows, "BurstGPT", _burstgpt_row)
    else:
        raise ValueError(f"{path}:1: neither Mooncake's jsonl nor the CSV of Azure or BurstGPT")


def _mooncake(path: Path, lines: Iterator[str]) -> Iterator[TraceRequest]:
    name_of: dict[int, bytes] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            yield TraceRequest(
                float(row["timestamp"]),
                int(row["input_length"]),
                int(row["output_length"]),
                tuple(_name(name_of, block) for block in row["hash_ids"]),
                ttft_slo_ms=int(row.get("ttft_slo_ms", 0)),
                session=str(row.get("session", "")),
                tenant=str(row.get("tenant", "")),
                priority=int(row.get("priority", 0)),
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{path}:{number}: not a request of a Mooncake trace") from error


def _csv(
    path: Path, rows: Iterator[Row], kind: str, read: Callable[[Row], tuple[float, int, int]]
) -> Iterator[TraceRequest]:
    for number, row in enumerate(rows, start=2):
        try:
            arrival_ms, input_tokens, output_tokens = read(row)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a request of {kind}'s CSV") from error
        blocks = range(-(-input_tokens // BLOCK_TOKENS))
        names = tuple(_hash(f"{number}/{block}".encode()) for block in blocks)
        yield TraceRequest(arrival_ms, input_tokens, output_tokens, names)


def _azure_row(row: Row) -> tuple[float, int, int]:
    arrival = datetime.fromisoformat(row["TIMESTAMP"])
    return arrival.timestamp() * 1_000, int(row["ContextTokens"]), int(row["GeneratedTokens"])


def _burstgpt_row(row: Row) -> tuple[float, int, int]:
    arrival_ms = float(row["Timestamp"]) * 1_000
    return arrival_ms, int(row["Request tokens"]), int(row["Response tokens"])


def _name(name_of: dict[int, bytes], block: int) -> bytes:
    name = name_of.get(block)
    if name is None:
        name = name_of[block] = _hash(int(block).to_bytes(8, "little", signed=True))
    return name


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
