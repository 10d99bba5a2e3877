"""How requests wait at a modelled worker."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kvasir_sim.worker import Job


@dataclass(frozen=True, slots=True)
class Dismissed:
    """A request that the queue gives up: back to its router, or refused for good."""

    job: "Job"
    is_refused: bool


class Line(Protocol):
    """The order of a worker's queue."""

    tokens: int
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

    def clear(self) -> "list[Job]":
        """All, oldest first."""
        jobs, self.tokens = list(self._jobs), 0
        self._jobs.clear()
        return jobs
