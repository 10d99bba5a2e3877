"""Prompts that wait for their turn hold no KV memory anywhere, and end in every way cleanly."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from kvasir_proto.errors import PEER_PARAM, Reason
from kvasir_proto.v1 import common_pb2, worker_pb2
from worker_builders import RunningWorker, make_model_dir, make_request, prompt, started, until

LONG = 1000
"""Tokens that keep an engine busy at one a step."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@asynccontextmanager
async def busy_pair(model: Path) -> AsyncIterator[tuple[RunningWorker, RunningWorker]]:
    """A prefill worker that computes a long prompt, and a decode worker that waits for it."""
    async with (
        started(model, "p", role="prefill", max_batch_tokens=1) as prefill,
        started(model, "d", role="decode") as decode,
    ):
        request = make_request(prompt(LONG), prefill_peer=prefill.address)
        ahead = asyncio.create_task(decode.generate(request))
        await until(lambda: prefill.host.engine_load().num_running == 1)
        await until(lambda: decode.host.engine_load().num_reserved == 1)
        try:
            yield prefill, decode
        finally:
            ahead.cancel()
            await asyncio.gather(ahead, return_exceptions=True)
        await until(lambda: prefill.is_idle and decode.is_idle)


async def queued(prefill: RunningWorker, decode: RunningWorker, **changes: object):
    """A request that waits at the prefill worker: its task and its id."""
    request = make_request(prompt(70, seed=2), prefill_peer=prefill.address, **changes)
    before = prefill.host.admission.num_waiting
    task = asyncio.create_task(decode.generate(request))
    await until(lambda: prefill.host.admission.num_waiting == before + 1)
    return task, request.request_id


async def test_waiting_request_holds_no_kv_memory_on_either_side(model: Path) -> None:
    async with busy_pair(model) as (prefill, decode):
        free = [worker.host.engine_load().blocks_free for worker in (prefill, decode)]
        task, _ = await queued(prefill, decode)
        assert [worker.host.engine_load().blocks_free for worker in (prefill, decode)] == free
        assert prefill.host.engine_load().num_waiting == 1, "the long one alone"
        assert prefill.host.load().num_waiting == 2
        assert prefill.host.load().prefill_tokens_queued >= 70
        task.cancel()


async def test_request_that_waited_gets_the_same_tokens(model: Path) -> None:
    async with started(model, "alone") as worker:
        expected = (await worker.generate(make_request(prompt(70, seed=2)))).tokens
    async with (
        started(model, "p", role="prefill", max_batch_tokens=8) as prefill,
        started(model, "d", role="decode") as decode,
    ):
        request = make_request(prompt(LONG), prefill_peer=prefill.address)
        ahead = asyncio.create_task(decode.generate(request))
        await until(lambda: prefill.host.engine_load().num_running == 1)
        task, _ = await queued(prefill, decode)
        result = await task
        assert result.tokens == expected
        assert result.stats.queue_ms > 0
        assert (await ahead).error is None
        await until(lambda: prefill.is_idle and decode.is_idle)


async def test_client_that_leaves_while_queued_leaves_the_queue(model: Path) -> None:
    async with busy_pair(model) as (prefill, decode):
        task, _ = await queued(prefill, decode)
        task.cancel()
        await until(lambda: prefill.host.admission.num_waiting == 0)
        await until(lambda: decode.host.state.num_in_flight == 1)


async def test_deadline_while_queued_ends_both_sides(model: Path) -> None:
    async with busy_pair(model) as (prefill, decode):
        task, _ = await queued(prefill, decode, timeout_ms=80)
        assert (await task).error.reason is Reason.TIMEOUT
        await until(lambda: prefill.host.admission.num_waiting == 0)


async def test_drain_while_queued_hands_the_request_back(model: Path) -> None:
    async with busy_pair(model) as (prefill, decode):
        task, _ = await queued(prefill, decode)
        drain = prefill.stub.Drain(worker_pb2.DrainRequest(timeout_ms=1), timeout=30)
        assert [progress async for progress in drain][-1].drained
        error = (await task).error
        assert (error.reason, error.param) == (Reason.DRAINING, PEER_PARAM)


async def test_only_requests_that_still_wait_are_handed_back(model: Path) -> None:
    async with busy_pair(model) as (prefill, decode):
        task, request_id = await queued(prefill, decode)
        running = [ticket.request_id for ticket in prefill.host.state.tickets()]
        answer = await prefill.stub.HandBack(
            worker_pb2.HandBackRequest(request_ids=[*running, "nobody"]), timeout=10
        )
        assert answer.num_handed_back == 1
        error = (await task).error
        assert (error.reason, error.param) == (Reason.BUSY, PEER_PARAM)
        assert request_id in running
        assert prefill.host.engine_load().num_running == 1, "what runs goes on"


async def test_request_without_an_objective_is_never_refused(model: Path) -> None:
    async with busy_pair(model) as (prefill, decode):
        await queued(prefill, decode, terms=common_pb2.QueueTerms(ttft_left_ms=0))
        assert prefill.host.admission.num_waiting == 1


async def test_whole_requests_wait_without_memory_too(model: Path) -> None:
    async with started(model, "w", max_batch_tokens=1) as worker:
        ahead = asyncio.create_task(worker.generate(make_request(prompt(LONG))))
        await until(lambda: worker.host.engine_load().num_running == 1)
        task = asyncio.create_task(worker.generate(make_request(prompt(70, seed=2))))
        await until(lambda: worker.host.admission.num_waiting == 1)
        assert worker.host.engine_load().num_waiting == 1
        for each in (task, ahead):
            each.cancel()
        await until(lambda: worker.is_idle)
