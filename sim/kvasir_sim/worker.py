"""A modelled prefill worker: one request at a time in order of arrival, and an LRU prefix cache.

Times are milliseconds of the simulated clock. Invariants: the cache never exceeds its blocks; a
request is computed exactly once.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from kvasir_sim.trace import BLOCK_TOKENS, TraceRequest


@dataclass(slots=True)
class Job:
    """A request at a worker, and when its first token comes."""

    index: int
    request: TraceRequest
    arrival_ms: float
    miss_tokens: int
    """As judged on arrival: what the queue is measured by."""

    started_ms: float = 0.0
    finished_ms: float = 0.0
    hit_tokens: int = 0
    worker: str = ""


@dataclass(frozen=True, slots=True)
class Speed:
    """What a token costs."""

    prefill_us: float
    reuse_us: float


class SimWorker:
    """One worker."""

    def __init__(self, name: str, speed: Speed, *, cache_tokens: int) -> None:
        self.name = name
        self.queue: deque[Job] = deque()
        self.current: Job | None = None
        self.busy_ms = 0.0
        self._speed = speed
        self._cache: OrderedDict[bytes, None] = OrderedDict()
        self._blocks_max = cache_tokens // BLOCK_TOKENS
        self._queued_tokens = 0

    def hit_tokens(self, request: TraceRequest) -> int:
        """Leading prompt tokens that are in the cache."""
        run = 0
        for name in request.names:
            if name not in self._cache:
                break
            run += 1
        return min(run * BLOCK_TOKENS, request.input_tokens)

    def pending_tokens(self, now_ms: float) -> int:
        """Prompt tokens accepted and not yet computed."""
        if self.current is None:
            return self._queued_tokens
        left_ms = max(self.current.finished_ms - now_ms, 0.0)
        return self._queued_tokens + int(left_ms * 1_000 / self._speed.prefill_us)

    def accept(self, job: Job) -> None:
        """Puts a job into the queue."""
        job.worker = self.name
        self.queue.append(job)
        self._queued_tokens += job.miss_tokens

    def start_next(self, now_ms: float) -> Job | None:
        """Starts the oldest job if the worker is idle; its finished_ms is known then."""
        if self.current is not None or not self.queue:
            return None
        job = self.queue.popleft()
        self._queued_tokens -= job.miss_tokens
        job.hit_tokens = self.hit_tokens(job.request)
        miss_tokens = job.request.input_tokens - job.hit_tokens
        cost_us = miss_tokens * self._speed.prefill_us + job.hit_tokens * self._speed.reuse_us
        job.started_ms, job.finished_ms = now_ms, now_ms + cost_us / 1_000
        self.busy_ms += cost_us / 1_000
        self.current = job
        return job

    def finish(self) -> tuple[Sequence[bytes], list[bytes]]:
        """Ends the current job: names now held, and names evicted for them."""
        assert self.current is not None
        names, self.current = self.current.request.names, None
        for name in reversed(names):  # the first block is the most recent: it is shared most
            self._cache[name] = None
            self._cache.move_to_end(name)
        evicted = []
        while len(self._cache) > self._blocks_max:
            evicted.append(self._cache.popitem(last=False)[0])
        return names, evicted
