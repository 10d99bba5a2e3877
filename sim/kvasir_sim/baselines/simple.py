"""The plainest baselines: blind turns, and the shortest queue."""

from kvasir_sim.policy import RoutingPolicy
from kvasir_sim.worker import Job


class RoundRobin(RoutingPolicy):
    """One worker after the other."""

    _turn = 0

    def choose(self, job: Job, now_ms: float) -> str | None:
        """The next one."""
        self._turn += 1
        return self.view.members[(self._turn - 1) % len(self.view.members)]


class LeastLoaded(RoutingPolicy):
    """The worker with the fewest uncached prompt tokens pending."""

    def choose(self, job: Job, now_ms: float) -> str | None:
        """The least pending; ties go to the first."""
        return min(self.view.members, key=lambda name: self.view.pending_tokens(name, now_ms))
