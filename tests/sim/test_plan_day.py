"""Days under rules that size a fleet: the pools' physics, the planner against a static split."""

import numpy as np
import pytest
from kvasir_operator.core.planner.facts import PoolTarget, Role, Speed
from kvasir_sim.plan.day import make_day
from kvasir_sim.plan.fleet import Fleet, Worker
from kvasir_sim.plan.pools import DecodePool, PrefillPool
from kvasir_sim.plan.replay import Replay
from kvasir_sim.plan.rules import Dynamo, Kvasir, Static, hpa_for
from kvasir_sim.plan.settings import PlanSimSettings

SPEED = Speed(1_000.0, 20.0, 1.0, kv_tokens=10_000)
SETTINGS = PlanSimSettings(hours=1.5, rate=6.0, startup_s=60)


def targets(prefill: int, decode: int, *, lent: int = 0) -> list[PoolTarget]:
    return [PoolTarget("prefill", prefill, 0), PoolTarget("decode", decode, lent)]


def test_prompts_are_served_in_order_by_who_is_free_first() -> None:
    pool = PrefillPool(SPEED)
    workers = [Worker(Role.PREFILL, Role.PREFILL, 0.0) for _ in range(2)]
    for index, tokens in enumerate((3_000.0, 1_000.0, 1_000.0)):
        pool.arrive(index, 0.0, tokens)
    assert pool.advance(workers, 0.5) == [(0, 3.0), (1, 1.0)]
    assert pool.queued_tokens == 1_000
    assert pool.advance(workers, 1.5) == [(2, 2.0)]


def test_decode_steps_slow_down_with_the_batch() -> None:
    def ms_per_token(num_requests: int) -> float:
        pool = DecodePool(SPEED)
        for index in range(num_requests):
            pool.arrive(index, 0.0, prompt=10.0, output=20.0)
        done = pool.advance(1, start_s=0.0, end_s=10.0)
        assert len(done) == num_requests
        return done[0][1]

    assert ms_per_token(1) == pytest.approx(21.0)
    assert ms_per_token(10) == pytest.approx(30.0)


def test_full_memory_makes_requests_wait() -> None:
    pool = DecodePool(SPEED)
    for index in range(3):
        pool.arrive(index, 0.0, prompt=4_000.0, output=1_000.0)
    pool.advance(1, start_s=0.0, end_s=1.0)
    assert len(pool.waiting) == 1


def test_workers_start_drain_and_flip_in_their_time() -> None:
    fleet = Fleet(SETTINGS)
    fleet.change(targets(1, 2), 0.0, is_initial=True)
    fleet.change(targets(2, 2), 10.0, is_initial=False)
    assert len(fleet.serving(Role.PREFILL, 69.0)) == 1
    assert len(fleet.serving(Role.PREFILL, 70.0)) == 2
    fleet.change(targets(2, 2, lent=1), 100.0, is_initial=False)
    assert len(fleet.serving(Role.DECODE, 100.0)) == 1
    assert len(fleet.serving(Role.PREFILL, 100.0 + SETTINGS.flip_s)) == 3
    fleet.change(targets(2, 1, lent=0), 200.0, is_initial=False)
    fleet.pay(1.0, 200.0)
    assert fleet.worker_s == len(fleet.workers) + 1


def test_day_is_the_same_for_the_same_seed_and_has_the_rate() -> None:
    day, again = (make_day(hours=24, rate_rps=1.0, seed=3) for _ in range(2))
    assert np.array_equal(day.arrivals_s, again.arrivals_s)
    assert np.array_equal(day.prompts, again.prompts)
    assert np.all(np.diff(day.arrivals_s) >= 0)
    assert len(day.arrivals_s) == pytest.approx(86_400, rel=0.1)


@pytest.mark.parametrize("name", ["static", "hpa", "dynamo", "kvasir"])
def test_every_rule_serves_the_day(name: str) -> None:
    day = make_day(hours=SETTINGS.hours, rate_rps=SETTINGS.rate, seed=1)
    rules = {
        "static": Static(9, 5),
        "hpa": hpa_for(SETTINGS, fill=0.7, context_tokens=2_500),
        "dynamo": Dynamo(SETTINGS),
        "kvasir": Kvasir(SETTINGS),
    }
    result = Replay(day, SETTINGS, rules[name]).run(name)
    assert 0 < result.attainment <= min(result.ttft_attainment, result.tpot_attainment) + 1e-9
    assert result.worker_hours > 1
    if name == "static":
        assert result.worker_hours == pytest.approx(14 * SETTINGS.hours)
        assert result.changes_per_hour == 0
    if name == "kvasir":
        assert result.attainment >= SETTINGS.slo_attainment
        assert result.flips_per_hour_max <= 60
