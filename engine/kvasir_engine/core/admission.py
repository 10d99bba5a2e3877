"""The admission queue of a prefill worker: who is computed next, and who is given up, and when.

Requests wait here as tokens and a deadline, without KV memory. The worker alone knows its true
load, so it decides here what no router can:

    1. Those that can meet their deadline, earliest first. A prompt too long to meet it even on an
       idle worker is due later, by a bound, so that it neither starves nor takes from the others.
    2. When not all can be in time, the costliest of those up to the first late one goes
       (Moore-Hodgson: the fewest go). First the lowest priority, then tenants beyond their share.
    3. Who goes is handed back once, if another worker may serve it, else refused with a time after
       which a retry makes sense. This happens on arrival, not at the deadline.
    4. A short prompt passes long ones where that makes none of them late (LAPS).

Invariants: each request that comes in goes out once, computed, handed back, refused or removed;
all that wait are in time as far as estimates go; nobody waits longer than `wait_ms_max`. A tenant's
share is held by virtual time, as in start-time fair queueing (and VTC, OSDI 2024): each is charged
what it queues over its weight, and is beyond its share while it is ahead of the others' clock.

Sources: Moore 1968 (1||sum U_j); LAPS (arXiv 2601.11589); P/D-Serve (arXiv 2408.08147) for the
re-forwarding of refused requests.
"""

import enum
from dataclasses import dataclass, replace

from kvasir_engine.core.due_tree import Blame, DueTree, Node
from kvasir_engine.core.shares import Shares

RequestId = str | int

NEVER: Blame = (-(1 << 62), 0, 0.0)
"""Blame of what may not be refused."""


class Verdict(enum.StrEnum):
    """What becomes of a request that the queue gives up."""

    HAND_BACK = "hand_back"  # its other candidate may serve it in time
    REFUSE = "refuse"  # 429, with Retry-After


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request as the queue sees it. All times are of one clock."""

    request_id: RequestId
    arrived_ms: float
    """At the fleet's edge, not at this worker."""

    deadline_ms: float
    """Of the first token."""

    compute_ms: float
    """Estimated, of what is not cached."""

    tokens: int = 0
    """To compute."""

    tenant: str | bytes = ""
    weight: float = 1.0
    """The tenant's."""

    priority: int = 0
    """Greater is more important."""

    may_move: bool = False
    """Another worker is its candidate too, and it has not been handed back yet."""

    may_refuse: bool = True
    """Not so for what has begun elsewhere and must go on."""


