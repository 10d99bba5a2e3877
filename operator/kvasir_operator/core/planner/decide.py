"""One plan from facts and a time. Growth is immediate, giving up waits, flips are rationed.

    1. needs      what the load, with headroom, asks of every pool in each role
    2. enough?    no: the cheapest mix that keeps what there is and adds to it; workers flip before
                  new ones are made, for that costs nothing
    3. too much?  the cheapest mix for the most of the keep window, with hysteresis, after a dwell
                  and only while requests fare well
    4. limits     where a limit forbids what is needed: the largest share of it that it allows

Invariants: limits, bounds of pools and the share of prefill hold in every plan that they allow at
all; a plan for a fleet that carried out this plan, with the same facts, changes nothing; the same
inputs give the same plan.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from kvasir_operator.core.planner.cover import Mix, Problem, cheapest
from kvasir_operator.core.planner.facts import (
    FleetPlan,
    Inputs,
    Limits,
    Memory,
    PlanReason,
    PoolFacts,
    PoolTarget,
    Rejection,
)
from kvasir_operator.core.planner.needs import Needs, make_problem, needs_of
from kvasir_operator.core.planner.predict import predict

SHARES = 64  # a need that cannot be met whole is met in steps of this fraction
SAVING_PERCENT_MIN = 10  # a mix of other pools must save this much to replace one that serves
QUEUE_AGE_SHARE = 0.5  # of the TTFT objective: an older queue speaks against giving up workers


def plan(inputs: Inputs, *, now_ms: int) -> FleetPlan:
    """The plan for these facts.

    Raises:
        ValueError: there is no pool of one of the roles, and none may flip into it.
    """
    needs = needs_of(inputs.pools, inputs.now, inputs.slo, factor=1 + inputs.pace.headroom)
    can_flip = _has_passed(inputs.memory.flipped_ms, inputs.pace.flip_dwell_ms, now_ms=now_ms)
    can_flip = can_flip and inputs.pace.flips_allowed
    make = _problem_maker(inputs, can_flip=can_flip)
    if cheapest(make(needs, "fixed")) is not None:
        return _shrink(inputs, needs, make, now_ms=now_ms)
    mix = cheapest(make(needs, "grow")) or cheapest(make(needs, "free"))
    if mix is None:
        return _limited(inputs, needs, make, now_ms=now_ms)
    return _finish(inputs, needs, mix, _reason_of(inputs.pools, mix), now_ms=now_ms)


ProblemMaker = Callable[[Needs, str], Problem]


def _problem_maker(inputs: Inputs, *, can_flip: bool) -> ProblemMaker:
    """Searches over these pools: `fixed` as they are, `grow`, `shrink` or `free`."""

    def make(needs: Needs, way: str) -> Problem:
        return make_problem(inputs, needs, way=way, can_flip=can_flip and way != "fixed")

    return make


def _has_passed(since_ms: int | None, dwell_ms: int, *, now_ms: int) -> bool:
    return since_ms is None or now_ms - since_ms >= dwell_ms


def _reason_of(pools: Sequence[PoolFacts], mix: Mix) -> PlanReason:
    grows = any(count > pool.replicas for pool, (count, _) in zip(pools, mix.counts, strict=True))
    if grows:
        return PlanReason.GROWING
    shrinks = any(count < pool.replicas for pool, (count, _) in zip(pools, mix.counts, strict=True))
    return PlanReason.SHRINKING if shrinks else PlanReason.FLIPPING


def _shrink(inputs: Inputs, needs: Needs, make: ProblemMaker, *, now_ms: int) -> FleetPlan:
    """The fleet is enough. Fewer workers, if they were enough all along the keep window."""
    if inputs.kept is None:
        why = "the keep window has not been observed as a whole"
        return _keep(inputs, needs, PlanReason.STEADY, Rejection("fewer workers", why), now_ms)
    factor = (1 + inputs.pace.headroom) * (1 + inputs.pace.hysteresis)
    kept_needs = needs_of(inputs.pools, inputs.kept, inputs.slo, factor=factor, load_name="kept")
    mix = _cheaper(inputs, kept_needs, make)
    both = replace(needs, terms=(*needs.terms, *kept_needs.terms))
    if mix is None:
        return _keep(inputs, both, PlanReason.STEADY, None, now_ms)
    veto = _veto(inputs, now_ms=now_ms)
    if veto:
        what = f"{mix.cost[1]} workers instead of {sum(pool.replicas for pool in inputs.pools)}"
        return _keep(inputs, both, PlanReason.HOLDING, Rejection(what, veto), now_ms)
    return _finish(inputs, both, mix, PlanReason.SHRINKING, now_ms=now_ms)


def _cheaper(inputs: Inputs, needs: Needs, make: ProblemMaker) -> Mix | None:
    """A mix that is worth the change: cheaper workers by far, or simply fewer of the same."""
    cents = sum(pool.replicas * pool.hourly_cents for pool in inputs.pools)
    free = cheapest(make(needs, "free"))
    if free is not None and 100 * free.cost[0] < (100 - SAVING_PERCENT_MIN) * cents:
        return free
    fewer = cheapest(make(needs, "shrink"))
    workers = sum(pool.replicas for pool in inputs.pools)
    return fewer if fewer is not None and fewer.cost[:2] < (cents, workers) else None


def _veto(inputs: Inputs, *, now_ms: int) -> str:
    """What speaks against giving up workers now; empty: nothing."""
    observed, slo, pace = inputs.observed, inputs.slo, inputs.pace
    if not _has_passed(inputs.memory.scaled_ms, pace.shrink_dwell_ms, now_ms=now_ms):
        return f"the last change is less than {pace.shrink_dwell_ms // 1000} s ago"
    if observed.attainment is not None and observed.attainment < slo.attainment:
        return (
            f"{observed.attainment:.0%} of the requests meet the SLO, {slo.attainment:.0%} should"
        )
    if observed.queue_age_ms > QUEUE_AGE_SHARE * slo.ttft_ms:
        return f"requests have waited for {observed.queue_age_ms:.0f} ms"
    return ""


def _limited(inputs: Inputs, needs: Needs, make: ProblemMaker, *, now_ms: int) -> FleetPlan:
    """The largest share of the needs, of both roles alike, that the limits allow."""
    served, too_much = 0, SHARES
    mix = cheapest(make(needs.scaled(0.0), "free"))
    while mix is not None and too_much - served > 1:
        middle = (served + too_much) // 2
        found = cheapest(make(needs.scaled(middle / SHARES), "free"))
        if found is None:
            too_much = middle
        else:
            served, mix = middle, found
    mix = _present_if_as_good(inputs, needs.scaled(served / SHARES), mix)
    rejection = Rejection(_wanted(inputs, needs), _binding(inputs, needs))
    if mix is None:
        why = "no numbers of workers meet bounds, budget and ratio together"
        return _keep(inputs, needs, PlanReason.LIMITED, Rejection("any plan", why), now_ms)
    made = _finish(inputs, needs, mix, PlanReason.LIMITED, now_ms=now_ms)
    message = f"limits allow {served / SHARES:.0%} of the capacity that the SLO needs"
    return replace(made, message=message, rejected=(rejection, *made.rejected))


def _present_if_as_good(inputs: Inputs, needs: Needs, mix: Mix | None) -> Mix | None:
    """The fleet as it is, where it does what the mix would do for the same."""
    present = cheapest(make_problem(inputs, needs, way="fixed", can_flip=False))
    is_as_good = present is not None and mix is not None and present.cost[:2] <= mix.cost[:2]
    return present if is_as_good else mix


def _unlimited(inputs: Inputs, needs: Needs) -> Mix | None:
    """The mix without budget, ratio and upper bounds."""
    pools = tuple(replace(pool, replicas_max=10_000) for pool in inputs.pools)
    free = replace(inputs, pools=pools, limits=Limits())
    return cheapest(make_problem(free, needs, way="free", can_flip=False))


def _wanted(inputs: Inputs, needs: Needs) -> str:
    mix = _unlimited(inputs, needs)
    if mix is None:
        return "the SLO for every request"
    counts = (
        f"{pool.name} {count}" for pool, (count, _) in zip(inputs.pools, mix.counts, strict=True)
    )
    return ", ".join(counts)


def _binding(inputs: Inputs, needs: Needs) -> str:
    """Which limits the wanted mix exceeds, in words."""
    mix = _unlimited(inputs, needs)
    if mix is None:
        return "no worker of these pools is fast enough for the SLO"
    limits, pools = inputs.limits, inputs.pools
    counts = [count for count, _ in mix.counts]

    def used(weights: Sequence[int]) -> int:
        return sum(count * weight for count, weight in zip(counts, weights, strict=True))

    checks = (
        ("workers", used([1] * len(pools)), limits.replicas),
        ("accelerators", used([pool.accelerators for pool in pools]), limits.accelerators),
        ("cents per hour", used([pool.hourly_cents for pool in pools]), limits.hourly_cents),
        ("watts", used([pool.watts for pool in pools]), limits.watts),
        *(
            (f"workers in {pool.name}", count, pool.replicas_max)
            for pool, count in zip(pools, counts, strict=True)
        ),
    )
    over = [
        f"{used_} {what} needed, {limit} allowed"
        for what, used_, limit in checks
        if limit is not None and used_ > limit
    ]
    low, high = limits.prefill_percent_min, limits.prefill_percent_max
    return "; ".join(over) or f"prefill must be {low} to {high} percent of the workers"


def _keep(
    inputs: Inputs, needs: Needs, reason: PlanReason, rejection: Rejection | None, now_ms: int
) -> FleetPlan:
    counts = tuple((pool.replicas, pool.lent) for pool in inputs.pools)
    made = _finish(inputs, needs, Mix(counts, (0, 0, 0)), reason, now_ms=now_ms)
    rejected = (rejection,) if rejection else ()
    return replace(made, rejected=(*rejected, *made.rejected))


MESSAGES = {
    PlanReason.STEADY: "the fleet is as the load needs it",
    PlanReason.GROWING: "the load needs more workers",
    PlanReason.FLIPPING: "the same workers suffice in other roles",
    PlanReason.SHRINKING: "fewer or cheaper workers suffice",
    PlanReason.HOLDING: "fewer workers would do, but not yet",
    PlanReason.LIMITED: "limits forbid what the SLO needs",
}


def _finish(
    inputs: Inputs, needs: Needs, mix: Mix, reason: PlanReason, *, now_ms: int
) -> FleetPlan:
    targets = tuple(
        PoolTarget(pool.name, count, lent)
        for pool, (count, lent) in zip(inputs.pools, mix.counts, strict=True)
    )
    planned = tuple(
        replace(pool, replicas=target.replicas, lent=target.lent)
        for pool, target in zip(inputs.pools, targets, strict=True)
    )
    has_scaled = any(a.replicas != b.replicas for a, b in zip(inputs.pools, planned, strict=True))
    has_flipped = any(a.lent != b.lent for a, b in zip(inputs.pools, planned, strict=True))
    memory = Memory(
        scaled_ms=now_ms if has_scaled else inputs.memory.scaled_ms,
        flipped_ms=now_ms if has_flipped else inputs.memory.flipped_ms,
    )
    present = predict(inputs.pools, inputs.now, inputs.slo)
    rejected = list(needs.unmet)
    if not mix.is_exact:
        rejected.append(Rejection("the exact search", "too many mixes: the best one found counts"))
    return FleetPlan(
        reason=reason,
        message=MESSAGES[reason],
        targets=targets,
        memory=memory,
        predicted=predict(planned, inputs.now, inputs.slo) if planned != inputs.pools else present,
        present=present,
        terms=needs.terms,
        rejected=tuple(rejected),
    )
