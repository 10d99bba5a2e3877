"""Sends a load of completions at a fixed concurrency and sums up what came back."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp

from kvasir_cli.endpoint import Answer, Endpoint
from kvasir_cli.errors import CommandError
from kvasir_cli.progress import Advance

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """One measurement."""

    concurrency: int
    num_requests: int
    num_warmup: int
    input_tokens: int
    output_tokens: int
    shared_ratio: float
    seed: int


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What the measurement gave; times in ms."""

    settings: LoadSettings
    duration_s: float
    num_ok: int
    errors: dict[str, int]
    input_tokens_mean: float
    cached_tokens_mean: float
    output_tokens_mean: float
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    ttft_ms: dict[str, float]
    tpot_ms: dict[str, float]
    latency_ms: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


async def run_load(
    url: str, model: str | None, prompts: Sequence[str], settings: LoadSettings, advance: Advance
) -> LoadResult:
    """Send the prompts, the first `num_warmup` of them before the clock starts.

    Raises:
        CommandError: nothing answers, or every request failed.
    """
    connector = aiohttp.TCPConnector(limit=settings.concurrency + 1)
    async with aiohttp.ClientSession(connector=connector) as session:
        endpoint = Endpoint(session, url)
        body = {
            "model": model or await endpoint.model(),
            "max_tokens": settings.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        warmup, measured = prompts[: settings.num_warmup], prompts[settings.num_warmup :]
        await _send_all(endpoint, body, warmup, settings.concurrency, advance)
        started_s = time.monotonic()
        outcomes = await _send_all(endpoint, body, measured, settings.concurrency, advance)
        duration_s = time.monotonic() - started_s
    return summarise(settings, outcomes, duration_s)


async def _send_all(
    endpoint: Endpoint,
    body: dict[str, Any],
    prompts: Sequence[str],
    concurrency: int,
    advance: Advance,
) -> list[Answer | str]:
    """One outcome per prompt: the answer, or why there is none."""
    waiting = iter(prompts)
    outcomes: list[Answer | str] = []

    async def client() -> None:
        for prompt in waiting:
            answer = Answer()
            try:
                async for _ in endpoint.stream(
                    "/v1/completions", {**body, "prompt": prompt}, answer
                ):
                    pass
                outcomes.append(answer)
            except CommandError as error:
                outcomes.append(str(error))
            advance(1)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(prompts))):
            group.create_task(client())
    return outcomes


def summarise(
    settings: LoadSettings, outcomes: Sequence[Answer | str], duration_s: float
) -> LoadResult:
    """Percentiles and rates of the answers.

    Raises:
        CommandError: there is no answer.
    """
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
    errors = Counter(outcome for outcome in outcomes if isinstance(outcome, str))
    if not answers:
        raise CommandError(f"every request failed: {errors.most_common(1)[0][0]}")
    num_input = sum(int(answer.usage.get("prompt_tokens", 0)) for answer in answers)
    num_output = sum(answer.num_tokens for answer in answers)
    count = len(answers)
    return LoadResult(
        settings=settings,
        duration_s=round(duration_s, 3),
        num_ok=count,
        errors=dict(errors),
        input_tokens_mean=round(num_input / count, 1),
        cached_tokens_mean=round(sum(answer.num_cached for answer in answers) / count, 1),
        output_tokens_mean=round(num_output / count, 1),
        requests_per_s=round(count / duration_s, 3),
        input_tokens_per_s=round(num_input / duration_s, 1),
        output_tokens_per_s=round(num_output / duration_s, 1),
        ttft_ms=percentiles([answer.ttft_ms for answer in answers if answer.first_s]),
        tpot_ms=percentiles([answer.tpot_ms for answer in answers if answer.num_tokens > 1]),
        latency_ms=percentiles(
            [1000 * (answer.last_s - answer.started_s) for answer in answers if answer.last_s]
        ),
    )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Nearest-rank percentiles and the mean; empty if there are no values."""
    if not values:
        return {}
    ordered = sorted(values)
    found = {
        f"p{percent}": ordered[math.ceil(percent / 100 * len(ordered)) - 1]
        for percent in PERCENTILES
    }
    return {name: round(value, 3) for name, value in found.items()} | {
        "mean": round(sum(ordered) / len(ordered), 3)
    }
