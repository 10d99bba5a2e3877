"""The cheapest way to cover needs with workers of several pools, by exact search.

Every constraint is linear: a worker of pool j in role r covers the share `cover[k]` of need k (what
one of x workers covers, if x alone suffice). The search is depth-first with fractional lower
bounds (branch and bound; the mix of Melange, arXiv 2404.14527, as a covering problem). Its answer
is the least by (money, workers, changes of lent workers); among equals, the first one found in an
order that depends on the problem alone.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

NODES_MAX = 50_000
"""Nodes of one search, about a second; above it the best mix so far counts, and the answer says so.
Two pools need at most a few hundred."""

EPSILON = 1e-9
Cost = tuple[int, int, int]  # cents per hour, workers, changes of lent workers


@dataclass(frozen=True, slots=True)
class Choice:
    """One pool, as the search sees it."""

    low: int
    high: int
    cents: int
    weights: tuple[int, ...]  # what one worker takes of each budget
    is_prefill: bool
    own: tuple[float, ...]  # what one worker covers in its own role
    other: tuple[float, ...]  # and in the other one
    lent: int  # at present
    lent_min: int
    lent_max: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Pools, needs and bounds."""

    choices: tuple[Choice, ...]
    groups: tuple[range, ...]  # indices of the needs that each role has to itself
    needs: tuple[float, ...]
    budgets: tuple[int, ...]
    prefill_percent_min: int = 0
    prefill_percent_max: int = 100


@dataclass(frozen=True, slots=True)
class Mix:
    """Workers and lent workers per pool."""

    counts: tuple[tuple[int, int], ...]
    cost: Cost
    is_exact: bool = True


def cheapest(problem: Problem) -> Mix | None:
    """The cheapest mix that covers every need within the bounds; None: there is none."""
    order = sorted(range(len(problem.choices)), key=lambda j: (_price(problem.choices[j]), j))
    search = _Search(problem, tuple(problem.choices[j] for j in order))
    search.descend(_Node(problem.needs, problem.budgets))
    if search.best is None:
        return None
    by_pool = dict(zip(order, search.best.counts, strict=True))
    counts = tuple(by_pool[j] for j in range(len(order)))
    return Mix(counts, search.best.cost, is_exact=search.num_nodes <= NODES_MAX)


def _price(choice: Choice) -> tuple[float, float]:
    """Money and workers for a unit of the need that the pool covers worst: cheap pools go first."""
    cover = min((share for share in choice.own if share > 0), default=EPSILON)
    return choice.cents / cover, 1 / cover


@dataclass(frozen=True, slots=True)
class _Node:
    """A mix of the first pools."""

    needs: tuple[float, ...]  # still to be covered
    budgets: tuple[int, ...]  # still to be spent
    cost: Cost = (0, 0, 0)
    counts: tuple[tuple[int, int], ...] = ()
    num_prefill: int = 0


