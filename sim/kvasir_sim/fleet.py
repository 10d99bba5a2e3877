"""The modelled fleet: which workers exist, and what reports of them reach which router replica.

A report carries a worker's queue and the changes of its cache since the last one. A lost report's
changes of the cache come with the next (their numbers show the gap); until then that replica's
knowledge of the worker is older still.
"""

import random
from collections.abc import Sequence

from kvasir_router.core.prefix import PrefixView

from kvasir_sim.settings import SimSettings
from kvasir_sim.tier import KvTier
from kvasir_sim.trace import BLOCK_TOKENS
from kvasir_sim.view import ReplicaView, Report
from kvasir_sim.worker import Discipline, SimWorker, Speed

CacheChange = tuple[Sequence[bytes], Sequence[bytes]]


class _Audience:
    """Replicas that hear the same reports, with one index of the caches between them."""

    def __init__(self, blocks_max: int) -> None:
        self.blocks = PrefixView(blocks_max=blocks_max)
        self.views: list[ReplicaView] = []
        self.unheard: dict[str, list[CacheChange]] = {}

    def hear(self, worker: str, change: CacheChange) -> None:
        """A worker's cache has changed."""
        self.blocks.stored(worker, change[0])
        self.blocks.removed(worker, change[1])


class Fleet:
    """Workers and what is known of them."""

    def __init__(self, settings: SimSettings, discipline: Discipline, rng: random.Random) -> None:
        self.workers: dict[str, SimWorker] = {}
        self.retired: list[SimWorker] = []
        """Workers that left or failed: their figures count."""
        self.leaving: set[str] = set()
        self.is_exact = settings.replicas == 1 or settings.sync_ms == 0
        self._settings, self._discipline, self._random = settings, discipline, rng
        tier = KvTier(
            settings.kv_node_tokens,
            us_per_token=settings.kv_node_us_per_token,
            latency_ms=settings.kv_node_latency_ms,
        )
        self._tier = tier if settings.kv_node_tokens else None
        self._num_made = 0
        self._audiences = self._make_audiences()
        self.views = [view for audience in self._audiences for view in audience.views]
        self.join(settings.workers)

    def join(self, num_workers: int) -> None:
        """New workers, with empty caches."""
        for _ in range(num_workers):
            name = f"w{self._num_made}"
            is_slow = self._num_made < self._settings.slow_workers
            factor = self._settings.slow_factor if is_slow else 1.0
            self._num_made += 1
            self.workers[name] = SimWorker(
                name,
                Speed(
                    self._settings.prefill_us_per_token * factor,
                    self._settings.reuse_us_per_token,
                ),
                cache_tokens=self._settings.cache_tokens,
                discipline=self._discipline,
                tier=self._tier,
            )
        self._tell_members()

    def leave(self, num_workers: int) -> list[str]:
        """The newest workers take no more requests."""
        going = self.newest(num_workers)
        self.leaving.update(going)
        self._tell_members()
        return going

    def newest(self, num_workers: int) -> list[str]:
        """The members that came last; one member always stays."""
        members = [name for name in self.workers if name not in self.leaving]
        return members[1:][-num_workers:]

    def remove(self, name: str) -> None:
        """A worker is gone."""
        self.retired.append(self.workers.pop(name))
        self.leaving.discard(name)
        for audience in self._audiences:
            audience.blocks.forget(name)
            audience.unheard.pop(name, None)
        for view in self.views:
            view.left(name)
        self._tell_members()

    def all_workers(self) -> list[SimWorker]:
        """Those that are, and those that were."""
        return [*self.workers.values(), *self.retired]

    def stored(self, worker: str, new: Sequence[bytes], evicted: Sequence[bytes]) -> None:
        """A worker's cache has changed."""
        for audience in self._audiences:
            if self.is_exact:
                audience.hear(worker, (new, evicted))
            else:
                audience.unheard.setdefault(worker, []).append((new, evicted))

    def report(self, now_ms: float) -> None:
        """Every worker reports to every replica."""
        loss = self._settings.sync_loss
        for name, worker in self.workers.items():
            report = Report(now_ms, worker.pending_tokens(now_ms), worker.num_pending)
            for audience in self._audiences:
                if loss and self._random.random() < loss:
                    continue
                for change in audience.unheard.pop(name, ()):
                    audience.hear(name, change)
                for view in audience.views:
                    view.reported(name, report)

    def _make_audiences(self) -> list[_Audience]:
        settings = self._settings
        num_workers = settings.workers + sum(c.num_workers for c in settings.fleet_changes())
        blocks_max = 2 * num_workers * (settings.cache_tokens // BLOCK_TOKENS + 1)
        num_audiences = settings.replicas if settings.sync_loss and not self.is_exact else 1
        audiences = [_Audience(blocks_max) for _ in range(num_audiences)]
        for replica in range(settings.replicas):
            audience = audiences[replica % num_audiences]
            view = ReplicaView(self.workers, audience.blocks, is_exact=self.is_exact)
            audience.views.append(view)
        return audiences

    def _tell_members(self) -> None:
        members = tuple(name for name in self.workers if name not in self.leaving)
        for view in self.views:
            view.members = members
