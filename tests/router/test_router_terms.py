"""What clients ask of time and order reaches the worker's queue, and nothing malformed does."""

from pathlib import Path
from typing import Any

import grpc.aio
import openai
import pytest
from fake_worker import FakeWorker, Script
from kvasir_proto.errors import Reason
from kvasir_proto.v1 import common_pb2, inference_pb2
from kvasir_router.core.rebalance import MOVES_MAX
from kvasir_router.core.sessions import STEP_PRIORITY_MAX, SessionLimits, SessionTable
from kvasir_router.tenants import Tenants
from router_fixtures import RouterUnderTest, running_router

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def router(tmp_path: Path):
    workers = FakeWorker("p0", "prefill"), FakeWorker("d0", "decode")
    async with running_router(tmp_path, *workers, ttft_slo_ms=4_000) as running:
        yield running


async def terms_of(router: RouterUnderTest, **kwargs: Any) -> common_pb2.QueueTerms:
    """How the worker was asked to queue one chat."""
    worker = router.workers["d0"]
    worker.requests.clear()
    await router.openai.chat.completions.create(model="tiny", messages=HI, max_tokens=2, **kwargs)
    (request,) = worker.requests
    return request.terms


async def test_request_without_wishes_gets_the_routers_objective(router: RouterUnderTest) -> None:
    terms = await terms_of(router)
    assert 3_000 < terms.ttft_left_ms <= 4_000
    assert (terms.priority, terms.tenant_weight, terms.may_move) == (0, 1.0, True)


@pytest.mark.parametrize("how", ["body", "headers"])
async def test_objective_and_priority_reach_the_worker(router: RouterUnderTest, how: str) -> None:
    values = {"ttft_slo_ms": 900, "priority": 3}
    headers = {f"x-kvasir-{k.replace('_', '-')}": str(v) for k, v in values.items()}
    kwargs = {"extra_body": values} if how == "body" else {"extra_headers": headers}
    terms = await terms_of(router, **kwargs)
    assert 0 < terms.ttft_left_ms <= 900
    assert terms.priority == 3


async def test_body_wins_over_headers(router: RouterUnderTest) -> None:
    terms = await terms_of(
        router, extra_body={"priority": -2}, extra_headers={"x-kvasir-priority": "5"}
    )
    assert terms.priority == -2


