"""Waiting requests leave hot workers; what was handed back is served elsewhere or told of early."""

import asyncio
from pathlib import Path

import openai
import pytest
from fake_worker import FakeWorker, Script
from kvasir_proto.errors import Reason
from kvasir_router.core.rebalance import Move
from kvasir_router.upstream import moves
from router_fixtures import RouterUnderTest, running_router

HI = [{"role": "user", "content": "hi"}]


async def metric(router: RouterUnderTest, name: str) -> float:
    async with router.http.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


async def test_request_that_waits_at_a_hot_worker_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = [FakeWorker(f"w{i}", "both") for i in range(2)]

    def all_move(view, queued, *, now_ms: int) -> list[Move]:
        return [Move(q.request.request_id, q.worker, "other", 1.0) for q in queued]

    monkeypatch.setattr(moves, "rebalance", all_move)
    async with running_router(tmp_path, *workers) as router:
        workers[0].script = workers[1].script = Script(queue=True, times=1)
        text = await router.openai.chat.completions.create(model="tiny", messages=HI, max_tokens=3)
        assert text.choices[0].message.content == "abc"
        assert router.served_by() == ["w0", "w1"]
        assert await metric(router, "kvasir_router_moves_total") == 1
        assert await metric(router, "kvasir_router_retries_total{") == 0
        assert all(request.terms.may_move for request in router.requests())


async def test_request_moves_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = [FakeWorker(f"w{i}", "both") for i in range(3)]
    asked: list[str] = []

    def all_move(view, queued, *, now_ms: int) -> list[Move]:
        asked.extend(q.request.request_id for q in queued)
        return [Move(q.request.request_id, q.worker, "other", 1.0) for q in queued]

    monkeypatch.setattr(moves, "rebalance", all_move)
    async with running_router(tmp_path, *workers) as router:
        workers[0].script = workers[1].script = workers[2].script = Script(queue=True, times=2)
        answer = asyncio.create_task(
            router.openai.chat.completions.create(model="tiny", messages=HI, max_tokens=2)
        )
        async with asyncio.timeout(10):
            while len(router.requests()) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await asyncio.sleep(3 * moves.TICK_MS / 1_000)  # time in which it could move again
        assert len(asked) == 1
        answer.cancel()


async def test_nothing_moves_while_no_worker_is_hot(tmp_path: Path) -> None:
    workers = [FakeWorker(f"w{i}", "both") for i in range(2)]
    async with running_router(tmp_path, *workers) as router:
        for _ in range(3):
            await router.chat_text()
        assert await metric(router, "kvasir_router_moves_total") == 0


async def test_client_hears_at_once_when_the_other_candidate_would_be_late_even_if_idle(
    tmp_path: Path,
) -> None:
    load = {"prefill_us_per_token": 1e5}  # 27 tokens take 2.7 s
    workers = [FakeWorker(f"w{i}", "both", load=load) for i in range(2)]
    async with running_router(tmp_path, *workers, ttft_slo_ms=2_000) as router:
        for worker in workers:
            worker.script = Script(refuse=Reason.BUSY)
        with pytest.raises(openai.RateLimitError) as caught:
            await router.openai.chat.completions.create(model="tiny", messages=HI, max_tokens=2)
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        assert len(router.requests()) == 1, "the other one was not even asked"
        assert await metric(router, 'kvasir_router_handed_back_total{outcome="refused"') == 1


async def test_estimates_follow_what_was_observed(tmp_path: Path) -> None:
    worker = FakeWorker("w0", "both", load={"prefill_us_per_token": 1e5})
    async with running_router(tmp_path, worker) as router:
        for _ in range(5):
            await router.chat_text()
        view = router.server.fleet.view()
        assert view.calibration.factor("w0") < 1, "it is faster than it says"
        assert view.calibration.error("w0") > 0
        assert await metric(router, "kvasir_router_ttft_actual_to_predicted_count") == 5