@dataclass(slots=True)
class _Search:
    problem: Problem
    choices: tuple[Choice, ...]
    best: _Node | None = None
    num_nodes: int = 0
    rates: list[list[tuple[float, ...]]] = field(default_factory=list)
    """Per depth and need: the least cents, workers and budgets for a unit of the need."""

    reach: list[list[float]] = field(default_factory=list)
    """Per depth and need: how much of it the pools from there on can cover at most."""

    lows: list[tuple[int, ...]] = field(default_factory=list)
    """Per depth: cents, workers and budgets that the pools' lower bounds alone take."""

    def __post_init__(self) -> None:
        for depth in range(len(self.choices) + 1):
            rest, needs = self.choices[depth:], range(len(self.problem.needs))
            self.rates.append([_rates(rest, k, len(self.problem.budgets)) for k in needs])
            self.lows.append(_lows(rest, len(self.problem.budgets)))
            self.reach.append([sum(_reach(choice, k) for choice in rest) for k in needs])

    def descend(self, node: _Node) -> None:
        """Try every count of the next pool that may still lead to a better mix."""
        depth = len(node.counts)
        if depth == len(self.choices):
            if self._is_allowed(node) and (self.best is None or node.cost < self.best.cost):
                self.best = node
            return
        choice = self.choices[depth]
        for lent in _nearest_first(choice):
            bound = self._bound(node)
            if bound is None or self._is_worse(_add(bound, (0, 0, abs(lent - choice.lent)))):
                return  # a lent number still further away is no better
            alone = max(choice.low, lent, _least_replicas(node.needs, choice, lent))
            for replicas in self._counts(node, choice, lent, alone):
                self.num_nodes += 1
                if self.num_nodes > NODES_MAX:
                    return
                child = _extend(node, choice, replicas, lent)
                bound = self._bound(child)
                if bound is not None and not self._is_worse(bound):
                    self.descend(child)
                elif replicas > alone:
                    break  # nothing of its role is left to cover: more cost more

    def _counts(self, node: _Node, choice: Choice, lent: int, alone: int) -> Iterable[int]:
        """Numbers of workers: first what would do alone, then fewer, then more.

        More than what would do alone serve only to keep the share of prefill.
        """
        if len(node.counts) == len(self.choices) - 1:
            least = max(alone, self._least_for_ratio(node, choice, lent))
            return (least,) if least <= choice.high else ()
        fewer = range(min(alone, choice.high), max(choice.low, lent) - 1, -1)
        problem = self.problem
        if (problem.prefill_percent_min, problem.prefill_percent_max) == (0, 100):
            return fewer
        return chain(fewer, range(alone + 1, choice.high + 1))

    def _least_for_ratio(self, node: _Node, choice: Choice, lent: int) -> int:
        """Workers of the last pool from which on the share of prefill is as it must be.

        A pool of the other role only moves the share the other way, so one side decides.
        """
        low, high = self.problem.prefill_percent_min, self.problem.prefill_percent_max
        workers, prefill = node.cost[1], node.num_prefill
        if choice.is_prefill:
            missing = low * workers - 100 * (prefill - lent)
            least = -(-missing // (100 - low)) if low < 100 else (0 if missing <= 0 else 10**9)
        else:
            missing = 100 * (prefill + lent) - high * workers
            least = -(-missing // high) if high else (0 if missing <= 0 else 10**9)
        return max(least, 0)

    def _is_worse(self, bound: Cost) -> bool:
        return self.best is not None and bound >= self.best.cost

    def _bound(self, node: _Node) -> Cost | None:
        """No mix below this node costs less, component by component; None: none is allowed."""
        depth = len(node.counts)
        if any(n > r + EPSILON for n, r in zip(node.needs, self.reach[depth], strict=True)):
            return None
        rates, least = self.rates[depth], [0] * (2 + len(node.budgets))
        for group in self.problem.groups:  # nobody serves both roles: whole workers for each
            for i in range(len(least)):
                most = max(node.needs[k] * rates[k][i] for k in group)
                least[i] += max(0, math.ceil(most - EPSILON))
        for i, low in enumerate(self.lows[depth]):
            least[i] = max(least[i], low)
        if any(used > left for used, left in zip(least[2:], node.budgets, strict=True)):
            return None
        return _add(node.cost, (least[0], least[1], 0))

    def _is_allowed(self, node: _Node) -> bool:
        if any(need > EPSILON for need in node.needs) or min(node.budgets, default=0) < 0:
            return False
        low, high = self.problem.prefill_percent_min, self.problem.prefill_percent_max
        return low * node.cost[1] <= 100 * node.num_prefill <= high * node.cost[1]


def _add(a: Cost, b: Cost) -> Cost:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _rates(rest: Sequence[Choice], need: int, num_budgets: int) -> tuple[float, ...]:
    covers = [
        (choice, cover[need])
        for choice in rest
        for cover in (choice.own, *((choice.other,) if choice.lent_max else ()))
        if cover[need] > 0
    ]
    if not covers:
        return (0.0,) * (2 + num_budgets)  # `reach` tells that nobody covers it
    return (
        min(choice.cents / cover for choice, cover in covers),
        min(1 / cover for _, cover in covers),
        *(min(choice.weights[b] / cover for choice, cover in covers) for b in range(num_budgets)),
    )


def _lows(rest: Sequence[Choice], num_budgets: int) -> tuple[int, ...]:
    return (
        sum(choice.low * choice.cents for choice in rest),
        sum(choice.low for choice in rest),
        *(sum(choice.low * choice.weights[b] for choice in rest) for b in range(num_budgets)),
    )


def _reach(choice: Choice, need: int) -> float:
    return choice.high * choice.own[need] + choice.lent_max * choice.other[need]


def _nearest_first(choice: Choice) -> list[int]:
    """Counts of lent workers, those near the present one first."""
    counts = range(choice.lent_min, min(choice.lent_max, choice.high) + 1)
    return sorted(counts, key=lambda lent: (abs(lent - choice.lent), lent))


def _least_replicas(needs: Sequence[float], choice: Choice, lent: int) -> int:
    """What the pool would need to cover alone all that its own role lacks, as far as it can."""
    own = 0
    for need, cover, other in zip(needs, choice.own, choice.other, strict=True):
        left = need - lent * other - EPSILON
        if left > 0 and cover > 0:
            own = max(own, math.ceil(left / cover))
    return own + lent


def _extend(node: _Node, choice: Choice, replicas: int, lent: int) -> _Node:
    own = replicas - lent
    return _Node(
        needs=tuple(
            need - own * cover - lent * other
            for need, cover, other in zip(node.needs, choice.own, choice.other, strict=True)
        ),
        budgets=tuple(
            left - replicas * weight
            for left, weight in zip(node.budgets, choice.weights, strict=True)
        ),
        cost=_add(node.cost, (replicas * choice.cents, replicas, abs(lent - choice.lent))),
        counts=(*node.counts, (replicas, lent)),
        num_prefill=node.num_prefill + (own if choice.is_prefill else lent),
    )