@pytest.mark.parametrize(
    ("kwargs", "param"),
    [
        ({"extra_body": {"priority": 11}}, "priority"),
        ({"extra_body": {"priority": "1"}}, "priority"),
        ({"extra_body": {"ttft_slo_ms": 0}}, "ttft_slo_ms"),
        ({"extra_body": {"tpot_slo_ms": 0}}, "tpot_slo_ms"),
        ({"extra_headers": {"x-kvasir-tpot-slo-ms": "fast"}}, "x-kvasir-tpot-slo-ms"),
        ({"extra_body": {"deadline_ms": 2**40}}, "deadline_ms"),
        ({"extra_body": {"session_id": ""}}, "session_id"),
        ({"extra_body": {"session_id": "x" * 129}}, "session_id"),
        ({"extra_headers": {"x-kvasir-priority": "high"}}, "x-kvasir-priority"),
        ({"extra_headers": {"x-kvasir-ttft-slo-ms": "-1"}}, "x-kvasir-ttft-slo-ms"),
    ],
)
async def test_bad_wish_is_refused_by_name(
    router: RouterUnderTest, kwargs: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await terms_of(router, **kwargs)
    assert caught.value.param == param


async def test_grpc_carries_the_same_wishes(router: RouterUnderTest) -> None:
    request = inference_pb2.InferenceRequest(
        model="tiny",
        prompt="hi",
        sampling=common_pb2.SamplingParams(max_tokens=2),
        ttft_slo_ms=800,
        priority=-3,
    )
    assert [chunk async for chunk in router.stub.Generate(request, timeout=10)]
    (sent,) = router.workers["d0"].requests
    assert sent.terms.priority == -3
    assert 0 < sent.terms.ttft_left_ms <= 800
    request.priority = 50
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [chunk async for chunk in router.stub.Generate(request, timeout=10)]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_later_steps_of_a_session_gain_priority(router: RouterUnderTest) -> None:
    steps = [await terms_of(router, extra_body={"session_id": "agent"}) for _ in range(3)]
    assert [terms.priority for terms in steps] == [0, 1, 2]
    assert (await terms_of(router, extra_body={"session_id": "other"})).priority == 0


async def test_tenants_have_sessions_and_weights_of_their_own(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one tenant-1 2.5\ntwo tenant-2\n")
    workers = FakeWorker("p0", "prefill"), FakeWorker("d0", "decode")
    async with running_router(tmp_path, *workers, api_key_file=keys) as router:
        seen = []
        for key in ("one", "two"):
            router.openai.api_key = key
            terms = await terms_of(router, extra_body={"session_id": "agent"})
            seen.append((terms.tenant_weight, terms.priority))
    assert seen == [(2.5, 0), (1.0, 0)]


@pytest.mark.parametrize("text", ["k t 0", "k t x", "k t 1 2", "k t nan", "a t 1\nb t 2"])
def test_bad_weight_is_refused_without_showing_the_key(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text.replace("k ", "secret-key "))
    with pytest.raises(ValueError, match=r"weight|WEIGHT") as caught:
        Tenants.load(file)
    assert "secret-key" not in str(caught.value)


async def test_request_may_be_handed_back_as_often_as_the_core_allows(tmp_path: Path) -> None:
    workers = [FakeWorker(f"w{i}", "both") for i in range(MOVES_MAX + 2)]
    async with running_router(tmp_path, *workers) as router:
        for worker in workers:
            worker.script = Script(refuse=Reason.BUSY, times=1)
        with pytest.raises(openai.RateLimitError) as caught:
            await router.openai.chat.completions.create(model="tiny", messages=HI, max_tokens=2)
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        sent = [request.terms.may_move for worker in workers for request in worker.requests]
        assert sorted(sent) == [False] + MOVES_MAX * [True]
        assert all(len(worker.requests) <= 1 for worker in workers)


async def test_request_that_two_workers_handed_back_is_served_by_a_third(tmp_path: Path) -> None:
    workers = [FakeWorker(f"w{i}", "both") for i in range(4)]
    shared = Script(refuse=Reason.BUSY, times=MOVES_MAX)
    for worker in workers:
        worker.script = shared
    async with running_router(tmp_path, *workers) as router:
        assert await router.chat_text(max_tokens=3) == "abc"
        assert len(router.served_by()) == MOVES_MAX + 1


@pytest.mark.parametrize("how", ["body", "headers", "grpc", ""])
async def test_pace_that_is_asked_for_chooses_the_decode_worker(tmp_path: Path, how: str) -> None:
    slow = FakeWorker("slow", "decode", load={"decode_ms_per_step": 200.0})
    fast = FakeWorker("fast", "decode", load={"decode_ms_per_step": 10.0, "num_running": 1})
    async with running_router(tmp_path, FakeWorker("p0", "prefill"), slow, fast) as router:
        if how == "grpc":
            request = inference_pb2.InferenceRequest(model="tiny", prompt="hi", tpot_slo_ms=50)
            decision = await router.stub.Route(request, timeout=10)
            assert decision.decode_worker == "fast"
            return
        asked = {
            "body": {"extra_body": {"tpot_slo_ms": 50}},
            "headers": {"extra_headers": {"x-kvasir-tpot-slo-ms": "50"}},
        }
        await router.chat_text(**asked.get(how, {}))
        assert router.served_by() == (["fast"] if how else ["slow"])


def test_session_with_a_deadline_is_due_earlier_the_later_it_is() -> None:
    table = SessionTable()
    first = table.arrived(b"s", deadline_ms=10_000, ttft_slo_ms=5_000, now_ms=0)
    second = table.arrived(b"s", deadline_ms=None, ttft_slo_ms=5_000, now_ms=8_000)
    late = table.arrived(b"s", deadline_ms=None, ttft_slo_ms=5_000, now_ms=11_000)
    assert (first.step, first.ttft_slo_ms) == (1, 5_000)
    assert (second.step, second.ttft_slo_ms) == (2, 1_000)
    assert (late.step, late.ttft_slo_ms) == (3, 5_000), "what nothing can meet is not urgent"


def test_sessions_are_bounded_and_forgotten() -> None:
    table = SessionTable(SessionLimits(sessions_max=2, idle_ms_max=100))
    ask = {"deadline_ms": None, "ttft_slo_ms": 5_000}
    for name in (b"a", b"b", b"c"):
        table.arrived(name, now_ms=0, **ask)
    assert len(table) == 2
    assert table.arrived(b"a", now_ms=1, **ask).step == 1, "the longest unheard went"
    assert table.arrived(b"c", now_ms=2, **ask).step == 2
    assert table.arrived(b"c", now_ms=200, **ask).step == 1, "it was idle for too long"
    steps = [table.arrived(b"c", now_ms=200, **ask) for _ in range(10)]
    assert steps[-1].priority == STEP_PRIORITY_MAX
