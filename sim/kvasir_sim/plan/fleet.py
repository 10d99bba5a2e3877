"""Workers of two pools: who serves in which role, who is still starting, and what that costs.

A worker that is ordered is paid from that moment; one that changes its role serves nobody for a
while; one that is given up is paid until it is drained.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvasir_operator.core.planner.facts import PoolTarget, Role

from kvasir_sim.plan.settings import PlanSimSettings


@dataclass(slots=True)
class Worker:
    """One worker. Times in seconds since the begin of the trace."""

    home: Role  # its pool
    role: Role
    ready_s: float
    free_s: float = 0.0  # prefill: when the work that it has is done


@dataclass(slots=True)
class Fleet:
    """The workers there are."""

    settings: PlanSimSettings
    workers: list[Worker] = field(default_factory=list)
    drained_s: list[float] = field(default_factory=list)  # ends of drains that are still paid
    worker_s: float = 0.0
    num_flips: int = 0
    num_changes: int = 0

    def serving(self, role: Role, now_s: float) -> list[Worker]:
        """Workers that take requests of a role."""
        return [w for w in self.workers if w.role is role and w.ready_s <= now_s]

    def replicas(self, home: Role) -> int:
        """Workers of a pool, starting ones too."""
        return sum(worker.home is home for worker in self.workers)

    def lent(self, home: Role) -> int:
        """Workers of a pool that serve in the other role."""
        return sum(worker.home is home and worker.role is not home for worker in self.workers)

    def pay(self, span_s: float, now_s: float) -> None:
        """The workers' time."""
        self.drained_s = [end_s for end_s in self.drained_s if end_s > now_s]
        self.worker_s += span_s * (len(self.workers) + len(self.drained_s))

    def change(self, targets: Sequence[PoolTarget], now_s: float, *, is_initial: bool) -> None:
        """Order, give up and flip workers; pools are named after their roles."""
        for target in targets:
            self._resize(Role(target.name), target.replicas, now_s, is_initial=is_initial)
        for target in targets:
            self._lend(Role(target.name), target.lent, now_s)

    def _resize(self, home: Role, replicas: int, now_s: float, *, is_initial: bool) -> None:
        surplus = self.replicas(home) - replicas
        self.num_changes += abs(surplus) if not is_initial else 0
        ready_s = now_s + (0 if is_initial else self.settings.startup_s)
        for _ in range(-surplus):
            self.workers.append(Worker(home, home, ready_s, free_s=ready_s))
        for worker in self._least_busy(home, surplus):
            self.workers.remove(worker)
            if worker.ready_s <= now_s:
                self.drained_s.append(max(worker.free_s, now_s + self.settings.drain_s))

    def _least_busy(self, home: Role, count: int) -> list[Worker]:
        """Who goes first: those that have not started yet, then the least work."""
        mine = [worker for worker in self.workers if worker.home is home]
        mine.sort(key=lambda w: (-w.ready_s, w.role is not home, w.free_s))
        return mine[: max(count, 0)]

    def _lend(self, home: Role, wanted: int, now_s: float) -> None:
        change = wanted - self.lent(home)
        source = home if change > 0 else home.other
        ready = [w for w in self.serving(source, now_s) if w.home is home]
        ready.sort(key=lambda worker: worker.free_s)
        for worker in ready[: abs(change)]:
            worker.role = source.other
            worker.ready_s = max(now_s, worker.free_s) + self.settings.flip_s
            worker.free_s = worker.ready_s
            self.num_flips += 1
