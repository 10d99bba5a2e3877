"""Speed of the engine alone: prefill and decode rates beside the machine's limits of the moment.

Decides what is measured and how it is summarised. Invariant: every repetition measures the limits,
this engine and its peers in turn, so that a slow second of a shared machine falls on all of them;
medians are reported, each figure with its share of what the limits allow (`roofline`). Showing
progress and writing files is left to the caller.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
from kvasir_kvstore._native import BlockPool
from kvasir_kvstore.core.block import BLOCK_TOKENS, KvLayout
from kvasir_proto.errors import KvasirError, Reason

from kvasir_engine import _native
from kvasir_engine.config import read_config
from kvasir_engine.decoder import ModelConfig
from kvasir_engine.formats import KvFormat, WeightFormat
from kvasir_engine.model import LoadedModel, load_model
from kvasir_engine.overhead import SAMPLINGS, WARM_STEPS, overhead_share
from kvasir_engine.roofline import Limits, StepShape, Work, least_seconds, step_work
from kvasir_engine.weights import Progress, bf16_from_float32

PROBE_BYTES = 512 << 20
SEED = 7


@dataclass(frozen=True, slots=True)
class EngineBenchSettings:
    """What to measure. Lengths and contexts in tokens, batches in sequences."""

    model_dir: Path
    weights: WeightFormat = "bf16"
    kv: KvFormat = "bf16"
    num_threads: int = 2
    prompt_lengths: tuple[int, ...] = (512, 2048)
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    context_length: int = 512
    """Tokens before the first decoded one."""
    decode_steps: int = 8
    """Steps per repetition of a batch size."""
    repetitions: int = 5
    isa: str | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One test: a prompt computed whole (pN), or N sequences decoded for some steps (dN)."""

    name: str
    step: StepShape
    """Of the first step; the later ones are a token longer."""
    num_steps: int

    @property
    def num_tokens(self) -> int:
        """Tokens computed per repetition."""
        return self.step.num_tokens * self.num_steps


class Engine(Protocol):
    """What runs cases: this engine, or a peer in a process of its own."""

    name: str
    weights: WeightFormat
    kv: KvFormat

    def seconds(self, case: Case) -> float:
        """Runs it once."""

    def rss_mb(self) -> int:
        """Largest memory that it took."""


@dataclass(slots=True)
class Samples:
    """What the repetitions of one case gave: of one engine."""

    work: list[Work]
    seconds: list[float]
    limits: list[Limits]


class Probes:
    """The machine's limits, measured again and again."""

    def __init__(self, *, isa: str, weights: WeightFormat, num_threads: int) -> None:
        self._memory = _native.MemoryProbe(num_bytes=PROBE_BYTES, num_threads=num_threads)
        self._peaks = [
            _native.PeakProbe(isa=isa, weights=one, num_threads=num_threads)
            for one in ("bf16", weights)
        ]

    def measure(self) -> Limits:
        """As they are now."""
        attention, matrices = (peak.run() for peak in self._peaks)
        return Limits(self._memory.read(), attention, matrices)


class KvasirEngine:
    """This engine, in this process."""

    name = "kvasir"

    def __init__(self, settings: EngineBenchSettings, progress: Progress | None) -> None:
        self.weights, self.kv = settings.weights, settings.kv
        self.model = load_model(
            settings.model_dir,
            num_threads=settings.num_threads,
            isa=settings.isa,
            weights=settings.weights,
            kv=settings.kv,
            progress=progress,
        )
        layout = self.model.layout
        self._settings = settings
        self._rss_mb = 0
        self._pool = BlockPool(
            num_blocks=_num_blocks(settings),
            num_layers=layout.num_layers,
            layer_bytes=layout.layer_bytes,
            layout_digest=layout.digest,
        )
        self._pool.data[:] = plausible_block(layout)
        self.model.native.attach_pool(self._pool.data, self._pool.ready, self._pool.progress)

    def seconds(self, case: Case) -> float:
        """Runs it once."""
        run = _prefill if case.step.start == 0 else _decode
        start = time.perf_counter()
        run(self.model, case)
        return time.perf_counter() - start

    def overhead_shares(self, case: Case) -> dict[str, float]:
        """Of decode steps as served by the engine: what is not the forward pass, by sampling."""
        return {
            name: round(
                overhead_share(
                    self.model,
                    self._pool,
                    batch_size=case.step.num_sequences,
                    context_length=case.step.start,
                    num_steps=self._settings.decode_steps * self._settings.repetitions,
                    sampling=sampling,
                ),
                4,
            )
            for name, sampling in SAMPLINGS.items()
        }

    def warm_up(self, cases: list[Case]) -> None:
        """Takes all the memory that the cases need, and notes how much there was at most.

        What measures the machine's limits in this process is made later, and does not count.
        """
        for case in (max(cases, key=lambda case: case.step.num_tokens), cases[-1]):
            self.seconds(case)
        self._rss_mb = peak_rss_mb()

    def rss_mb(self) -> int:
        """Largest memory after the load and `warm_up`."""
        return self._rss_mb


