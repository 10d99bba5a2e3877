"""SGLang's cache-aware router."""

import random

from kvasir_sim.baselines.estimate import hit_tokens
from kvasir_sim.baselines.placed import PlacedPrefixes
from kvasir_sim.policy import Action, RoutingPolicy, Why
from kvasir_sim.settings import SimSettings
from kvasir_sim.view import ReplicaView
from kvasir_sim.worker import Job

CACHE_THRESHOLD = 0.3
BALANCE_ABS_THRESHOLD = 64
BALANCE_REL_THRESHOLD = 1.5


class SglangCacheAware(RoutingPolicy):
    """Longest match by the router's own tree while balanced, else the shortest queue.

    sgl-router/src/policies/cache_aware.rs with its defaults: unbalanced is max - min > 64 requests
    and max > 1.5 min, by the requests that this router has in flight; then the least loaded worker.
    Balanced: more than 30 % of the prompt matched, the worker matched; less, the worker with the
    smallest tree. (There a request is in flight until its last token, here until its first.)
    """

    def __init__(self, view: ReplicaView, settings: SimSettings, replica: int) -> None:
        super().__init__(view, settings, replica)
        self._tree = PlacedPrefixes(settings)
        self._loads = dict.fromkeys(view.members, 0)
        self._random = random.Random(f"{settings.seed}/{replica}")

    def choose(self, job: Job, now_ms: float) -> str | None:
        """One of two modes, by the balance of this router's requests."""
        most, least = max(self._loads.values()), min(self._loads.values())
        if most - least > BALANCE_ABS_THRESHOLD and most > BALANCE_REL_THRESHOLD * least:
            worker = min(self.view.members, key=self._loads.__getitem__)
        else:
            worker = self._by_tree(job)
        self._tree.place(worker, job.request)
        self._loads[worker] += 1
        return worker

    def _by_tree(self, job: Job) -> str:
        runs = self._tree.leading(job.request)
        longest = max(runs.values(), default=0)
        if hit_tokens(job.request, longest) > CACHE_THRESHOLD * job.request.input_tokens:
            return self._random.choice([name for name, run in runs.items() if run == longest])
        return min(self.view.members, key=self._tree.num_blocks)

    def first_token(self, job: Job, worker: str, now_ms: float) -> tuple[Action, ...]:
        """One fewer in flight."""
        self._ended(worker)
        return ()

    def returned(self, job: Job, worker: str, why: Why, now_ms: float) -> tuple[Action, ...]:
        """One fewer in flight there, and routed anew."""
        self._ended(worker)
        return tuple(self.arrived(job, now_ms))

    def members(self, now_ms: float) -> tuple[Action, ...]:
        """The tree forgets who has left."""
        self._tree.keep_only(self.view.members)
        self._loads = {name: self._loads.get(name, 0) for name in self.view.members}
        return ()

    def _ended(self, worker: str) -> None:
        if worker in self._loads:
            self._loads[worker] -= 1
