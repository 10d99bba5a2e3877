"""Workers that refuse, vanish, stall or leave: what clients see, and who is asked next."""

import asyncio
from pathlib import Path

import openai
import pytest
from fake_worker import FakeWorker, Script
from kvasir_proto.errors import Reason
from router_fixtures import running_router

TWENTY = "abcdefghijklmnopqrst"
HI = [{"role": "user", "content": "hi"}]


async def test_busy_worker_is_passed_over_once(tmp_path: Path) -> None:
    queue = {"prefill_tokens_queued": 1_000, "prefill_us_per_token": 100.0}
    workers = FakeWorker("a", script=Script(Reason.BUSY, times=1)), FakeWorker("b", load=queue)
    async with running_router(tmp_path, *workers) as router:
        assert await router.chat_text() == TWENTY
        assert [len(worker.requests) for worker in workers] == [1, 1]
        assert await router.chat_text() == TWENTY
        assert [len(worker.requests) for worker in workers] == [2, 1]


async def test_three_busy_workers_are_a_429_with_retry_after(tmp_path: Path) -> None:
    workers = [FakeWorker(name, script=Script(Reason.BUSY)) for name in "abcd"]
    async with running_router(tmp_path, *workers) as router:
        with pytest.raises(openai.RateLimitError) as caught:
            await router.chat_text()
        assert caught.value.code == "overloaded"
        assert caught.value.response.headers["retry-after"] == "3"
        assert len(router.requests()) == 3


async def test_busy_prefill_peer_sends_the_request_to_the_other_candidate(tmp_path: Path) -> None:
    decode = FakeWorker("d", "decode", script=Script(peer_refuses=Reason.BUSY, times=1))
    workers = FakeWorker("p0", "prefill"), FakeWorker("p1", "prefill"), decode
    async with running_router(tmp_path, *workers) as router:
        assert await router.chat_text() == TWENTY
        peers = [request.prefill_peer.name for request in decode.requests]
        assert sorted(peers) == ["p0", "p1"]


@pytest.mark.parametrize(
    "script",
    [Script(die_after=0), Script(stall_after=0), Script(Reason.DRAINING), Script(Reason.INTERNAL)],
    ids=["dies", "stalls", "drains", "fails"],
)
async def test_failure_before_the_first_token_is_not_seen(tmp_path: Path, script: Script) -> None:
    script.times = 1
    workers = [FakeWorker(name, script=script) for name in "ab"]
    async with running_router(tmp_path, *workers, first_token_timeout_ms=300) as router:
        assert await router.chat_text() == TWENTY
        assert router.served_by() == ["a", "b"]
        assert [list(r.resume_token_ids) for r in router.requests()] == [[], []]


@pytest.mark.parametrize(
    "script",
    [Script(die_after=7), Script(stall_after=7), Script(fail_after=7)],
    ids=["dies", "stalls", "fails"],
)
@pytest.mark.parametrize("roles", ["both", "split"])
async def test_failure_in_mid_stream_continues_elsewhere_unseen(
    tmp_path: Path, script: Script, roles: str
) -> None:
    script = Script(**{**vars(script), "times": 1})
    role = "both" if roles == "both" else "decode"
    workers = [FakeWorker(name, role, script=script) for name in "ab"]
    if roles == "split":
        workers.append(FakeWorker("p", "prefill"))
    async with running_router(tmp_path, *workers, stall_timeout_ms=300) as router:
        assert await router.chat_text(max_tokens=20) == TWENTY
        if roles == "both" or script.fail_after is None:
            assert set("ab") <= set(router.served_by())
        first, second = sorted(router.requests(), key=lambda r: len(r.resume_token_ids))
        assert list(first.resume_token_ids) == []
        assert bytes(second.resume_token_ids).decode() == "abcdefg"
        assert second.resume_text_chars == 7
        assert second.sampling == first.sampling
        text = await router.http.get("/metrics")
        assert "kvasir_router_continuations_total{" in await text.text()


@pytest.mark.parametrize("num_tokens", [0, 7], ids=["before-the-first-token", "mid-stream"])
async def test_a_worker_that_falls_silent_with_its_machine_is_given_up_early(
    tmp_path: Path, num_tokens: int
) -> None:
    workers = [FakeWorker(name, script=Script(stall_after=num_tokens, times=1)) for name in "ab"]
    workers[1].script = workers[0].script
    patience = {"silence_timeout_ms": 300, "lost_timeout_ms": 200}
    async with running_router(tmp_path, *workers, **patience) as router:
        answer = asyncio.create_task(router.chat_text(max_tokens=20))
        await router.until(lambda: bool(router.requests()))
        (worker,) = (w for w in workers if w.requests)
        worker.mute = True
        async with asyncio.timeout(10):
            assert await answer == TWENTY
        assert router.served_by() == ["a", "b"]


