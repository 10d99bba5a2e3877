"""One simulation: arrivals and completions in the order of the simulated clock."""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kvasir_sim.policies import RoutingPolicy, make_policy
from kvasir_sim.result import SimResult, summarise
from kvasir_sim.settings import SimSettings
from kvasir_sim.trace import TraceRequest, at_rate, load_mooncake
from kvasir_sim.worker import Job, SimWorker, Speed

Progress = Callable[[int, int], None]


def run_sim(settings: SimSettings, *, progress: Progress | None = None) -> SimResult:
    """Replays the trace; `progress(done, total)` is called now and then.

    Raises:
        OSError: the trace cannot be read.
        ValueError: the trace is malformed, or nothing is left to count.
    """
    requests = load_mooncake(settings.trace, max_input=settings.max_input, count=settings.requests)
    speed = Speed(settings.prefill_us_per_token, settings.reuse_us_per_token)
    names = [f"w{number}" for number in range(settings.workers)]
    workers = {name: SimWorker(name, speed, cache_tokens=settings.cache_tokens) for name in names}
    run = _Run(workers, make_policy(workers, settings))
    for index, (request, arrival_ms) in enumerate(
        zip(requests, at_rate(requests, settings.rate), strict=True)
    ):
        run.arrive(index, request, arrival_ms)
        if progress is not None and index % 100 == 0:
            progress(index, len(requests))
    run.finish_until(float("inf"))
    return run.result(settings)


@dataclass(slots=True)
class _Run:
    """The state of one simulation."""

    workers: dict[str, SimWorker]
    policy: RoutingPolicy
    completions: list[tuple[float, int, Job]] = field(default_factory=list)
    served: list[Job] = field(default_factory=list)
    refused: list[tuple[int, int]] = field(default_factory=list)  # (index, input tokens)

    def arrive(self, index: int, request: TraceRequest, now_ms: float) -> None:
        """Routes one request."""
        self.finish_until(now_ms)
        name = self.policy.choose(index, request, now_ms)
        if name is None:
            self.refused.append((index, request.input_tokens))
            return
        worker = self.workers[name]
        miss_tokens = request.input_tokens - worker.hit_tokens(request)
        worker.accept(Job(index, request, now_ms, miss_tokens))
        self._start(worker, now_ms)

    def finish_until(self, now_ms: float) -> None:
        """Completions up to now, each followed by the worker's next job."""
        while self.completions and self.completions[0][0] <= now_ms:
            finished_ms, _, job = heapq.heappop(self.completions)
            worker = self.workers[job.worker]
            names, evicted = worker.finish()
            self.policy.stored(worker.name, tuple(names), evicted)
            self.served.append(job)
            self._start(worker, finished_ms)

    def _start(self, worker: SimWorker, now_ms: float) -> None:
        job = worker.start_next(now_ms)
        if job is not None:
            heapq.heappush(self.completions, (job.finished_ms, job.index, job))

    def result(self, settings: SimSettings) -> SimResult:
        """Figures without the warm-up."""
        return summarise(
            [job for job in self.served if job.index >= settings.warmup],
            refused_inputs=list(self._refused_inputs(settings.warmup)),
            slo_ms=settings.slo_ttft_ms,
            busy_ms=[worker.busy_ms for worker in self.workers.values()],
        )

    def _refused_inputs(self, warmup: int) -> Iterator[int]:
        return (tokens for index, tokens in self.refused if index >= warmup)
