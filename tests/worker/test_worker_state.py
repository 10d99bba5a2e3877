"""Roles, drain, scopes and transfer health: what a worker takes on and how requests end."""

import asyncio

import pytest
from kvasir_engine.worker.inflight import InFlight
from kvasir_engine.worker.metrics import Gauges, WorkerMetrics
from kvasir_engine.worker.rates import FetchRates
from kvasir_engine.worker.state import Role, TransferHealth, Work, WorkerState
from kvasir_kvstore.core.block import BLOCK_TOKENS
from kvasir_kvstore.core.fetch import RETRY_EVERY
from kvasir_proto.errors import KvasirError, Reason


def make_state(role: Role = Role.BOTH, *, max_requests: int = 8) -> WorkerState:
    state = WorkerState(role, max_requests=max_requests)
    state.loading = ""
    return state


def make_in_flight(state: WorkerState, *, timeout_ms_max: int = 60_000) -> InFlight:
    return InFlight(state, WorkerMetrics(Gauges), timeout_ms_max=timeout_ms_max)


def outcomes(in_flight: InFlight) -> dict[str, float]:
    return {
        sample.labels["reason"]: sample.value
        for metric in in_flight.metrics.requests.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    }


@pytest.mark.parametrize(
    ("role", "work", "taken"),
    [
        (Role.PREFILL, Work.PREFILL, True),
        (Role.PREFILL, Work.GENERATE, False),
        (Role.DECODE, Work.GENERATE, True),
        (Role.DECODE, Work.PREFILL, False),
        (Role.BOTH, Work.GENERATE, True),
        (Role.BOTH, Work.PREFILL, True),
    ],
)
def test_role_decides_which_work_is_taken(role: Role, work: Work, taken: bool) -> None:
    refusal = make_state(role).refusal(work)
    assert (refusal is None) == taken
    if refusal is not None:
        assert refusal.reason is Reason.NO_WORKER


def test_nothing_is_taken_before_the_model_is_loaded() -> None:
    refusal = WorkerState(Role.BOTH, max_requests=1).refusal(Work.GENERATE)
    assert refusal is not None
    assert refusal.reason is Reason.NO_WORKER
    assert "not loaded" in refusal.message


def test_draining_refuses_new_requests_and_keeps_old_ones() -> None:
    state = make_state()
    ticket = state.admit(Work.GENERATE, request_id="a", end=lambda error: None)
    state.draining = True
    with pytest.raises(KvasirError) as caught:
        state.admit(Work.GENERATE, request_id="b", end=lambda error: None)
    assert caught.value.reason is Reason.DRAINING
    assert state.num_in_flight == 1
    state.leave(ticket)
    assert state.num_in_flight == 0


async def test_requests_over_the_limit_are_refused() -> None:
    in_flight = make_in_flight(make_state(max_requests=1))
    async with in_flight.scope(Work.GENERATE, request_id="a", timeout_ms=0):
        with pytest.raises(KvasirError) as caught:
            async with in_flight.scope(Work.GENERATE, request_id="b", timeout_ms=0):
                raise AssertionError("was admitted")
    assert caught.value.reason is Reason.OVERLOADED


async def test_deadline_cancels_what_runs_and_surfaces_as_timeout() -> None:
    in_flight = make_in_flight(make_state())
    cleaned = []

    async def serve() -> None:
        async with in_flight.scope(Work.GENERATE, request_id="a", timeout_ms=20):
            try:
                await asyncio.Event().wait()
            finally:
                cleaned.append(in_flight.state.num_in_flight)

    with pytest.raises(KvasirError) as caught:
        await serve()
    assert caught.value.reason is Reason.TIMEOUT
    assert cleaned == [1]  # cleaned up while still counted
    assert in_flight.state.num_in_flight == 0
    assert outcomes(in_flight) == {"timeout": 1}


async def test_ended_request_gets_the_error_it_was_ended_with() -> None:
    state = make_state()
    in_flight = make_in_flight(state)
    started = asyncio.Event()

    async def serve() -> None:
        async with in_flight.scope(Work.GENERATE, request_id="a", timeout_ms=0):
            started.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(serve())
    await started.wait()
    assert state.end_all(KvasirError(Reason.DRAINING, "over")) == 1
    state.end_all(KvasirError(Reason.INTERNAL, "too late"))
    with pytest.raises(KvasirError) as caught:
        await task
    assert caught.value.reason is Reason.DRAINING


async def test_client_that_leaves_is_counted_as_cancelled() -> None:
    in_flight = make_in_flight(make_state())
    started = asyncio.Event()

    async def serve() -> None:
        async with in_flight.scope(Work.GENERATE, request_id="a", timeout_ms=0):
            started.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(serve())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert outcomes(in_flight) == {"cancelled": 1}
    assert in_flight.state.num_in_flight == 0


def test_transfers_are_unhealthy_after_consecutive_failures_only() -> None:
    health = TransferHealth(failures_max=3)
    health.failed("a")
    health.failed("b")
    health.succeeded()
    health.failed("c")
    health.failed("d")
    assert health.healthy
    health.failed("e")
    assert not health.healthy
    assert health.error == "e"
    health.succeeded()
    assert health.healthy


def test_broken_data_plane_is_unhealthy_at_once() -> None:
    health = TransferHealth(failures_max=3)
    health.broke("canary")
    assert not health.healthy


def test_a_path_that_is_too_slow_is_tried_again_after_a_while() -> None:
    rates = FetchRates()
    rates.fetched(locate_ms=1, transfer_ms=100, num_arrived=10)
    assert rates.us_per_token == pytest.approx(10_000 / BLOCK_TOKENS)
    plans = [rates.plan(num_blocks=4, compute_ms_per_block=5) for _ in range(2 * RETRY_EVERY)]
    assert [i for i, plan in enumerate(plans) if plan] == [RETRY_EVERY - 1, 2 * RETRY_EVERY - 1]
    assert all(plan.loss_ms_max < 1 for plan in plans if plan)


def test_nothing_to_fetch_is_no_reason_to_try_again() -> None:
    rates = FetchRates()
    rates.fetched(locate_ms=1, transfer_ms=100, num_arrived=10)
    assert not any(rates.plan(num_blocks=0, compute_ms_per_block=5) for _ in range(RETRY_EVERY))
    assert rates.plan(num_blocks=4, compute_ms_per_block=5) is None


def test_a_path_that_brought_nothing_yet_is_tried_as_rarely_until_a_probe_shows_it() -> None:
    rates = FetchRates()
    assert rates.plan(num_blocks=100, compute_ms_per_block=5) is not None
    rates.fetched(locate_ms=1, transfer_ms=100, num_arrived=0)
    plans = [rates.plan(num_blocks=100, compute_ms_per_block=5) for _ in range(RETRY_EVERY)]
    assert [i for i, plan in enumerate(plans) if plan] == [RETRY_EVERY - 1]
    rates.probed(1, 4, 4)
    assert rates.plan(num_blocks=4, compute_ms_per_block=5) is not None
    rates.probed(1, 4000, 4)
    assert rates.us_per_token == pytest.approx(1000 / BLOCK_TOKENS), "requests have shown more"