async def test_a_prefill_peer_that_falls_silent_is_given_up_early(tmp_path: Path) -> None:
    decode = FakeWorker("d", "decode", script=Script(stall_after=0, times=1))
    peers = {name: FakeWorker(name, "prefill") for name in ("p0", "p1")}
    patience = {"silence_timeout_ms": 300, "lost_timeout_ms": 200}
    async with running_router(tmp_path, decode, *peers.values(), **patience) as router:
        answer = asyncio.create_task(router.chat_text(max_tokens=20))
        await router.until(lambda: bool(decode.requests))
        peers[decode.requests[0].prefill_peer.name].mute = True
        async with asyncio.timeout(10):
            assert await answer == TWENTY
        assert sorted(r.prefill_peer.name for r in decode.requests) == ["p0", "p1"]


async def test_mid_stream_with_a_single_worker_goes_back_to_it(tmp_path: Path) -> None:
    worker = FakeWorker("a", script=Script(die_after=5, times=2))
    async with running_router(tmp_path, worker) as router:
        assert await router.chat_text(max_tokens=20) == TWENTY
        assert [len(r.resume_token_ids) for r in worker.requests] == [0, 5, 10]


async def test_a_worker_that_always_fails_ends_the_stream_with_an_error(tmp_path: Path) -> None:
    worker = FakeWorker("a", script=Script(die_after=2))
    async with running_router(tmp_path, worker, attempts_max=3) as router:
        with pytest.raises(openai.APIError) as caught:
            await router.chat_text(max_tokens=20)
        assert caught.value.code == "no_worker"
        assert len(worker.requests) == 3


async def test_the_deadline_ends_a_request(tmp_path: Path) -> None:
    worker = FakeWorker("a", script=Script(stall_after=0))
    async with running_router(tmp_path, worker, request_timeout_ms=300) as router:
        with pytest.raises(openai.InternalServerError) as caught:
            await router.chat_text()
        assert (caught.value.status_code, caught.value.code) == (504, "timeout")
        assert worker.requests[0].timeout_ms <= 300
        async with asyncio.timeout(5):
            await worker.cancelled.wait()


async def test_too_many_requests_in_flight_are_refused_at_once(tmp_path: Path) -> None:
    worker = FakeWorker("a", script=Script(stall_after=1))
    async with running_router(tmp_path, worker, requests_in_flight_max=1) as router:
        first = await router.openai.chat.completions.create(
            model="tiny", messages=HI, stream=True, max_tokens=9
        )
        with pytest.raises(openai.RateLimitError):
            await router.chat_text()
        await first.close()


async def test_no_worker_is_a_503_and_not_ready(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        with pytest.raises(openai.InternalServerError) as caught:
            await router.chat_text()
        assert (caught.value.status_code, caught.value.code) == (503, "no_worker")
        async with router.http.get("/readyz") as response:
            assert response.status == 503
            assert len((await response.json())["problems"]) == 2
        async with router.http.get("/healthz") as response:
            assert response.status == 200


async def test_shutdown_finishes_streams_and_takes_no_new_request(tmp_path: Path) -> None:
    worker = FakeWorker("a")
    async with running_router(tmp_path, worker) as router:
        stream = await router.openai.chat.completions.create(
            model="tiny", messages=HI, stream=True, max_tokens=400
        )
        stop = asyncio.create_task(router.server.stop())
        text = "".join([c.choices[0].delta.content or "" async for c in stream])
        assert len(text) == 400
        await stop
        with pytest.raises(openai.APIConnectionError):
            await router.chat_text()


async def test_shutdown_does_not_wait_for_ever(tmp_path: Path) -> None:
    worker = FakeWorker("a", script=Script(stall_after=1))
    async with running_router(tmp_path, worker, drain_timeout_ms=100) as router:
        stream = await router.openai.chat.completions.create(
            model="tiny", messages=HI, stream=True, max_tokens=9
        )
        async with asyncio.timeout(5):
            await router.server.stop()
            await worker.cancelled.wait()
        with pytest.raises(openai.APIError):
            [chunk async for chunk in stream]
