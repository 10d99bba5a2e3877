"""What a routing policy is to the simulator, and what it may answer.

One policy stands in each router replica. It sees the fleet through its `ReplicaView` alone, is told
what a real router would be told, and answers with actions. A request that no action names stays
with the policy, as in a queue of the router's, until a later answer names it.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvasir_sim.settings import SimSettings
from kvasir_sim.view import ReplicaView
from kvasir_sim.worker import Discipline, Job


class Why(enum.StrEnum):
    """Why a worker gave a request back."""

    BUSY = "busy"  # it cannot make the request's deadline; another worker may
    FAILED = "failed"  # the worker is gone, and what it had begun is lost
    RECALLED = "recalled"  # the router had asked for it


@dataclass(frozen=True, slots=True)
class Send:
    """The request goes to `worker`."""

    job: Job
    worker: str
    may_move: bool = False
    """Whether the worker may hand it back for lack of time; else it refuses it then."""

    decode: str = ""
    """Who decodes it; empty: whom `choose_decode` names after the prefill."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """The request is answered 429."""

    job: Job


@dataclass(frozen=True, slots=True)
class Recall:
    """`worker` is asked to give the request back, which it does if it has not begun it."""

    job: Job
    worker: str


Action = Send | Refuse | Recall


class RoutingPolicy:
    """One router replica's decisions. Subclasses give `choose`, or `arrived` if they hold requests.

    Every method that returns actions may return none.
    """

    discipline: ClassVar[Discipline] = "fifo"
    """How the workers order what they were given."""

    tick_ms: ClassVar[float] = 0.0
    """How often `tick` is called; 0: never."""

    def __init__(self, view: ReplicaView, settings: SimSettings, replica: int) -> None:
        self.view, self.settings, self.replica = view, settings, replica

    def meet(self, peers: Sequence["RoutingPolicy"]) -> None:
        """The other replicas, once all are there."""

    def choose(self, job: Job, now_ms: float) -> str | None:
        """The worker of a request; None: it is refused."""
        raise AssertionError("a policy gives choose() or arrived()")

    def arrived(self, job: Job, now_ms: float) -> Sequence[Action]:
        """A client's request."""
        worker = self.choose(job, now_ms)
        return (Refuse(job),) if worker is None else (Send(job, worker),)

    def returned(self, job: Job, worker: str, why: Why, now_ms: float) -> Sequence[Action]:
        """A worker gave back a request that this replica had sent: routed anew, as a rule."""
        return self.arrived(job, now_ms)

    def first_token(self, job: Job, worker: str, now_ms: float) -> Sequence[Action]:
        """The first token of a request that this replica had sent passes through it."""
        return ()

    def refused(self, job: Job, worker: str, now_ms: float) -> Sequence[Action]:
        """The worker answered a request of this replica 429: it is no more in flight either."""
        return self.first_token(job, worker, now_ms)

    def choose_decode(self, job: Job, now_ms: float) -> str:
        """Who decodes a request whose prompt is computed: the least busy, as far as known."""
        return min(self.view.decode, key=self.view.decode_running)

    def decode_reported(self, now_ms: float) -> None:
        """`view.decode` is new."""

    def ended(self, job: Job, now_ms: float) -> None:
        """The last token of a request has passed through this replica."""

    def tick(self, now_ms: float) -> Sequence[Action]:
        """Time has passed."""
        return ()

    def members(self, now_ms: float) -> Sequence[Action]:
        """`view.members` has changed: what is held for a worker that left must go elsewhere."""
        return ()
