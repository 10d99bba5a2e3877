"""Modelled decode workers: what follows the first token, when the settings have any.

A worker steps while it holds requests; every step gives each of them a token and takes

    base + per request in the batch + per token of context held

by a measured profile. A request comes when its KV has been handed off, waits in order of arrival
for a place in the batch and for KV memory of its prompt and output, and leaves with its last token.

Invariants: the batch never exceeds its limit, nor the memory its tokens, save for a request that is
larger than the memory, which is decoded alone.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kvasir_sim.settings import SimSettings
from kvasir_sim.worker import Job


@dataclass(frozen=True, slots=True)
class DecodeReport:
    """How a decode worker describes itself."""

    num_running: int
    """Those that wait included."""

    tokens_free: int
    ms_per_step: float


class DecodeWorker:
    """One worker."""

    def __init__(self, settings: SimSettings) -> None:
        self._settings = settings
        self._waiting: deque[Job] = deque()
        self._ends: list[tuple[int, int, Job]] = []  # step after which a request leaves
        self._num_steps = 0
        self._reserved_tokens = 0
        self._context_tokens = 0
        self._step_ms = 0.0
        self.is_stepping = False

    def accept(self, job: Job) -> None:
        """A request's KV has arrived."""
        self._waiting.append(job)

    def begin_step(self) -> float | None:
        """Milliseconds that the next step takes; None: there is nothing to do."""
        while self._waiting and self._has_room(self._waiting[0]):
            self._admit(self._waiting.popleft())
        batch, settings = len(self._ends), self._settings
        self.is_stepping = batch > 0
        if not batch:
            return None
        context_ms = self._context_tokens * settings.decode_us_per_context_token / 1_000
        self._step_ms = settings.decode_base_ms + batch * settings.decode_ms_per_request
        self._step_ms += context_ms
        return self._step_ms

    def end_step(self) -> list[Job]:
        """Everybody has a token more; those that have all leave."""
        self._num_steps += 1
        self._context_tokens += len(self._ends)
        done = []
        while self._ends and self._ends[0][0] <= self._num_steps:
            job = heapq.heappop(self._ends)[2]
            self._reserved_tokens -= _tokens(job)
            self._context_tokens -= _tokens(job)
            done.append(job)
        return done

    def report(self) -> DecodeReport:
        """As it is now."""
        free = self._settings.decode_cache_tokens - self._reserved_tokens
        return DecodeReport(len(self._ends) + len(self._waiting), max(free, 0), self._step_ms)

    def _has_room(self, job: Job) -> bool:
        if not self._ends:
            return True
        fits = self._reserved_tokens + _tokens(job) <= self._settings.decode_cache_tokens
        return fits and len(self._ends) < self._settings.decode_batch_max

    def _admit(self, job: Job) -> None:
        steps = job.request.output_tokens - 1  # the first token came with the prefill
        heapq.heappush(self._ends, (self._num_steps + steps, job.index, job))
        self._reserved_tokens += _tokens(job)
        self._context_tokens += job.request.input_tokens + 1


class DecodeStage:
    """All decode workers, on the engine's clock."""

    def __init__(
        self,
        settings: SimSettings,
        *,
        at: Callable[[float, Callable[[float], None]], None],
        ended: Callable[[Job, float], None],
    ) -> None:
        """`at` plans an event; `ended` hears of last tokens."""
        self._handoff_us = settings.handoff_us_per_token
        self._at, self._ended = at, ended
        names = [f"d{number}" for number in range(settings.decode_workers)]
        self._workers = {name: DecodeWorker(settings) for name in names}

    def take(self, job: Job, name: str, now_ms: float) -> None:
        """The first token is out: the KV moves to a decode worker."""
        job.decode = name

        def arrived(at_ms: float) -> None:
            worker = self._workers[name]
            worker.accept(job)
            if not worker.is_stepping:
                self._begin(name, at_ms)

        self._at(now_ms + job.request.input_tokens * self._handoff_us / 1_000, arrived)

    def reports(self) -> dict[str, DecodeReport]:
        """Of all workers."""
        return {name: worker.report() for name, worker in self._workers.items()}

    def _begin(self, name: str, now_ms: float) -> None:
        step_ms = self._workers[name].begin_step()
        if step_ms is not None:
            self._at(now_ms + step_ms, lambda at_ms: self._end(name, at_ms))

    def _end(self, name: str, now_ms: float) -> None:
        for job in self._workers[name].end_step():
            self._ended(job, now_ms)
        self._begin(name, now_ms)


def _tokens(job: Job) -> int:
    return job.request.input_tokens + job.request.output_tokens
