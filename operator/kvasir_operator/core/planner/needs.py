"""From a load to the search's problem: what one worker of every pool covers in each role.

Prefill kinds differ in which prompts they can serve in time at all: a slow worker takes a short
prompt, not a long one. Sorted by speed these sets are nested, so there is one need per distinct
set: the prompts beyond it must be covered by the workers that can take them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvasir_operator.core.planner.cover import Choice, Problem
from kvasir_operator.core.planner.facts import (
    Demand,
    Inputs,
    Load,
    PoolFacts,
    Rejection,
    Role,
    Slo,
    Term,
)
from kvasir_operator.core.planner.queueing import (
    QUANTILES,
    decode_workers,
    num_feasible,
    prefill_load,
    prefill_workers,
)

COVER_MAX = 1e9  # of a worker that has nothing to do


@dataclass(frozen=True, slots=True)
class Needs:
    """Needs of both roles. The first one of each role is one worker, whatever the load."""

    needs: tuple[float, ...]
    prefill_covers: tuple[tuple[float, ...], ...]  # per pool, serving prefill
    decode_covers: tuple[tuple[float, ...], ...]
    terms: tuple[Term, ...] = ()
    unmet: tuple[Rejection, ...] = ()

    @property
    def groups(self) -> tuple[range, ...]:
        """The needs of prefill and of decode."""
        num_prefill = len(self.needs) - 2
        return range(num_prefill), range(num_prefill, num_prefill + 2)

    def scaled(self, share: float) -> "Needs":
        """The same for a share of the load; one worker per role remains."""
        ones = {group[0] for group in self.groups}
        needs = tuple(need if k in ones else need * share for k, need in enumerate(self.needs))
        return replace(self, needs=needs)


def needs_of(
    pools: Sequence[PoolFacts], load: Load, slo: Slo, *, factor: float, load_name: str = "now"
) -> Needs:
    """What a load, multiplied by `factor`, needs."""
    prefill, unmet = _prefill_columns(pools, _times(load.prefill, factor), slo)
    demand = _times(load.decode, factor)
    by_speed = {speed: decode_workers(demand, speed, slo) for speed in {p.speed for p in pools}}
    decode = [by_speed[pool.speed] for pool in pools]
    terms = [
        Term(pool.name, role, round(workers, 2), load_name)
        for role, column in ((Role.PREFILL, prefill[0]), (Role.DECODE, decode))
        for pool, workers in zip(pools, column, strict=True)
        if pool.role is role and not math.isinf(workers)
    ]
    if all(math.isinf(workers) for workers in decode):
        what = f"a time per output token of {slo.tpot_ms:.0f} ms"
        unmet = (*unmet, Rejection(what, "no worker makes a step in this time"))
    return Needs(
        needs=(1.0,) * (1 + len(prefill) + 2),
        prefill_covers=tuple((1.0, *map(_cover, row)) for row in zip(*prefill, strict=True)),
        decode_covers=tuple((1.0, _cover(workers)) for workers in decode),
        terms=tuple(terms),
        unmet=unmet,
    )


def _times(demand: Demand, factor: float) -> Demand:
    return replace(demand, requests_per_s=demand.requests_per_s * factor)


def _cover(workers: float) -> float:
    """The share of a need that one worker covers when `workers` cover it."""
    return min(1 / workers, COVER_MAX) if workers > 0 else COVER_MAX


def _prefill_columns(
    pools: Sequence[PoolFacts], demand: Demand, slo: Slo
) -> tuple[list[list[float]], tuple[Rejection, ...]]:
    """Per need, the workers of each pool that cover it alone; and what nobody can serve."""
    load = prefill_load(demand)
    reach = [num_feasible(load, pool.speed, slo.ttft_ms) for pool in pools]
    columns, first = [], 0
    for level in sorted(set(reach) - {0}):
        part = load.from_share(first)
        fast = {pool.speed for pool, far in zip(pools, reach, strict=True) if far >= level}
        workers = {speed: prefill_workers(part, speed, slo) for speed in fast}
        columns.append([workers.get(pool.speed, math.inf) for pool in pools])
        first = level
    if not demand.requests_per_s or max(reach) >= slo.attainment * QUANTILES:
        return columns or [[0.0] * len(pools)], ()
    missed = 1 - max(reach) / QUANTILES
    what = f"a first token within {slo.ttft_ms:.0f} ms for {slo.attainment:.0%} of the requests"
    why = f"{missed:.0%} of the prompts take the fastest worker longer"
    return columns or [[math.inf] * len(pools)], (Rejection(what, why),)


def make_problem(inputs: Inputs, needs: Needs, *, way: str, can_flip: bool) -> Problem:
    """The search for these needs; `way`: fixed, grow, shrink or free."""
    limits = inputs.limits
    named = (
        (limits.replicas, lambda pool: 1),
        (limits.accelerators, lambda pool: pool.accelerators),
        (limits.hourly_cents, lambda pool: pool.hourly_cents),
        (limits.watts, lambda pool: pool.watts),
    )
    budgets = [(limit, weight) for limit, weight in named if limit is not None]
    choices = []
    for index, pool in enumerate(inputs.pools):
        low, high = _bounds(pool, way)
        own, other = (
            _cover_in(needs, index, role, len(needs.needs)) for role in (pool.role, pool.role.other)
        )
        choices.append(
            Choice(
                low=low,
                high=high,
                cents=pool.hourly_cents,
                weights=tuple(weight(pool) for _, weight in budgets),
                is_prefill=pool.role is Role.PREFILL,
                own=own,
                other=other,
                lent=pool.lent,
                lent_min=0 if can_flip else min(pool.lent, high),
                lent_max=min(pool.replicas if can_flip else pool.lent, high),
            )
        )
    return Problem(
        choices=tuple(choices),
        groups=needs.groups,
        needs=needs.needs,
        budgets=tuple(limit for limit, _ in budgets),
        prefill_percent_min=limits.prefill_percent_min,
        prefill_percent_max=limits.prefill_percent_max,
    )


def _bounds(pool: PoolFacts, way: str) -> tuple[int, int]:
    low, high = pool.replicas_min, pool.replicas_max
    match way:
        case "fixed":
            is_within = low <= pool.replicas <= high
            return (pool.replicas, pool.replicas) if is_within else (1, 0)
        case "grow":
            return max(low, pool.replicas), high
        case "shrink":
            return low, min(high, pool.replicas)
        case _:
            return low, high


def _cover_in(needs: Needs, index: int, role: Role, width: int) -> tuple[float, ...]:
    prefill, decode = needs.prefill_covers[index], needs.decode_covers[index]
    zeros_prefill, zeros_decode = (0.0,) * len(prefill), (0.0,) * len(decode)
    cover = (*prefill, *zeros_decode) if role is Role.PREFILL else (*zeros_prefill, *decode)
    assert len(cover) == width
    return cover