def run_bench_engine(
    settings: EngineBenchSettings,
    *,
    peers: tuple[Engine, ...] = (),
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measure and return JSON-ready rows, one per engine and case.

    `progress` is called with ("digest" | "pack", bytes, bytes), then ("measure", done, runs).
    Raises KvasirError for a model that cannot be loaded, and for lengths beyond its context.
    """
    # 1. What runs, and what each case must take at least.
    cases = cases_of(settings)
    _check_lengths(cases, read_config(settings.model_dir).max_position)
    own = KvasirEngine(settings, progress)
    own.warm_up(cases)
    engines: tuple[Engine, ...] = (own, *peers)
    probes = Probes(
        isa=own.model.native.isa, weights=settings.weights, num_threads=settings.num_threads
    )
    samples = {
        (engine.name, case.name): Samples(_work(own.model.config, case, engine), [], [])
        for engine in engines
        for case in cases
    }
    # 2. Rounds of everything; what the first repetition pays once is paid before.
    for peer in peers:
        peer.seconds(cases[-1])
    total = settings.repetitions * len(samples)
    for done in range(total):
        case = cases[done // len(engines) % len(cases)]
        engine = engines[done % len(engines)]
        sample = samples[engine.name, case.name]
        sample.limits.append(probes.measure())
        sample.seconds.append(engine.seconds(case))
        if progress is not None:
            progress("measure", done + 1, total)
    # 3. Medians.
    common = {"threads": settings.num_threads, "isa": own.model.native.isa}
    rows = [
        _row(engine, case, samples[engine.name, case.name]) | common
        for engine in engines
        for case in cases
    ]
    # 4. What serving adds to a decode step.
    for case, row in zip(cases, rows, strict=False):  # this engine's come first
        if case.step.start:
            row["overhead_share"] = own.overhead_shares(case)
    return rows


def cases_of(settings: EngineBenchSettings) -> list[Case]:
    """Prompts, then batches."""
    context, steps = settings.context_length, settings.decode_steps
    cases = [Case(f"p{n}", StepShape(1, 0, n), 1) for n in settings.prompt_lengths]
    batches = settings.batch_sizes
    return cases + [Case(f"d{n}", StepShape(n, context, context + 1), steps) for n in batches]


def peak_rss_mb() -> int:
    """Largest resident set of this process since it was started."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak) // 1024


def _check_lengths(cases: list[Case], context_length: int) -> None:
    for case in cases:
        longest = case.step.end + case.num_steps - 1
        if longest > context_length:
            raise KvasirError(
                Reason.CONTEXT_LENGTH,
                f"{case.name} takes {longest} tokens; this model's context is {context_length}",
                param="context_length" if case.step.start else "prompt",
            )


def _work(config: ModelConfig, case: Case, engine: Engine) -> list[Work]:
    """Of all steps of a case."""
    step = case.step
    shapes = [
        StepShape(step.num_sequences, step.start + i, step.end + i) for i in range(case.num_steps)
    ]
    return [
        part
        for shape in shapes
        for part in step_work(config, shape, weights=engine.weights, kv=engine.kv)
    ]


def _row(engine: Engine, case: Case, sample: Samples) -> dict[str, Any]:
    """Medians of one case; the share is that of each repetition against its own limits."""
    seconds = median(sample.seconds)
    least = [least_seconds(sample.work, limits) for limits in sample.limits]
    shares = [a / b for a, b in zip(least, sample.seconds, strict=True)]
    return {
        "engine": engine.name,
        "weights": engine.weights,
        "kv": engine.kv,
        "test": case.name,
        "tokens_per_s": round(case.num_tokens / seconds, 2),
        "share_of_limit": round(median(shares), 4),
        "rss_mb": engine.rss_mb(),
        "limit_tokens_per_s": round(case.num_tokens / median(least), 2),
        "gigabytes": round(sum(part.num_bytes for part in sample.work) / 1e9, 3),
        "gigaoperations": round(sum(part.operations for part in sample.work) / 1e9, 3),
        "read_gb_per_s": _median_of(sample.limits, lambda one: one.read_bytes_per_s),
        "peak_gops_per_s": {
            "float": _median_of(sample.limits, lambda one: one.float_operations_per_s),
            "integer": _median_of(sample.limits, lambda one: one.integer_operations_per_s),
        },
        "seconds": [round(value, 4) for value in sample.seconds],
    }


def _median_of(limits: list[Limits], get: Callable[[Limits], float]) -> float:
    """In units of 1e9."""
    return round(median(get(one) for one in limits) / 1e9, 2)


def _blocks_of(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)


def _num_blocks(settings: EngineBenchSettings) -> int:
    """Blocks for the longest prompt, and for the largest batch at its full length."""
    num_decoded = 1 + settings.decode_steps * settings.repetitions + WARM_STEPS
    per_sequence = _blocks_of(settings.context_length + num_decoded)
    prompt = _blocks_of(max(settings.prompt_lengths, default=1))
    return max(prompt, per_sequence * max(settings.batch_sizes, default=1))


def plausible_block(layout: KvLayout) -> np.ndarray:
    """Bytes of a block of ordinary numbers, for a decoded context."""
    source = np.random.default_rng(SEED)
    num_heads = 2 * layout.num_layers * layout.num_kv_heads
    shape = (num_heads, layout.block_tokens * layout.head_dim)
    if layout.dtype == "int8":
        codes = source.integers(-127, 128, shape, dtype=np.int8).view(np.uint8)
        scales = np.full((num_heads, layout.block_tokens), 1 / 64, np.float32).view(np.uint8)
        return np.concatenate([codes, scales], axis=1).ravel()
    values = source.standard_normal(shape, dtype=np.float32)
    if layout.dtype == "bfloat16":
        return bf16_from_float32(values).view(np.uint8).ravel()
    return values.view(np.uint8).ravel()


def _prefill(model: LoadedModel, case: Case) -> None:
    length = case.step.end
    ids = np.random.default_rng(SEED).integers(0, model.config.vocab_size, length, dtype=np.int32)
    model.native.forward(
        token_ids=ids,
        positions=np.arange(length, dtype=np.int32),
        seq_token_counts=np.array([length], np.int32),
        block_tables=np.arange(_blocks_of(length), dtype=np.int32)[None],
        output_rows=np.array([length - 1], np.int32),
        logits=np.empty((1, model.config.vocab_size), np.float32),
        completes=np.empty(0, np.int32),
        arrived=np.empty(0, np.int32),
    )


def _decode(model: LoadedModel, case: Case) -> None:
    size = case.step.num_sequences
    width = _blocks_of(case.step.start + case.num_steps)
    tables = np.arange(size * width, dtype=np.int32).reshape(size, width)
    logits = np.empty((size, model.config.vocab_size), np.float32)
    ids = np.arange(size, dtype=np.int32)
    for step in range(case.num_steps):
        model.native.forward(
            token_ids=ids,
            positions=np.full(size, case.step.start + step, np.int32),
            seq_token_counts=np.ones(size, np.int32),
            block_tables=tables,
            output_rows=np.arange(size, dtype=np.int32),
            logits=logits,
            completes=np.empty(0, np.int32),
            arrived=np.empty(0, np.int32),
        )
        ids = greedy(logits)


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
