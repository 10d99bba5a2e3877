"""The two stages of a request: a queue of prefill workers, then shared decode steps.

Prefill is first come first served, on the worker that is free first. Decode is one pool in which
requests are spread evenly: a step takes base + slope * requests per worker, and a request waits
while the KV memory is full. The decode pool moves by whole seconds and interpolates within.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvasir_operator.core.planner.facts import Speed

from kvasir_sim.plan.fleet import Worker


@dataclass(slots=True)
class PrefillPool:
    """Prompts that wait: (index, arrival, tokens)."""

    speed: Speed
    queue: deque[tuple[int, float, float]] = field(default_factory=deque)
    queued_tokens: float = 0.0

    def arrive(self, index: int, at_s: float, prompt_tokens: float) -> None:
        """A prompt joins the queue."""
        self.queue.append((index, at_s, prompt_tokens))
        self.queued_tokens += prompt_tokens

    def advance(self, workers: Sequence[Worker], end_s: float) -> list[tuple[int, float]]:
        """Start what can start before `end_s`; (index, time of the first token) of each."""
        begun = []
        while self.queue and workers:
            worker = min(workers, key=lambda w: w.free_s)
            index, arrival_s, tokens = self.queue[0]
            start_s = max(worker.free_s, arrival_s)
            if start_s >= end_s:
                break
            self.queue.popleft()
            self.queued_tokens -= tokens
            worker.free_s = start_s + tokens * self.speed.prefill_us_per_token / 1e6
            begun.append((index, worker.free_s))
        return begun


@dataclass(slots=True)
class _Running:
    index: int
    begin_s: float
    held_tokens: float
    output_tokens: float


@dataclass(slots=True)
class DecodePool:
    """Requests being decoded. `progress` is how many steps the pool has made since the begin."""

    speed: Speed
    progress: float = 0.0
    step_ms: float = 0.0  # of the last interval
    held_tokens: float = 0.0
    waiting: deque[_Running] = field(default_factory=deque)
    ends: list[tuple[float, int, _Running]] = field(default_factory=list)

    @property
    def num_requests(self) -> int:
        """Requests that run or wait."""
        return len(self.ends) + len(self.waiting)

    def arrive(self, index: int, at_s: float, *, prompt: float, output: float) -> None:
        """A request whose first token came at `at_s`."""
        self.waiting.append(_Running(index, at_s, prompt + output, output))

    def advance(self, num_workers: int, *, start_s: float, end_s: float) -> list[tuple[int, float]]:
        """One interval; (index, ms per output token) of the requests that end in it."""
        if num_workers == 0:
            return []
        self._admit(num_workers * self.speed.kv_tokens, start_s, end_s)
        per_worker = max(len(self.ends) / num_workers, 1.0)
        step_ms = self.speed.decode_base_ms + self.speed.decode_ms_per_request * per_worker
        self.step_ms = step_ms
        target = self.progress + 1000 * (end_s - start_s) / step_ms
        done = []
        while self.ends and self.ends[0][0] <= target:
            end, index, request = heapq.heappop(self.ends)
            at_s = start_s + (end - self.progress) * step_ms / 1000
            self.held_tokens -= request.held_tokens
            taken_ms = 1000 * max(at_s - request.begin_s, 0.0)
            done.append((index, max(taken_ms / request.output_tokens, step_ms)))
        self.progress = target
        return done

    def _admit(self, capacity: float, start_s: float, end_s: float) -> None:
        step_ms = self.step_ms or self.speed.decode_base_ms
        while self.waiting and self.held_tokens + self.waiting[0].held_tokens <= capacity:
            request = self.waiting.popleft()
            self.held_tokens += request.held_tokens
            late_s = min(max(request.begin_s - start_s, 0.0), end_s - start_s)
            begin = self.progress + 1000 * late_s / step_ms
            heapq.heappush(self.ends, (begin + request.output_tokens, request.index, request))
