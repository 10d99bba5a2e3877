"""DualMap as published: two candidates, queues at the router, rebalancing of hotspots."""

from bisect import insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kvasir_router.core.ring import RingPair

from kvasir_sim.baselines.estimate import hit_tokens, ttft_ms
from kvasir_sim.baselines.hotness import HotnessTree
from kvasir_sim.policy import Action, RoutingPolicy, Send, Why
from kvasir_sim.settings import SimSettings
from kvasir_sim.view import ReplicaView
from kvasir_sim.worker import Job

ACCEPTED_MAX = 2
"""Requests of this router that a worker holds and has not prefilled: the rest wait here."""

WAIT_MS_MAX = 3_000.0
"""A worker whose oldest queued request has waited longer is hot."""

Runs = Mapping[str, int]


@dataclass(frozen=True, slots=True, order=True)
class _Held:
    """A request in the queue for a worker: greater priority, then longer hit, then arrival."""

    rank: tuple[int, int, float, int]
    job: Job = field(compare=False)
    key: bytes = field(compare=False)
    tokens: int = field(compare=False)
    """To compute there, as judged when it came."""


class _Queue:
    """What waits at this router for one worker, and what the worker has accepted from it."""

    def __init__(self) -> None:
        self.held: list[_Held] = []
        self.tokens = 0
        self.accepted: dict[int, int] = {}  # request -> its uncached tokens

    def add(self, held: _Held) -> None:
        insort(self.held, held)
        self.tokens += held.tokens

    def take(self, held: _Held) -> None:
        self.held.remove(held)
        self.tokens -= held.tokens

    def oldest_ms(self, now_ms: float) -> float:
        """How long the longest has waited, from when it came to the router."""
        return max((now_ms - held.job.arrival_ms for held in self.held), default=0.0)


