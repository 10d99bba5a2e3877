"""Prompts that wait for their turn hold no KV memory anywhere, and end in every way cleanly."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from kvasir_proto.errors import PEER_PARAM, Reason
from kvasir_proto.v1 import common_pb2, worker_pb2
from worker_builders import RunningWorker, make_model_dir, make_request, prompt, started, until


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@asynccontextmanager
async def closed_pair(model: Path) -> AsyncIterator[tuple[RunningWorker, RunningWorker]]:
    """A prefill worker whose engine takes nothing more, and a decode worker that waits for it."""
    async with (
        started(model, "p", role="prefill") as prefill,
        started(model, "d", role="decode") as decode,
    ):
        lookahead_tokens = prefill.host.admission.lookahead_tokens
        prefill.host.admission.lookahead_tokens = 0
        yield prefill, decode
        prefill.host.admission.lookahead_tokens = lookahead_tokens
        await until(lambda: prefill.is_idle and decode.is_idle)


async def queued(prefill: RunningWorker, decode: RunningWorker, **changes: object):
    """A request that waits at the prefill worker: its task and its id."""
    seed = prefill.host.admission.num_waiting + 2
    request = make_request(prompt(300, seed=seed), prefill_peer=prefill.address, **changes)
    before = prefill.host.admission.num_waiting
    task = asyncio.create_task(decode.generate(request))
    await until(lambda: prefill.host.admission.num_waiting == before + 1)
    return task, request.request_id


async def test_waiting_request_holds_no_kv_memory_on_either_side(model: Path) -> None:
    async with closed_pair(model) as (prefill, decode):
        await queued(prefill, decode)
        for worker in (prefill, decode):
            load = worker.host.engine_load()
            assert load.blocks_free == load.blocks_total
            assert load.num_running == load.num_waiting == load.num_reserved == 0
        assert prefill.host.load().num_waiting == 1
        assert prefill.host.load().prefill_tokens_queued == 300
        assert prefill.host.describe().load.prefill_tokens_queued == 300


async def test_request_that_waited_gets_the_same_tokens(model: Path) -> None:
    async with started(model, "alone") as worker:
        expected = (await worker.generate(make_request(prompt(300, seed=2)))).tokens
    async with closed_pair(model) as (prefill, decode):
        task, _ = await queued(prefill, decode)
        prefill.host.admission.lookahead_tokens = 512
        result = await task
        assert result.tokens == expected
        assert result.stats.queue_ms > 0


async def test_turns_come_in_the_order_of_deadlines(model: Path) -> None:
    async with closed_pair(model) as (prefill, decode):
        done: list[int] = []
        tasks = []
        for left_ms in (50_000, 30_000, 40_000):
            terms = common_pb2.QueueTerms(ttft_left_ms=left_ms // 2)
            task, _ = await queued(prefill, decode, terms=terms)
            task.add_done_callback(lambda _, left_ms=left_ms: done.append(left_ms))
            tasks.append(task)
        prefill.host.admission.lookahead_tokens = 1  # one at a time
        assert [(await task).error for task in tasks] == [None] * 3
        assert done == [30_000, 40_000, 50_000]


async def test_client_that_leaves_while_queued_leaves_the_queue(model: Path) -> None:
    async with closed_pair(model) as (prefill, decode):
        task, _ = await queued(prefill, decode)
        task.cancel()
        await until(lambda: prefill.is_idle and decode.is_idle)


async def test_deadline_while_queued_ends_both_sides(model: Path) -> None:
    async with closed_pair(model) as (prefill, decode):
        task, _ = await queued(prefill, decode, timeout_ms=1_000)
        assert (await task).error.reason is Reason.TIMEOUT
        await until(lambda: prefill.is_idle and decode.is_idle)


async def test_drain_while_queued_hands_the_request_back(model: Path) -> None:
    async with closed_pair(model) as (prefill, decode):
        task, _ = await queued(prefill, decode)
        drain = prefill.stub.Drain(worker_pb2.DrainRequest(timeout_ms=1), timeout=30)
        assert [progress async for progress in drain][-1].drained
        error = (await task).error
        assert (error.reason, error.param) == (Reason.DRAINING, PEER_PARAM)


async def test_only_requests_that_still_wait_are_recalled(model: Path) -> None:
    async with closed_pair(model) as (prefill, decode):
        task, request_id = await queued(prefill, decode)
        kept, _ = await queued(prefill, decode)
        answer = await prefill.stub.HandBack(
            worker_pb2.HandBackRequest(request_ids=[request_id, "nobody"]), timeout=10
        )
        assert answer.num_handed_back == 1
        error = (await task).error
        assert (error.reason, error.param) == (Reason.BUSY, PEER_PARAM)
        assert prefill.host.admission.num_waiting == 1
        prefill.host.admission.lookahead_tokens = 512
        assert len((await kept).tokens) == 8
        again = await prefill.stub.HandBack(
            worker_pb2.HandBackRequest(request_ids=[request_id]), timeout=10
        )
        assert again.num_handed_back == 0
        assert await prefill.metric('kvasir_worker_given_up_total{why="recalled"') == 1


@pytest.mark.parametrize("may_move", [True, False], ids=["hand-back", "refuse"])
async def test_costliest_of_those_that_cannot_all_be_in_time_is_given_up(
    model: Path, may_move: bool
) -> None:
    async with closed_pair(model) as (prefill, decode):
        speed_of(prefill, us_per_token=1_000)
        terms = common_pb2.QueueTerms(ttft_left_ms=5_000, may_move=may_move)
        tokens = [prompt(n, seed=n) for n in (900, 1_000, 960)]
        small = make_request(tokens[0], prefill_peer=prefill.address, terms=terms)
        terms.ttft_left_ms = 1_500
        large, other = (
            make_request(t, prefill_peer=prefill.address, terms=terms) for t in tokens[1:]
        )
        tasks = {}
        for name, request in (("small", small), ("large", large)):
            tasks[name] = asyncio.create_task(decode.generate(request))
            await until(lambda: prefill.host.admission.num_waiting == len(tasks))
        tasks["other"] = asyncio.create_task(decode.generate(other))
        error = (await tasks["large"]).error
        assert (error.reason, error.param) == (Reason.BUSY, PEER_PARAM)
        assert error.retry_after_ms > 0
        assert prefill.host.admission.num_waiting == 2
        why = "hand_back" if may_move else "refuse"
        assert await prefill.metric(f'kvasir_worker_given_up_total{{why="{why}"') == 1
        for task in tasks.values():
            task.cancel()


async def test_short_prompt_is_called_beside_a_long_one(model: Path) -> None:
    async with closed_pair(model) as (prefill, decode):
        long = make_request(prompt(900), prefill_peer=prefill.address)
        waiting = asyncio.create_task(decode.generate(long))
        await until(lambda: prefill.host.admission.num_waiting == 1)
        short = make_request(prompt(70, seed=3), prefill_peer=prefill.address)
        assert (await decode.generate(short)).error is None, "though the engine takes no more"
        assert prefill.host.admission.tokens_waiting == 900
        waiting.cancel()


async def test_prompt_that_another_has_computed_in_part_costs_less(model: Path) -> None:
    async with closed_pair(model) as (prefill, decode):
        shared = prompt(300)
        task = asyncio.create_task(
            decode.generate(make_request([*shared, 7, 8], prefill_peer=prefill.address))
        )
        await until(lambda: prefill.host.admission.tokens_waiting == 302)
        held = prefill.host.served().names(shared, tenant_salt=b"")
        prefill.host.hub.blocks_changed(stored=held, removed=())
        prefill.host.admission.blocks_stored(held)
        assert prefill.host.admission.tokens_waiting == 302 - 288
        prefill.host.hub.blocks_changed(stored=(), removed=held)
        prefill.host.admission.lookahead_tokens = 512
        assert len((await task).tokens) == 8


async def test_request_without_an_objective_is_never_given_up(model: Path) -> None:
    async with closed_pair(model) as (prefill, decode):
        speed_of(prefill, us_per_token=1e6)
        task, _ = await queued(prefill, decode)
        prefill.host.admission.lookahead_tokens = 512
        assert len((await task).tokens) == 8


async def test_whole_requests_wait_without_memory_too(model: Path) -> None:
    async with started(model, "w") as worker:
        worker.host.admission.lookahead_tokens = 0
        task = asyncio.create_task(worker.generate(make_request(prompt(300, seed=2))))
        await until(lambda: worker.host.admission.num_waiting == 1)
        assert worker.host.engine_load().num_waiting == 0
        task.cancel()
        await until(lambda: worker.is_idle)


def speed_of(worker: RunningWorker, *, us_per_token: float) -> None:
    """What the worker believes of its own speed."""
    measured = worker.host.engine_load
    worker.host.admission.engine_load = lambda: replace(
        measured(), prefill_us_per_token=us_per_token
    )
