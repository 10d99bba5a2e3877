"""Plans: what must hold in each of them, and what they do under typical loads."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvasir_operator.core.planner.decide import plan
from kvasir_operator.core.planner.facts import (
    FleetPlan,
    Inputs,
    Limits,
    Load,
    Memory,
    Observed,
    Pace,
    PlanReason,
    Role,
    Slo,
    Speed,
)
from planner_builders import SPEED, counts_of, make_demand, make_inputs, make_load, make_pool

NOW_MS = 10_000_000


@st.composite
def speeds(draw: st.DrawFn) -> Speed:
    return Speed(
        prefill_us_per_token=draw(st.sampled_from([40.0, 160.0, 900.0])),
        decode_base_ms=draw(st.sampled_from([5.0, 20.0, 60.0])),
        decode_ms_per_request=draw(st.sampled_from([0.0, 0.5, 3.0])),
        kv_tokens=draw(st.sampled_from([5_000, 500_000])),
    )


@st.composite
def loads(draw: st.DrawFn) -> Load:
    def demand() -> object:
        return make_demand(
            draw(st.sampled_from([0.0, 0.3, 2.0, 8.0, 30.0])),
            uncached_tokens=draw(st.sampled_from([0.0, 50.0, 2_000.0, 9_000.0])),
            queued_tokens=draw(st.sampled_from([0.0, 60_000.0])),
        )

    return Load(demand(), demand())  # type: ignore[arg-type]


@st.composite
def all_inputs(draw: st.DrawFn) -> Inputs:
    extra = draw(st.lists(st.sampled_from(["prefill", "decode"]), max_size=1))
    pools = []
    for index, role in enumerate(["prefill", "decode", *extra]):
        low = draw(st.integers(1, 2))
        high = draw(st.integers(low, 12))
        replicas = draw(st.integers(1, 14))
        pools.append(
            make_pool(
                role,
                name=f"{role}-{index}",
                speed=draw(speeds()),
                replicas=replicas,
                lent=draw(st.integers(0, min(replicas, 3))),
                replicas_min=low,
                replicas_max=high,
                hourly_cents=draw(st.sampled_from([0, 100, 350])),
                accelerators=draw(st.integers(0, 2)),
            )
        )
    share = draw(st.integers(0, 50))
    now = draw(loads())
    return Inputs(
        pools=tuple(pools),
        now=now,
        kept=draw(st.sampled_from([None, now])),
        slo=Slo(draw(st.sampled_from([500, 5_000])), draw(st.sampled_from([30, 100]))),
        limits=Limits(
            prefill_percent_min=share,
            prefill_percent_max=draw(st.integers(share, 100)),
            replicas=draw(st.sampled_from([None, 6, 20])),
            accelerators=draw(st.sampled_from([None, 8])),
            hourly_cents=draw(st.sampled_from([None, 1_000, 4_000])),
        ),
        pace=Pace(flips_allowed=draw(st.booleans())),
        memory=Memory(
            draw(st.sampled_from([None, NOW_MS - 1_000, NOW_MS - 900_000])),
            draw(st.sampled_from([None, NOW_MS - 1_000, NOW_MS - 900_000])),
        ),
        observed=Observed(draw(st.sampled_from([None, 0.5, 1.0]))),
    )


def applied(inputs: Inputs, made: FleetPlan) -> Inputs:
    """The inputs after the plan has been carried out."""
    pools = tuple(
        replace(pool, replicas=target.replicas, lent=target.lent)
        for pool, target in zip(inputs.pools, made.targets, strict=True)
    )
    return replace(inputs, pools=pools, memory=made.memory)


def has_no_solution(made: FleetPlan) -> bool:
    """Whether bounds, budget and ratio contradict one another."""
    return any(rejection.what == "any plan" for rejection in made.rejected)


@given(all_inputs())
def test_plan_keeps_every_limit(inputs: Inputs) -> None:
    made = plan(inputs, now_ms=NOW_MS)
    if has_no_solution(made):
        return
    limits, pools = inputs.limits, applied(inputs, made).pools
    workers = sum(pool.replicas for pool in pools)
    assert limits.replicas is None or workers <= limits.replicas
    assert limits.accelerators is None or made.predicted.accelerators <= limits.accelerators
    assert limits.hourly_cents is None or made.predicted.hourly_cents <= limits.hourly_cents
    prefill = sum(pool.serving(Role.PREFILL) for pool in pools)
    low, high = limits.prefill_percent_min, limits.prefill_percent_max
    assert low * workers <= 100 * prefill <= high * workers
    for pool in pools:
        assert pool.replicas_min <= pool.replicas <= pool.replicas_max
        assert 0 <= pool.lent <= pool.replicas


@given(all_inputs())
def test_plan_never_leaves_a_role_without_workers(inputs: Inputs) -> None:
    made = plan(inputs, now_ms=NOW_MS)
    if has_no_solution(made):
        return
    for role in Role:
        assert sum(pool.serving(role) for pool in applied(inputs, made).pools) >= 1


@given(all_inputs())
def test_plan_of_a_plan_is_empty(inputs: Inputs) -> None:
    first = plan(inputs, now_ms=NOW_MS)
    second = plan(applied(inputs, first), now_ms=NOW_MS)
    assert second.targets == first.targets
    assert second.memory == first.memory


@given(all_inputs())
def test_planning_is_deterministic(inputs: Inputs) -> None:
    assert plan(inputs, now_ms=NOW_MS) == plan(replace(inputs), now_ms=NOW_MS)


@given(all_inputs(), st.sampled_from([NOW_MS + 900_000]))
def test_steady_load_leads_to_a_steady_fleet(inputs: Inputs, later_ms: int) -> None:
    """With every dwell over, at most a few plans change something; then none does."""
    seen = []
    for step in range(6):
        made = plan(inputs, now_ms=later_ms + step * 900_000)
        seen.append(made.targets)
        inputs = applied(inputs, made)
    assert seen[-1] == seen[-2]


def test_growth_covers_the_load_and_is_predicted_to_meet_the_slo() -> None:
    inputs = make_inputs(12.0)
    made = plan(inputs, now_ms=NOW_MS)
    assert made.reason is PlanReason.GROWING
    assert made.present.ttft_ms is None
    assert made.predicted.ttft_ms is not None
    assert made.predicted.ttft_ms <= inputs.slo.ttft_ms
    assert made.predicted.attainment >= inputs.slo.attainment


def test_surplus_decode_worker_flips_before_a_pod_is_made() -> None:
    pools = (make_pool("prefill", replicas=3), make_pool("decode", replicas=6))
    made = plan(make_inputs(9.0, pools=pools), now_ms=NOW_MS)
    assert made.reason is PlanReason.FLIPPING
    assert counts_of(made)[0] == (3, 0)
    assert counts_of(made)[1][0] == 6
    assert counts_of(made)[1][1] > 0


def test_flip_waits_for_its_dwell_and_pods_are_made_meanwhile() -> None:
    pools = (make_pool("prefill", replicas=3), make_pool("decode", replicas=6))
    memory = Memory(flipped_ms=NOW_MS - 59_000)
    made = plan(make_inputs(9.0, pools=pools, memory=memory), now_ms=NOW_MS)
    assert made.reason is PlanReason.GROWING
    assert counts_of(made)[1] == (6, 0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, PlanReason.SHRINKING),
        ({"kept": None}, PlanReason.STEADY),
        ({"kept": make_load(80.0)}, PlanReason.STEADY),
        ({"memory": Memory(scaled_ms=NOW_MS - 299_000)}, PlanReason.HOLDING),
        ({"observed": Observed(attainment=0.9)}, PlanReason.HOLDING),
        ({"observed": Observed(attainment=1.0, queue_age_ms=1_500)}, PlanReason.HOLDING),
    ],
    ids=["quiet", "young", "recent peak", "dwell", "slo missed", "old queue"],
)
def test_giving_up_workers(change: dict[str, object], expected: PlanReason) -> None:
    pools = (make_pool("prefill", replicas=20), make_pool("decode", replicas=20))
    made = plan(make_inputs(2.0, pools=pools, **change), now_ms=NOW_MS)
    assert made.reason is expected
    if expected is PlanReason.HOLDING:
        assert made.rejected


def test_hysteresis_separates_growth_from_shrinking() -> None:
    """No load makes a fleet grow and, unchanged, shrink again."""
    for tenths in range(5, 200, 3):
        inputs = make_inputs(tenths / 10, memory=Memory())
        grown = applied(inputs, plan(inputs, now_ms=NOW_MS))
        later = plan(replace(grown, memory=Memory()), now_ms=NOW_MS)
        assert [t.replicas for t in later.targets] == [p.replicas for p in grown.pools] or (
            later.reason is PlanReason.SHRINKING
            and inputs.pools[0].replicas >= later.targets[0].replicas
        )


def test_budget_cuts_both_roles_and_says_by_how_much() -> None:
    made = plan(make_inputs(30.0, limits=Limits(replicas=8)), now_ms=NOW_MS)
    assert made.reason is PlanReason.LIMITED
    assert sum(target.replicas for target in made.targets) == 8
    assert min(target.replicas for target in made.targets) >= 2
    assert "workers needed, 8 allowed" in made.rejected[0].why
    assert "%" in made.message


def test_cheaper_kind_takes_what_it_can_serve_in_time() -> None:
    """Slow workers cost a tenth but take long prompts longer than the SLO allows."""
    slow = replace(SPEED, prefill_us_per_token=640.0)
    pools = (
        make_pool("prefill", name="fast", replicas=1, hourly_cents=1_000, replicas_max=50),
        make_pool("prefill", name="slow", replicas=1, hourly_cents=100, speed=slow),
        make_pool("decode", hourly_cents=100),
    )
    made = plan(make_inputs(10.0, pools=pools), now_ms=NOW_MS)
    fast, cheap = made.targets[0].replicas, made.targets[1].replicas
    alone = plan(make_inputs(10.0, pools=(pools[0], pools[2])), now_ms=NOW_MS)
    assert cheap > 1
    assert 1 <= fast < alone.targets[0].replicas
    assert made.predicted.hourly_cents < alone.predicted.hourly_cents


def test_slo_that_no_worker_can_keep_is_said() -> None:
    made = plan(make_inputs(5.0, slo=Slo(ttft_ms=200, tpot_ms=10)), now_ms=NOW_MS)
    assert made.reason is PlanReason.LIMITED
    assert any("time per output token" in rejection.what for rejection in made.rejected)
    assert any("first token" in rejection.what for rejection in made.rejected)


def test_no_load_needs_one_worker_per_role() -> None:
    pools = (make_pool("prefill", replicas=9), make_pool("decode", replicas=9))
    made = plan(make_inputs(0.0, pools=pools), now_ms=NOW_MS)
    assert counts_of(made) == [(1, 0), (1, 0)]
