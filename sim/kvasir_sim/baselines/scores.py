"""Rules that score every worker and take the best: Dynamo, llm-d and LMetric."""

import random
from collections import Counter

from kvasir_sim.baselines.estimate import hit_tokens
from kvasir_sim.baselines.placed import PlacedPrefixes
from kvasir_sim.policy import Action, RoutingPolicy, Why
from kvasir_sim.settings import SimSettings
from kvasir_sim.trace import BLOCK_TOKENS
from kvasir_sim.view import ReplicaView
from kvasir_sim.worker import Job

LLMD_QUEUE_WEIGHT = 2
LLMD_KV_UTILISATION_WEIGHT = 2
LLMD_PREFIX_WEIGHT = 3


class Dynamo(RoutingPolicy):
    """Smallest prefill blocks + decode blocks.

    NVIDIA Dynamo's KV router (lib/kv-router/src/scheduling/selector.rs) with its defaults: overlap
    credit 1, prefill load scale 1, temperature 0. Prefill blocks: active prefill tokens and this
    prompt less its overlap there, in blocks. Decode blocks: distinct blocks of the requests active
    there with this one; a worker's are those that this router sent, until the first token.
    """

    def __init__(self, view: ReplicaView, settings: SimSettings, replica: int) -> None:
        super().__init__(view, settings, replica)
        self._active: dict[str, Counter[bytes]] = {}

    def choose(self, job: Job, now_ms: float) -> str | None:
        """The smallest logit; ties go to the first."""
        runs = self.view.leading(job.request.names)
        worker = min(
            self.view.members, key=lambda name: self._logit(job, name, runs.get(name, 0), now_ms)
        )
        self._active.setdefault(worker, Counter()).update(job.request.names)
        return worker

    def _logit(self, job: Job, worker: str, run: int, now_ms: float) -> float:
        uncached = job.request.input_tokens - hit_tokens(job.request, run)
        prefill_blocks = (self.view.pending_tokens(worker, now_ms) + uncached) / BLOCK_TOKENS
        active = self._active.get(worker, Counter[bytes]())
        new_blocks = sum(name not in active for name in job.request.names)
        return prefill_blocks + len(active) + new_blocks

    def first_token(self, job: Job, worker: str, now_ms: float) -> tuple[Action, ...]:
        """Its blocks are active no more."""
        self._ended(job, worker)
        return ()

    def returned(self, job: Job, worker: str, why: Why, now_ms: float) -> tuple[Action, ...]:
        """Its blocks are not active there, and it is routed anew."""
        self._ended(job, worker)
        return tuple(self.arrived(job, now_ms))

    def _ended(self, job: Job, worker: str) -> None:
        active = self._active[worker]
        for name in job.request.names:
            active[name] -= 1
            if not active[name]:
                del active[name]


class LlmD(RoutingPolicy):
    """Largest weighted sum of queue, KV utilisation and prefix scores.

    llm-d's default profile (config/charts/routerlib/templates/_config.yaml): queue-scorer 2
    (shortest 1, longest 0, linear between), kv-cache-utilization-scorer 2 (1 - share in use),
    prefix-cache-scorer 3 (blocks matched / blocks, by the endpoint picker's own index of what it
    routed); the best of them, equal ones at random. The same three scorers are the default of the
    Gateway API Inference Extension.
    """

    def __init__(self, view: ReplicaView, settings: SimSettings, replica: int) -> None:
        super().__init__(view, settings, replica)
        self._index = PlacedPrefixes(settings)
        self._random = random.Random(f"{settings.seed}/{replica}")

    def choose(self, job: Job, now_ms: float) -> str | None:
        """The best score."""
        runs = self._index.leading(job.request)
        queues = {name: self.view.num_pending(name) for name in self.view.members}
        shortest, longest = min(queues.values()), max(queues.values())
        scores = {
            name: LLMD_QUEUE_WEIGHT * _relative(longest - queue, longest - shortest)
            + LLMD_KV_UTILISATION_WEIGHT * (1 - self._share_in_use(name, now_ms))
            + LLMD_PREFIX_WEIGHT * runs.get(name, 0) / len(job.request.names)
            for name, queue in queues.items()
        }
        best = max(scores.values())
        worker = self._random.choice([name for name, score in scores.items() if score == best])
        self._index.place(worker, job.request)
        return worker

    def _share_in_use(self, worker: str, now_ms: float) -> float:
        return min(self.view.pending_tokens(worker, now_ms) / self.settings.cache_tokens, 1.0)

    def members(self, now_ms: float) -> tuple[Action, ...]:
        """The index forgets who has left."""
        self._index.keep_only(self.view.members)
        return ()


class LMetric(RoutingPolicy):
    """Smallest product of prefill tokens and batch size.

    LMetric (OSDI 26, arXiv 2603.15202, section 5): P-token, the prefill tokens that wait at the
    worker with those that this prompt adds there, times BS, its requests queued and running with
    this one. No weights; its detector of hot prefixes, which the authors did not see fire on real
    traces, is left out.
    """

    def choose(self, job: Job, now_ms: float) -> str | None:
        """The smallest product; ties go to the first."""
        runs = self.view.leading(job.request.names)

        def product(name: str) -> float:
            uncached = job.request.input_tokens - hit_tokens(job.request, runs.get(name, 0))
            prefill_tokens = self.view.pending_tokens(name, now_ms) + uncached
            return prefill_tokens * (self.view.num_pending(name) + 1)

        return min(self.view.members, key=product)


def _relative(part: int, whole: int) -> float:
    return part / whole if whole else 1.0