class DualMap(RoutingPolicy):
    """DualMap (ICLR 26, arXiv 2602.06502), its sections 3.2 to 3.4 and appendix A.1.

    Of the two workers of a request's key, the one with the longer prefix hit, unless its estimated
    TTFT passes half the SLO: then the smaller estimate; equal hits, likewise. Requests wait at the
    router per worker, by priority, hit and arrival; a worker is given a few at a time, within the
    tokens that it computes in one SLO. A worker is hot if its queue exceeds the SLO or its oldest
    request waited for 3 s. When both candidates of a request are hot, or on a tick when a worker
    is, queued requests move to their other candidate (a ring neighbour if that one is hot too),
    largest gain first, in one pass, while the target stays within the SLO and the source is hot.

    Several replicas each keep queues of their own, which the others do not see.
    """

    tick_ms = 100.0

    def __init__(self, view: ReplicaView, settings: SimSettings, replica: int) -> None:
        super().__init__(view, settings, replica)
        self._tree = HotnessTree()
        self._rings = RingPair.build(view.members)
        self._queues = {name: _Queue() for name in view.members}

    def arrived(self, job: Job, now_ms: float) -> list[Action]:
        """Into the queue of one of its two workers."""
        key = self._tree.key(job.request, len(self.view.members))
        pair = self._rings.candidates(key)
        runs = self.view.leading(job.request.names)
        estimates = {name: self._estimate_ms(job, name, runs, now_ms) for name in pair}
        worker = self._choose(job, estimates, runs)
        self._hold(job, key, worker, runs)
        touched = {worker}
        if min(estimates.values()) > self.settings.slo_ttft_ms:
            for name in pair:
                touched |= self._rebalance(name, now_ms)
        return self._release(touched)

    def first_token(self, job: Job, worker: str, now_ms: float) -> list[Action]:
        """Room for the next."""
        if worker in self._queues:
            self._queues[worker].accepted.pop(job.index, None)
        return self._release({worker})

    def returned(self, job: Job, worker: str, why: Why, now_ms: float) -> list[Action]:
        """The worker failed: routed anew."""
        if worker in self._queues:
            self._queues[worker].accepted.pop(job.index, None)
        return self.arrived(job, now_ms)

    def tick(self, now_ms: float) -> list[Action]:
        """Hot workers give away what others can serve in time."""
        touched: set[str] = set()
        for name in self.view.members:
            if self._queues[name].held and self._is_hot(name, now_ms):
                touched |= self._rebalance(name, now_ms)
        return self._release(touched)

    def members(self, now_ms: float) -> list[Action]:
        """Rings over the new members; what waited for a worker that left is routed anew."""
        old = self._queues
        self._rings = RingPair.build(self.view.members)
        self._queues = {name: old.get(name, _Queue()) for name in self.view.members}
        left = [held.job for name in old.keys() - self._queues for held in old[name].held]
        return [action for job in left for action in self.arrived(job, now_ms)]

    def _choose(self, job: Job, estimates: Mapping[str, float], runs: Runs) -> str:
        """The SLO-aware choice (3.2)."""
        longest = max(runs.get(name, 0) for name in estimates)
        longer = [name for name in estimates if runs.get(name, 0) == longest]
        if len(longer) == 1 and estimates[longer[0]] <= self.settings.slo_ttft_ms / 2:
            return longer[0]
        return min(estimates, key=estimates.__getitem__)

    def _estimate_ms(self, job: Job, worker: str, runs: Runs, now_ms: float) -> float:
        """TTFT, with what waits here for the worker."""
        return ttft_ms(self, job, worker, runs, now_ms) + self._queued_ms(worker)

    def _queued_ms(self, worker: str) -> float:
        return self._queues[worker].tokens * self.view.us_per_token(worker) / 1_000

    def _load_ms(self, worker: str, now_ms: float) -> float:
        pending_ms = (
            self.view.pending_tokens(worker, now_ms) * self.view.us_per_token(worker) / 1_000
        )
        return pending_ms + self._queued_ms(worker)

    def _is_hot(self, worker: str, now_ms: float) -> bool:
        if self._load_ms(worker, now_ms) > self.settings.slo_ttft_ms:
            return True
        return self._queues[worker].oldest_ms(now_ms) > WAIT_MS_MAX

    def _hold(self, job: Job, key: bytes, worker: str, runs: Runs) -> None:
        hit = hit_tokens(job.request, runs.get(worker, 0))
        rank = (-job.request.priority, -hit, job.arrival_ms, job.index)
        self._queues[worker].add(_Held(rank, job, key, job.request.input_tokens - hit))

    def _release(self, workers: Iterable[str]) -> list[Action]:
        """What the workers' allowance lets go."""
        released: list[Action] = []
        for name in workers:
            queue = self._queues.get(name)
            while queue and queue.held and self._has_room(name, queue):
                held = queue.held[0]
                queue.take(held)
                queue.accepted[held.job.index] = held.tokens
                released.append(Send(held.job, name))
        return released

    def _has_room(self, worker: str, queue: _Queue) -> bool:
        """A few requests, and no more tokens than one SLO computes."""
        tokens = sum(queue.accepted.values()) + queue.held[0].tokens
        budget = self.settings.slo_ttft_ms * 1_000 / self.view.us_per_token(worker)
        return not queue.accepted or (len(queue.accepted) < ACCEPTED_MAX and tokens <= budget)

    def _rebalance(self, source: str, now_ms: float) -> set[str]:
        """Moves what gains most away from a hot worker (3.3); the workers that were given some."""
        slo_ms = self.settings.slo_ttft_ms
        if all(self._load_ms(name, now_ms) > slo_ms for name in self.view.members):
            return set()
        given: set[str] = set()
        for gain_ms, held, target, runs in self._moves(source, now_ms):
            if gain_ms <= 0 or not self._is_hot(source, now_ms):
                break
            if self._estimate_ms(held.job, target, runs, now_ms) <= slo_ms:
                self._queues[source].take(held)
                self._hold(held.job, held.key, target, runs)
                given.add(target)
        return given

    def _moves(self, source: str, now_ms: float) -> list[tuple[float, _Held, str, Runs]]:
        """What may move from `source` and where to, by gain."""
        us = self.view.us_per_token(source)
        before_ms = self.view.pending_tokens(source, now_ms) * us / 1_000
        hot = {name for name in self.view.members if self._is_hot(name, now_ms)}
        found = []
        for held in self._queues[source].held:
            before_ms += held.tokens * us / 1_000
            target = self._target(source, held.key, hot)
            if target is not None:
                runs = self.view.leading(held.job.request.names)
                after_ms = self._estimate_ms(held.job, target, runs, now_ms)
                found.append((before_ms - after_ms, held, target, runs))
        return sorted(found, key=lambda move: (-move[0], move[1].job.index))

    def _target(self, source: str, key: bytes, hot: set[str]) -> str | None:
        """The other candidate, or the source's neighbour when that is hot."""
        pair = self._rings.candidates(key)
        other = next((name for name in pair if name != source), None)
        if other is not None and other not in hot:
            return other
        ring = self._rings.members
        neighbour = ring[(ring.index(source) + 1) % len(ring)]
        return None if neighbour == source else neighbour
