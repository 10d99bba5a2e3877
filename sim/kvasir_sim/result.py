"""What a simulation shows: attainment, TTFT, cache hits, balance."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from kvasir_sim.worker import Job


@dataclass(frozen=True, slots=True)
class SimResult:
    """Figures over the counted requests. A refused request counts as missed."""

    attainment: float
    attainment_longest_quarter: float
    goodput_rps: float
    ttft_p50_ms: float
    ttft_p90_ms: float
    ttft_p99_ms: float
    hit_rate: float
    load_cv: float
    """Standard deviation of the workers' busy time over its mean."""

    wait_max_ms: float
    refused: int
    served: int
    fetched_rate: float = 0.0
    """Part of the prompt tokens that came from KV nodes; `hit_rate` counts them, too."""

    declined_rate: float = 0.0
    """Part of the prompt tokens that KV nodes held, and that were computed as that is faster."""

    decode: "DecodeResult | None" = None
    """Only with decode workers."""

    def to_json(self) -> dict[str, float | int]:
        """As `kvasir sim run --json` writes it: flat, the figures of decode last."""
        figures = asdict(self)
        decode = figures.pop("decode")
        return {**figures, **(decode or {})}


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """TPOT is from the first to the last token, over the tokens after the first; a request of one
    token has none."""

    tpot_p50_ms: float
    tpot_p90_ms: float
    tpot_p99_ms: float
    tpot_attainment: float
    """Of served requests."""

    both_attainment: float
    """TTFT and TPOT in time, of all requests."""


def summarise_decode(jobs: Sequence[Job], *, num_refused: int, slo_tpot_ms: float) -> DecodeResult:
    """Figures of served jobs."""
    tpot = {
        job.index: (job.last_token_ms - job.finished_ms) / (job.request.output_tokens - 1)
        for job in jobs
        if job.request.output_tokens > 1
    }
    p50, p90, p99 = np.percentile(list(tpot.values()) or [0.0], [50, 90, 99])
    paced = {job.index for job in jobs if tpot.get(job.index, 0.0) <= slo_tpot_ms}
    both = sum(job.index in paced and job.finished_ms <= job.deadline_ms for job in jobs)
    return DecodeResult(
        tpot_p50_ms=float(p50),
        tpot_p90_ms=float(p90),
        tpot_p99_ms=float(p99),
        tpot_attainment=len(paced) / max(len(jobs), 1),
        both_attainment=both / (len(jobs) + num_refused),
    )


def summarise(
    jobs: Sequence[Job], *, refused: Sequence[Job], busy_ms: Sequence[float]
) -> SimResult:
    """Figures of served jobs, of refused ones, and of the workers' busy times.

    Raises:
        ValueError: nothing was counted.
    """
    if not jobs and not refused:
        raise ValueError("no request is left to count: the warm-up takes them all")
    ttft = np.array([job.finished_ms - job.arrival_ms for job in jobs] or [float("nan")])
    lengths = np.array([job.request.input_tokens for job in (*jobs, *refused)])
    in_time = [job.finished_ms <= job.deadline_ms for job in jobs]
    attained = np.array(in_time + [False] * len(refused))
    longest = lengths >= np.quantile(lengths, 0.75)
    start_ms = min((job.arrival_ms for job in jobs), default=0.0)
    span_s = max((job.finished_ms for job in jobs), default=0.0) - start_ms
    prompt_tokens = max(sum(job.request.input_tokens for job in jobs), 1)
    p50, p90, p99 = np.percentile(ttft, [50, 90, 99])
    return SimResult(
        attainment=float(attained.mean()),
        attainment_longest_quarter=float(attained[longest].mean()),
        goodput_rps=float(attained.sum() / max(span_s / 1_000, 1e-9)),
        ttft_p50_ms=float(p50),
        ttft_p90_ms=float(p90),
        ttft_p99_ms=float(p99),
        hit_rate=sum(job.hit_tokens for job in jobs) / prompt_tokens,
        load_cv=float(np.std(busy_ms) / max(float(np.mean(busy_ms)), 1e-9)),
        wait_max_ms=max((job.started_ms - job.arrival_ms for job in jobs), default=0.0),
        refused=len(refused),
        served=len(jobs),
        fetched_rate=sum(job.fetch.tokens for job in jobs) / prompt_tokens,
        declined_rate=sum(job.fetch.declined_tokens for job in jobs) / prompt_tokens,
    )
