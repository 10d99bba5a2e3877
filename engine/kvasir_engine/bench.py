"""Speed of the engine alone: prefill and decode rates beside the memory speed of the same moment.

Decides what is measured and how it is summarised. Invariant: every repetition measures the memory
and all cases once, one after the other, so that a slow second of a shared machine falls on all of
them; medians are reported. Showing progress and writing files is left to the caller.
"""

import itertools
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from kvasir_kvstore.core.block import BLOCK_TOKENS

from kvasir_engine import _native
from kvasir_engine.model import KvArrays, LoadedModel, load_model, new_kv_arrays
from kvasir_engine.weights import Progress, bf16_from_float32

PROBE_BYTES = 512 << 20
SEED = 7


@dataclass(frozen=True, slots=True)
class EngineBenchSettings:
    """What to measure. Lengths and contexts in tokens, batches in sequences."""

    model_dir: Path
    num_threads: int = 2
    prompt_lengths: tuple[int, ...] = (512, 2048)
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    context_length: int = 512
    """Tokens before the first decoded one."""
    decode_steps: int = 8
    """Steps per repetition of a batch size."""
    repetitions: int = 3
    isa: str | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One measured thing: a prompt computed whole, or a batch decoded for some steps."""

    name: str
    num_tokens: int
    """Tokens computed per repetition."""
    run: Callable[[], None]


def run_bench_engine(
    settings: EngineBenchSettings, progress: Progress | None = None
) -> dict[str, Any]:
    """Measure and return a JSON-ready result.

    `progress` is called with ("digest" | "pack", bytes, bytes), then ("measure", done, cases).
    Raises KvasirError for a model that cannot be loaded.
    """
    model = load_model(
        settings.model_dir, num_threads=settings.num_threads, isa=settings.isa, progress=progress
    )
    arrays = new_kv_arrays(model, _num_blocks(settings))
    _fill(arrays, model)
    probe = _native.MemoryProbe(num_bytes=PROBE_BYTES, num_threads=settings.num_threads)
    cases = [_prefill_case(model, length) for length in settings.prompt_lengths]
    cases += [_decode_case(model, settings, size) for size in settings.batch_sizes]
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    probes = []
    for done, (_, case) in enumerate(itertools.product(range(settings.repetitions), cases)):
        probes.append(probe.read())
        start = time.perf_counter()
        case.run()
        seconds[case.name].append(time.perf_counter() - start)
        if progress is not None:
            progress("measure", done + 1, settings.repetitions * len(cases))
    return {
        "bench": "engine",
        "settings": {**asdict(settings), "model_dir": str(settings.model_dir)},
        "isa": model.native.isa,
        "weights_bytes": model.weights_bytes,
        "memory_read_gb_per_s": round(median(probes) / 1e9, 2),
        "rss_max_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "tokens_per_s": {c.name: round(c.num_tokens / median(seconds[c.name]), 2) for c in cases},
        "seconds": {name: [round(s, 4) for s in values] for name, values in seconds.items()},
    }


def _blocks_of(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)


def _num_blocks(settings: EngineBenchSettings) -> int:
    """Blocks for the longest prompt, and for the largest batch at its full length."""
    per_sequence = _blocks_of(settings.context_length + settings.decode_steps)
    prompt = _blocks_of(max(settings.prompt_lengths, default=1))
    return max(prompt, per_sequence * max(settings.batch_sizes, default=1))


def _fill(arrays: KvArrays, model: LoadedModel) -> None:
    """Plausible K and V everywhere, so that a decoded context holds ordinary numbers."""
    source = np.random.default_rng(SEED)
    values = source.standard_normal(model.layout.block_bytes // 4, dtype=np.float32)
    bits = np.repeat(bf16_from_float32(values), 2)
    if model.layout.dtype == "float32":
        bits = values.view(np.uint16)
    arrays.data[:] = bits.view(np.uint8)


def _prefill_case(model: LoadedModel, length: int) -> Case:
    ids = np.random.default_rng(SEED).integers(0, model.config.vocab_size, length, dtype=np.int32)
    table = np.arange(_blocks_of(length), dtype=np.int32)[None]

    def run() -> None:
        model.native.forward(
            token_ids=ids,
            positions=np.arange(length, dtype=np.int32),
            seq_token_counts=np.array([length], np.int32),
            block_tables=table,
            output_rows=np.array([length - 1], np.int32),
            logits=np.empty((1, model.config.vocab_size), np.float32),
            completes=np.empty(0, np.int32),
            arrived=np.empty(0, np.int32),
        )

    return Case(f"prefill_{length}", length, run)


def _decode_case(model: LoadedModel, settings: EngineBenchSettings, size: int) -> Case:
    width = _blocks_of(settings.context_length + settings.decode_steps)
    tables = np.arange(size * width, dtype=np.int32).reshape(size, width)
    logits = np.empty((size, model.config.vocab_size), np.float32)

    def run() -> None:
        ids = np.arange(size, dtype=np.int32)
        for step in range(settings.decode_steps):
            model.native.forward(
                token_ids=ids,
                positions=np.full(size, settings.context_length + step, np.int32),
                seq_token_counts=np.ones(size, np.int32),
                block_tables=tables,
                output_rows=np.arange(size, dtype=np.int32),
                logits=logits,
                completes=np.empty(0, np.int32),
                arrived=np.empty(0, np.int32),
            )
            ids = greedy(logits)

    return Case(f"decode_{size}", size * settings.decode_steps, run)


def greedy(logits: np.ndarray) -> np.ndarray:
    """int32 [rows]: the most likely token of each row."""
    rows = len(logits)
    return _native.sample(
        logits=logits,
        temperature=np.zeros(rows, np.float32),
        top_k=np.zeros(rows, np.int32),
        top_p=np.ones(rows, np.float32),
        seed=np.zeros(rows, np.uint64),
        position=np.zeros(rows, np.int64),
    )
