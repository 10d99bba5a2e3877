"""Predictions of the queueing formulas against a simulated queue, and their direction."""

import heapq
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvasir_operator.core.planner.queueing import (
    decode_workers,
    prefill_load,
    prefill_workers,
    requests_in_flight,
    tpot_ms,
    ttft_attainment,
    ttft_ms,
)
from planner_builders import SLO, SPEED, make_demand

NUM_SIMULATED = 20_000


def simulated_attainment(requests_per_s: float, *, workers: int, ttft_limit_ms: float) -> float:
    """A first-come-first-served queue with log-normal prompts, replayed with a fixed seed."""
    source = random.Random(7)
    demand = make_demand(requests_per_s)
    sigma = math.sqrt(math.log1p(demand.uncached_cv2))
    mean_log = math.log(demand.uncached_tokens) - sigma**2 / 2
    free_ms, now_ms, met = [0.0] * workers, 0.0, 0
    for _ in range(NUM_SIMULATED):
        now_ms += source.expovariate(requests_per_s) * 1000
        service_ms = source.lognormvariate(mean_log, sigma) * SPEED.prefill_us_per_token / 1000
        done_ms = max(now_ms, heapq.heappop(free_ms)) + service_ms
        heapq.heappush(free_ms, done_ms)
        met += done_ms - now_ms <= ttft_limit_ms
    return met / NUM_SIMULATED


@pytest.mark.parametrize(
    ("requests_per_s", "workers"), [(2.0, 1), (5.0, 2), (10.0, 4), (22.0, 8), (46.0, 16)]
)
def test_attainment_is_that_of_a_simulated_queue(requests_per_s: float, workers: int) -> None:
    load = prefill_load(make_demand(requests_per_s))
    for ttft_limit_ms in (500.0, 1_000.0, 2_000.0):
        predicted = ttft_attainment(load, SPEED, workers=workers, ttft_ms=ttft_limit_ms)
        actual = simulated_attainment(requests_per_s, workers=workers, ttft_limit_ms=ttft_limit_ms)
        assert predicted == pytest.approx(actual, abs=0.06)


@given(st.floats(0.1, 200), st.floats(0.0, 4.0))
def test_needed_prefill_workers_are_enough_and_not_many_too_many(rate: float, cv2: float) -> None:
    load = prefill_load(make_demand(rate, uncached_cv2=cv2))
    workers = prefill_workers(load, SPEED, SLO)

    def attained(count: float) -> float:
        return ttft_attainment(load, SPEED, workers=count, ttft_ms=SLO.ttft_ms)

    assert attained(workers) >= SLO.attainment
    assert attained(workers * 0.99) <= SLO.attainment or workers < 1e-6


@given(st.floats(0.1, 100))
def test_needed_decode_workers_keep_the_step_time(rate: float) -> None:
    demand = make_demand(rate)
    workers = decode_workers(demand, SPEED, SLO)
    step_ms = tpot_ms(demand, SPEED, workers=max(workers, 1.0))
    assert step_ms is not None
    assert step_ms <= SLO.tpot_ms


def test_memory_bounds_the_batch_where_it_is_scarce() -> None:
    demand = make_demand(10.0)
    small = replace(SPEED, kv_tokens=5 * 4_200)
    assert decode_workers(demand, small, SLO) > 5 * decode_workers(demand, SPEED, SLO)


def test_what_falls_behind_has_no_time() -> None:
    load = prefill_load(make_demand(10.0))
    assert ttft_ms(load, SPEED, workers=3, share=0.95) is None
    assert requests_in_flight(make_demand(100.0), SPEED, workers=9) is None


def test_queued_tokens_and_bursts_need_more_workers() -> None:
    def workers(**facts: float) -> float:
        return prefill_workers(prefill_load(make_demand(5.0, **facts)), SPEED, SLO)

    assert workers(queued_tokens=300_000) > workers()
    assert workers(dispersion=8.0) > workers()
