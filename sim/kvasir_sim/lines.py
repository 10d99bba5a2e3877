"""How requests wait at a modelled worker."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kvasir_engine.core import admission

if TYPE_CHECKING:
    from kvasir_sim.worker import Job


@dataclass(frozen=True, slots=True)
class Dismissed:
    """A request that the queue gives up: back to its router, or refused for good."""

    job: "Job"
    is_refused: bool


class Line(Protocol):
    """The order of a worker's queue."""

    @property
    def tokens(self) -> int:
        """To compute, of all that wait."""

    def __len__(self) -> int:
        """Requests that wait."""

    def push(
        self, job: "Job", cost_ms: float, *, now_ms: float, busy_ms: float
    ) -> Sequence[Dismissed]:
        """Takes a request; `busy_ms` is left of what is being computed."""

    def pop(self, now_ms: float) -> "tuple[Job | None, Sequence[Dismissed]]":
        """The next request to compute, if any, and those given up."""

    def continuing(self, names: Sequence[bytes]) -> "Iterable[Job]":
        """Waiting requests whose first uncached block may be one of these."""

    def update(self, job: "Job", cost_ms: float) -> None:
        """`job.miss_tokens` has been judged again."""

    def take_out(self, job: "Job") -> bool:
        """Removes a request, if it waits here."""

    def clear(self) -> "list[Job]":
        """Empties the queue."""


class FifoLine:
    """In order of arrival, for as long as it takes. Tokens are those judged on arrival."""

    def __init__(self) -> None:
        self.tokens = 0
        self._jobs: deque[Job] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def push(
        self, job: "Job", cost_ms: float, *, now_ms: float, busy_ms: float
    ) -> Sequence[Dismissed]:
        """To the end."""
        self._jobs.append(job)
        self.tokens += job.miss_tokens
        return ()

    def pop(self, now_ms: float) -> "tuple[Job | None, Sequence[Dismissed]]":
        """The oldest."""
        if not self._jobs:
            return None, ()
        job = self._jobs.popleft()
        self.tokens -= job.miss_tokens
        return job, ()

    def continuing(self, names: Sequence[bytes]) -> "Iterable[Job]":
        """None: nothing is judged again."""
        return ()

    def update(self, job: "Job", cost_ms: float) -> None:
        """Never asked for."""

    def take_out(self, job: "Job") -> bool:
        """By a search: only policies of deadline queues recall requests."""
        if job not in self._jobs:
            return False
        self._jobs.remove(job)
        self.tokens -= job.miss_tokens
        return True

    def clear(self) -> "list[Job]":
        """All, oldest first."""
        jobs, self.tokens = list(self._jobs), 0
        self._jobs.clear()
        return jobs


class DeadlineLine:
    """The production queue of a prefill worker."""

    def __init__(self) -> None:
        self._queue = admission.AdmissionQueue()
        self._jobs: dict[int, Job] = {}
        self._lacking: dict[bytes, set[int]] = {}  # first uncached block -> who waits

    @property
    def tokens(self) -> int:
        """To compute, of all that wait."""
        return self._queue.tokens

    def __len__(self) -> int:
        return len(self._queue)

    def push(
        self, job: "Job", cost_ms: float, *, now_ms: float, busy_ms: float
    ) -> Sequence[Dismissed]:
        """In the order in which they are due."""
        self._jobs[job.index] = job
        self._lack(job)
        waiting = admission.Waiting(
            job.index,
            job.arrival_ms,
            job.deadline_ms,
            cost_ms,
            tokens=job.miss_tokens,
            tenant=job.request.tenant,
            priority=job.request.priority,
            may_move=job.may_move,
        )
        return self._given_up(self._queue.push(waiting, now_ms=now_ms, busy_ms=busy_ms))

    def pop(self, now_ms: float) -> "tuple[Job | None, Sequence[Dismissed]]":
        """The next to compute."""
        waiting, dismissed = self._queue.pop(now_ms=now_ms)
        given_up = self._given_up(dismissed)
        return (self._forget(waiting) if waiting else None), given_up

    def continuing(self, names: Sequence[bytes]) -> "Iterable[Job]":
        """Those that lacked one of these blocks first."""
        found = [self._lacking.pop(name, ()) for name in names]
        return [self._jobs[index] for indices in found for index in sorted(indices)]

    def update(self, job: "Job", cost_ms: float) -> None:
        """Less is left to compute."""
        self._lack(job)
        self._queue.update(job.index, compute_ms=cost_ms, tokens=job.miss_tokens)

    def take_out(self, job: "Job") -> bool:
        """Its number finds it."""
        waiting = self._queue.remove(job.index)
        if waiting is not None:
            self._forget(waiting)
        return waiting is not None

    def clear(self) -> "list[Job]":
        """Empties the queue."""
        return [self._forget(waiting) for waiting in self._queue.drain()]

    def _lack(self, job: "Job") -> None:
        name = job.first_lacking
        if name is not None:
            self._lacking.setdefault(name, set()).add(job.index)

    def _forget(self, waiting: admission.Waiting) -> "Job":
        assert isinstance(waiting.request_id, int)
        job = self._jobs.pop(waiting.request_id)
        name = job.first_lacking
        if name is not None and (indices := self._lacking.get(name)):
            indices.discard(job.index)
            if not indices:
                del self._lacking[name]
        return job

    def _given_up(self, dismissed: Sequence[admission.Dismissed]) -> list[Dismissed]:
        return [
            Dismissed(self._forget(one.waiting), one.verdict is admission.Verdict.REFUSE)
            for one in dismissed
        ]
