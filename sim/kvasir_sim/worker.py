"""A modelled prefill worker: one prompt at a time, a queue, and an LRU prefix cache.

Times are milliseconds of the simulated clock. Invariants: the cache never exceeds its blocks; a
request that was accepted is computed once, given back, or lost with the worker.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvasir_sim.lines import DeadlineLine, Dismissed, FifoLine, Line
from kvasir_sim.tier import NO_FETCH, Fetch, KvTier
from kvasir_sim.trace import BLOCK_TOKENS, TraceRequest

Discipline = Literal["fifo", "deadline"]


@dataclass(slots=True)
class Job:
    """A request on its way, and when its first token comes. Policies only read it."""

    index: int
    request: TraceRequest
    arrival_ms: float
    deadline_ms: float
    replica: int = 0
    may_move: bool = False
    miss_tokens: int = 0
    """To compute, as last judged while the request waits."""

    first_lacking: bytes | None = None
    """The first block that its worker did not hold then."""

    started_ms: float = 0.0
    finished_ms: float = 0.0
    hit_tokens: int = 0
    """Not computed: held by the worker, or fetched."""
    fetch: Fetch = NO_FETCH
    worker: str = ""
    decode: str = ""
    """Who decodes it, once that is decided."""

    last_token_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Speed:
    """What a token costs."""

    prefill_us: float
    reuse_us: float


class SimWorker:
    """One worker."""

    def __init__(
        self,
        name: str,
        speed: Speed,
        *,
        cache_tokens: int,
        discipline: Discipline = "fifo",
        tier: KvTier | None = None,
    ) -> None:
        self.name, self.speed = name, speed
        self.line: Line = FifoLine() if discipline == "fifo" else DeadlineLine()
        self.current: Job | None = None
        self.busy_ms = 0.0
        self._tier = tier
        self._cache: OrderedDict[bytes, None] = OrderedDict()
        self._blocks_max = cache_tokens // BLOCK_TOKENS

    @property
    def num_pending(self) -> int:
        """Requests accepted and not yet computed."""
        return len(self.line) + (self.current is not None)

    def hit_tokens(self, request: TraceRequest) -> int:
        """Leading prompt tokens that are in the cache."""
        return min(self._num_held(request) * BLOCK_TOKENS, request.input_tokens)

    def _num_held(self, request: TraceRequest) -> int:
        run = 0
        for name in request.names:
            if name not in self._cache:
                break
            run += 1
        return run

    def pending_tokens(self, now_ms: float) -> int:
        """Prompt tokens accepted and not yet computed."""
        return self.line.tokens + int(self._left_ms(now_ms) * 1_000 / self.speed.prefill_us)

    def accept(self, job: Job, now_ms: float) -> Sequence[Dismissed]:
        """Puts a job into the queue; those that the queue gives up for it come back."""
        job.worker = self.name
        cost_ms = self._judge(job)
        return self.line.push(job, cost_ms, now_ms=now_ms, busy_ms=self._left_ms(now_ms))

    def start_next(self, now_ms: float) -> tuple[Job | None, Sequence[Dismissed]]:
        """Starts a job if the worker is idle, its finished_ms is known then; and who gave up."""
        if self.current is not None:
            return None, ()
        job, dismissed = self.line.pop(now_ms)
        if job is not None:
            if self._tier is not None:
                self._tier.advance(now_ms)
            cost_ms, job.hit_tokens, job.fetch = self._cost_ms(job.request)
            if self._tier is not None:
                self._tier.begin(job.fetch, now_ms)
            job.started_ms, job.finished_ms = now_ms, now_ms + cost_ms
            self.busy_ms += cost_ms
            self.current = job
        return job, dismissed

    def finish(self) -> tuple[Sequence[bytes], list[bytes]]:
        """Ends the current job: names newly held, and names evicted for them."""
        assert self.current is not None
        names, self.current = self.current.request.names, None
        new = [name for name in names if name not in self._cache]
        for name in reversed(names):  # the first block is the most recent: it is shared most
            self._cache[name] = None
            self._cache.move_to_end(name)
        if self._tier is not None:
            self._tier.offer(names)
        evicted = []
        while len(self._cache) > self._blocks_max:
            evicted.append(self._cache.popitem(last=False)[0])
        self._judge_again(new)
        return new, evicted

    def fail(self) -> list[Job]:
        """The worker is gone: what it had accepted is lost."""
        lost = [*self.line.clear(), *([self.current] if self.current else [])]
        self.current = None
        self._cache.clear()
        return lost

    def _judge_again(self, new: Sequence[bytes]) -> None:
        """Waiting requests that continue a prefix just computed have less left to compute."""
        for job in self.line.continuing(new):
            self.line.update(job, self._judge(job))

    def _judge(self, job: Job) -> float:
        """What is to be computed for a request as the cache stands, and how long it takes."""
        request = job.request
        run = self._num_held(request)
        job.miss_tokens = request.input_tokens - min(run * BLOCK_TOKENS, request.input_tokens)
        job.first_lacking = request.names[run] if run < len(request.names) else None
        return self._cost_ms(request)[0]

    def _left_ms(self, now_ms: float) -> float:
        return max(self.current.finished_ms - now_ms, 0.0) if self.current else 0.0

    def _cost_ms(self, request: TraceRequest) -> tuple[float, int, Fetch]:
        """Time to the first token on an idle worker, the tokens not computed, and the fetch."""
        hit, fetch = self.hit_tokens(request), NO_FETCH
        if self._tier is not None:
            us = self.speed.prefill_us
            fetch = self._tier.plan(request, beyond=hit, compute_us_per_token=us)
        computed = request.input_tokens - hit - fetch.tokens
        cost_us = computed * self.speed.prefill_us + hit * self.speed.reuse_us
        return cost_us / 1_000 + fetch.ms, hit + fetch.tokens, fetch