@dataclass(frozen=True, slots=True)
class Dismissed:
    """A request that the queue gives up."""

    waiting: Waiting
    verdict: Verdict
    retry_after_ms: int


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds of one queue."""

    wait_ms_max: float = 30_000.0
    """A prompt that cannot meet its deadline on an idle worker is due by then after its arrival,
    and so is one whose deadline is later: nobody waits longer."""

    requests_max: int = 10_000
    """That wait at once. What comes then is given up."""

    short_ms_max: float = 500.0
    """Compute of a prompt that may pass longer ones."""


@dataclass(slots=True)
class _Entry:
    waiting: Waiting
    node: Node
    short: Node | None


class AdmissionQueue:
    """One worker's queue. O(log n) a call."""

    def __init__(self, limits: QueueLimits | None = None) -> None:
        self._limits = limits or QueueLimits()
        self._all, self._short = DueTree(), DueTree()
        self._entries: dict[RequestId, _Entry] = {}
        self._shares = Shares()
        self._num_seen = 0
        self.tokens = 0
        """To compute, of all that wait."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._entries

    @property
    def compute_ms(self) -> float:
        """Of all that wait."""
        return self._all.sum_ms

    def push(self, waiting: Waiting, *, now_ms: float, busy_ms: float = 0.0) -> list[Dismissed]:
        """Takes a request; `busy_ms` is what is left of the compute under way.

        Returns those that are given up for it, itself perhaps among them.
        """
        assert waiting.request_id not in self._entries, waiting.request_id
        if len(self._entries) >= self._limits.requests_max:
            return [_dismissed(waiting, self.compute_ms)]
        self._num_seen += 1
        is_beyond = self._shares.is_beyond(waiting.tenant, now_ms=now_ms)
        blame = NEVER
        if waiting.may_refuse:
            blame = (-waiting.priority, int(is_beyond), waiting.compute_ms)
        due_ms = self._due_ms(waiting, now_ms + busy_ms)
        node = Node(waiting.request_id, self._num_seen, due_ms, waiting.compute_ms, blame)
        self._shares.queue(
            waiting.tenant, weight=waiting.weight, compute_ms=waiting.compute_ms, now_ms=now_ms
        )
        self._add(waiting, node)
        return self.review(now_ms=now_ms, busy_ms=busy_ms)

    def pop(self, *, now_ms: float) -> tuple[Waiting | None, list[Dismissed]]:
        """The request to compute next, if any waits; and those that are no longer in time."""
        given_up = self.review(now_ms=now_ms)
        node = self._next(now_ms)
        return (self._take(node, is_served=True) if node else None), given_up

    def pop_short(self, *, now_ms: float, busy_ms: float, tokens_max: int) -> Waiting | None:
        """A short request to be computed beside a long one under way, of which `busy_ms` are left.

        None: there is none of at most `tokens_max`, or it would make one that waits late.
        """
        short = self._short.first()
        if short is None or self._entries[short.request_id].waiting.tokens > tokens_max:
            return None
        node = self._entries[short.request_id].node
        if self._all.late_before(node, now_ms + busy_ms + node.compute_ms) > 0:
            return None
        return self._take(node, is_served=True)

    def review(self, *, now_ms: float, busy_ms: float = 0.0) -> list[Dismissed]:
        """Gives up requests until the rest is in time."""
        given_up = []
        start_ms = now_ms + busy_ms
        while (victim := self._all.victim(start_ms)) is not None and victim.blame > NEVER:
            late_ms = self._all.late_ms(start_ms)
            given_up.append(_dismissed(self._take(victim), late_ms))
        return given_up

    def update(self, request_id: RequestId, *, compute_ms: float, tokens: int = 0) -> None:
        """Its estimate has changed: a prefix of it was computed, or was evicted."""
        entry = self._entries[request_id]
        self._shares.correct(entry.waiting.tenant, compute_ms=compute_ms - entry.waiting.compute_ms)
        waiting = replace(entry.waiting, compute_ms=compute_ms, tokens=tokens)
        self._take_out(entry)
        node = entry.node
        blame = node.blame if node.blame == NEVER else (*node.blame[:2], compute_ms)
        self._add(waiting, Node(request_id, node.number, node.due_ms, compute_ms, blame))

    def remove(self, request_id: RequestId) -> Waiting | None:
        """Takes out a request that was cancelled; None: it is not here any more."""
        entry = self._entries.get(request_id)
        return self._take(entry.node) if entry else None

    def drain(self) -> list[Waiting]:
        """Takes out all, those due first first."""
        left = []
        while (node := self._all.first()) is not None:
            left.append(self._take(node))
        return left

    def _next(self, now_ms: float) -> Node | None:
        """The one due first, or a short one for which the longer ones before it have time."""
        first, short = self._all.first(), self._short.first()
        if first is None or short is None:
            return first
        passing = self._entries[short.request_id].node
        late_ms = self._all.late_before(passing, now_ms + passing.compute_ms)
        return passing if late_ms <= 0 else first

    def _due_ms(self, waiting: Waiting, free_ms: float) -> float:
        bound_ms = waiting.arrived_ms + self._limits.wait_ms_max
        if not waiting.may_refuse:
            return max(waiting.deadline_ms, free_ms + waiting.compute_ms)
        if waiting.arrived_ms + waiting.compute_ms > waiting.deadline_ms:
            return bound_ms + waiting.compute_ms
        return min(waiting.deadline_ms, bound_ms + waiting.compute_ms)

    def _add(self, waiting: Waiting, node: Node) -> None:
        short = None
        if waiting.compute_ms <= self._limits.short_ms_max:
            short = replace(node)
            self._short.insert(short)
        self._all.insert(node)
        self._entries[waiting.request_id] = _Entry(waiting, node, short)
        self.tokens += waiting.tokens

    def _take_out(self, entry: _Entry) -> None:
        del self._entries[entry.waiting.request_id]
        self._all.remove(entry.node)
        if entry.short is not None:
            self._short.remove(entry.short)
        self.tokens -= entry.waiting.tokens

    def _take(self, node: Node, *, is_served: bool = False) -> Waiting:
        entry = self._entries[node.request_id]
        self._take_out(entry)
        waiting = entry.waiting
        self._shares.leave(waiting.tenant, compute_ms=waiting.compute_ms, is_served=is_served)
        return waiting


def _dismissed(waiting: Waiting, late_ms: float) -> Dismissed:
    verdict = Verdict.HAND_BACK if waiting.may_move else Verdict.REFUSE
    return Dismissed(waiting, verdict, max(int(late_ms) + 1, 1))
