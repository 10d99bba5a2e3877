"""Preble's E2: exploit a long cached prefix, else explore by cost."""

from collections import deque

from kvasir_sim.baselines.estimate import hit_tokens
from kvasir_sim.baselines.placed import PlacedPrefixes
from kvasir_sim.policy import Action, RoutingPolicy
from kvasir_sim.settings import SimSettings
from kvasir_sim.view import ReplicaView
from kvasir_sim.worker import Job

WINDOW_MS = 180_000.0
"""H: the load of a worker is what it was given in the last three minutes."""

BALANCE_THRESHOLD = 2.0
"""Th_bal: a worker with more than this many times the load of the lightest is not exploited. The
paper leaves it open."""


class Preble(RoutingPolicy):
    """E2, the global scheduler of Preble (ICLR 25, arXiv 2407.00023, section 3.2).

    More of the prompt cached than not: among the workers that hold the longest match, the one with
    the least load (exploit); when that one is far heavier than the lightest, the lightest (3.3,
    load shifting). Otherwise the least L + M + P over all workers (explore): L is the work given to
    a worker in the window H, P the prefill that the prompt needs there; M, the cost of evicting, is
    0, as in the authors' default (enable_eviction=False in global_scheduler_with_time.py). What
    each worker holds is judged by the scheduler's own tree. Its workers' local order, by groups of
    hit rate, is not modelled: they serve in order of arrival.
    """

    def __init__(self, view: ReplicaView, settings: SimSettings, replica: int) -> None:
        super().__init__(view, settings, replica)
        self._tree = PlacedPrefixes(settings)
        self._loads_ms = dict.fromkeys(view.members, 0.0)
        self._given: deque[tuple[float, str, float]] = deque()  # (when, worker, work in ms)

    def choose(self, job: Job, now_ms: float) -> str | None:
        """Exploit or explore."""
        self._slide(now_ms)
        runs = self._tree.leading(job.request)
        worker = self._exploit(job, runs) or min(
            self.view.members,
            key=lambda name: self._loads_ms[name] + self._prefill_ms(job, name, runs),
        )
        work_ms = self._prefill_ms(job, worker, runs)
        self._given.append((now_ms, worker, work_ms))
        self._loads_ms[worker] += work_ms
        self._tree.place(worker, job.request)
        return worker

    def _exploit(self, job: Job, runs: dict[str, int]) -> str | None:
        longest = max(runs.values(), default=0)
        if 2 * hit_tokens(job.request, longest) <= job.request.input_tokens:
            return None
        holders = [name for name, run in runs.items() if run == longest]
        holder = min(holders, key=self._loads_ms.__getitem__)
        lightest = min(self.view.members, key=self._loads_ms.__getitem__)
        is_heavy = self._loads_ms[holder] > BALANCE_THRESHOLD * self._loads_ms[lightest]
        return lightest if is_heavy else holder

    def _prefill_ms(self, job: Job, worker: str, runs: dict[str, int]) -> float:
        uncached = job.request.input_tokens - hit_tokens(job.request, runs.get(worker, 0))
        return uncached * self.view.us_per_token(worker) / 1_000

    def _slide(self, now_ms: float) -> None:
        while self._given and self._given[0][0] < now_ms - WINDOW_MS:
            _, worker, work_ms = self._given.popleft()
            if worker in self._loads_ms:
                self._loads_ms[worker] -= work_ms

    def members(self, now_ms: float) -> tuple[Action, ...]:
        """The tree forgets who has left; who comes has no load."""
        self._tree.keep_only(self.view.members)
        self._given = deque(one for one in self._given if one[1] in self.view.members)
        self._loads_ms = {name: self._loads_ms.get(name, 0.0) for name in self.view.members}
        return ()
