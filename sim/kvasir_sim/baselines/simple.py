"""The plainest baselines: blind turns, the shortest queue, one hash, and the smallest estimate.

They are the four that DualMap compares itself with beside Preble (arXiv 2602.06502, section 4.1).
"""

from kvasir_router.core.ring import HashRing

from kvasir_sim.baselines.estimate import prefix_key, ttft_ms
from kvasir_sim.policy import Action, RoutingPolicy
from kvasir_sim.settings import SimSettings
from kvasir_sim.view import ReplicaView
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


class Affinity(RoutingPolicy):
    """One consistent hash of the prompt's first two blocks of 512 tokens (DualMap's own key)."""

    def __init__(self, view: ReplicaView, settings: SimSettings, replica: int) -> None:
        super().__init__(view, settings, replica)
        self._ring = HashRing.build(view.members, person=b"affinity")

    def choose(self, job: Job, now_ms: float) -> str | None:
        """The key's owner, however busy."""
        return self._ring.owner(int.from_bytes(prefix_key(job.request)[:8], "little"))

    def members(self, now_ms: float) -> tuple[Action, ...]:
        """Only the arcs beside a worker that came or went change hands."""
        self._ring = HashRing.build(self.view.members, person=b"affinity")
        return ()


class MinTtft(RoutingPolicy):
    """The worker with the smallest estimated TTFT: queue, compute and reuse.

    Mooncake's cache-aware prefill scheduling (FAST 25, section 6.1) without its transfer of hot
    blocks, as DualMap's authors reduce it.
    """

    def choose(self, job: Job, now_ms: float) -> str | None:
        """The smallest over all workers; ties go to the first."""
        runs = self.view.leading(job.request.names)
        return min(self.view.members, key=lambda name: ttft_ms(self, job, name, runs, now_ms))
