"""What a worker takes on: its role, whether it drains, and what is in flight.

Pure state, no I/O: the servers ask `admit` before they do anything for a request and call `leave`
when its last resource is freed. Invariant: `num_in_flight` is zero only when no request
holds a session, a transfer or a connection; the engine frees its memory with the step that runs.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass

from kvasir_proto.errors import KvasirError, Reason


class Role(enum.StrEnum):
    """Which halves of a request a worker serves."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


class Work(enum.StrEnum):
    """What is asked of a worker."""

    GENERATE = "generate"
    PREFILL = "prefill"


_ROLES_OF_WORK = {
    Work.GENERATE: (Role.DECODE, Role.BOTH),
    Work.PREFILL: (Role.PREFILL, Role.BOTH),
}


@dataclass(eq=False, slots=True)
class Ticket:
    """One request in flight. `end` makes its server stop it with an error."""

    request_id: str
    work: Work
    end: Callable[[KvasirError], None]


class WorkerState:
    """Role, drain and in-flight requests of one worker."""

    def __init__(self, role: Role, *, max_requests: int) -> None:
        self.role = role
        self.max_requests = max_requests
        self.draining = False
        self.loading: str = "the model is not loaded yet"
        """Why nothing can be served yet; empty once the engine runs."""
        self.failed: str = ""
        """Why the worker must be restarted; empty while it is sound."""
        self._tickets: set[Ticket] = set()

    @property
    def num_in_flight(self) -> int:
        """Requests that still hold anything."""
        return len(self._tickets)

    def tickets(self) -> list[Ticket]:
        """Requests in flight."""
        return list(self._tickets)

    def refusal(self, work: Work) -> KvasirError | None:
        """Why this work is not taken on now; None: it is."""
        if self.draining:
            return KvasirError(Reason.DRAINING, "the worker is draining")
        if self.failed or self.loading:
            return KvasirError(Reason.NO_WORKER, self.failed or self.loading, retry_after_ms=1000)
        if self.role not in _ROLES_OF_WORK[work]:
            return KvasirError(
                Reason.NO_WORKER, f"a worker with role {self.role} does not serve {work}"
            )
        if len(self._tickets) >= self.max_requests:
            return KvasirError(
                Reason.OVERLOADED,
                f"{len(self._tickets)} requests are in flight",
                retry_after_ms=1000,
            )
        return None

    def admit(self, work: Work, *, request_id: str, end: Callable[[KvasirError], None]) -> Ticket:
        """Takes a request on.

        Raises:
            KvasirError: DRAINING, NO_WORKER (loading, failed, wrong role) or OVERLOADED.
        """
        refusal = self.refusal(work)
        if refusal is not None:
            raise refusal
        ticket = Ticket(request_id, work, end)
        self._tickets.add(ticket)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """The request is over and holds nothing any more."""
        self._tickets.remove(ticket)

    def end_all(self, error: KvasirError) -> int:
        """Makes every request in flight end with `error`; returns how many there were."""
        tickets = self.tickets()
        for ticket in tickets:
            ticket.end(error)
        return len(tickets)


class TransferHealth:
    """Whether KV can be moved to this worker: a circuit breaker over the results of transfers.

    Invariant: unhealthy exactly after `failures_max` consecutive failures or a failed canary, until
    a transfer or a probe succeeds.
    """

    def __init__(self, *, failures_max: int) -> None:
        self.failures_max = failures_max
        self.num_consecutive = 0
        self.error = ""
        self.has_crossed = False
        """In this life KV has been pulled from a peer, or by one."""

    @property
    def healthy(self) -> bool:
        """Transfers are expected to work."""
        return self.num_consecutive < self.failures_max

    def succeeded(self) -> None:
        """A transfer or a probe worked."""
        self.num_consecutive = 0
        self.error = ""

    def crossed(self) -> None:
        """KV of a peer arrived."""
        self.succeeded()
        self.has_crossed = True

    def failed(self, error: str) -> None:
        """A transfer did not work."""
        self.num_consecutive += 1
        self.error = error

    def broke(self, error: str) -> None:
        """The data plane is known not to work: no need to wait for more failures."""
        self.num_consecutive = max(self.num_consecutive, self.failures_max)
        self.error = error

    def not_crossed(self, error: str) -> None:
        """No canary came from any peer: believed at once unless KV has crossed before."""
        if self.has_crossed:
            self.failed(error)
        else:
            self.broke(error)

    def on_probation(self) -> None:
        """Nothing is known any more: try transfers again, and believe the next failure at once."""
        self.num_consecutive = min(self.num_consecutive, self.failures_max - 1)
