"""Consistent hashing with bounded loads, as KubeAI routes by prefix."""

from bisect import bisect_left

from kvasir_router.core.ring import HashRing

from kvasir_sim.baselines.estimate import prefix_key
from kvasir_sim.policy import Action, RoutingPolicy
from kvasir_sim.settings import SimSettings
from kvasir_sim.view import ReplicaView
from kvasir_sim.worker import Job

LOAD_FACTOR = 1.25
"""KubeAI's meanLoadFactor: no worker above 125 % of the mean."""


class Chwbl(RoutingPolicy):
    """The first worker clockwise of the key whose requests in flight stay within 1.25 x the mean.

    Mirrokni, Thorup and Zadimoghaddam (arXiv 1608.01350); KubeAI's PrefixHash strategy
    (internal/loadbalancer/balance_chwbl.go): load + 1 <= 1.25 (total + 1) / n, else the next; the
    key's owner if all are above. KubeAI's key is the beginning of the first user message, which a
    trace does not show: the first two blocks of 512 tokens stand for it.
    """

    def __init__(self, view: ReplicaView, settings: SimSettings, replica: int) -> None:
        super().__init__(view, settings, replica)
        self._ring = HashRing.build(view.members, person=b"chwbl")

    def choose(self, job: Job, now_ms: float) -> str | None:
        """Along the ring from the key on."""
        loads = {name: self.view.num_pending(name) for name in self.view.members}
        bound = LOAD_FACTOR * (sum(loads.values()) + 1) / len(loads)
        owners, points = self._ring.owners, self._ring.points
        start = bisect_left(points, int.from_bytes(prefix_key(job.request)[:8], "little"))
        for step in range(len(owners)):
            worker = owners[(start + step) % len(owners)]
            if loads[worker] + 1 <= bound:
                return worker
        return owners[start % len(owners)]

    def members(self, now_ms: float) -> tuple[Action, ...]:
        """Only the arcs beside a worker that came or went change hands."""
        self._ring = HashRing.build(self.view.members, person=b"chwbl")
        return ()
