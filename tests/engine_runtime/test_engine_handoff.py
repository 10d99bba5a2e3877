"""A prompt computed by one engine and continued by another, over the real data plane."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from engine_builders import Served, collect, deadline_in, make_request, prompt, serving
from kvasir_engine.core.types import EngineRequest, FinishReason, Reservation
from kvasir_kvstore._native import BlockClient, BlockServer, PullResult
from kvasir_proto.errors import KvasirError, Reason

UID = bytes(range(16))
SAMPLED = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 1234}
_sessions = itertools.count(1)


@dataclass
class Pair:
    """A prefill engine with a server, and a decode engine with a client."""

    source: Served
    target: Served
    port: int
    client: BlockClient

    async def pull(
        self, session_id: int, reservation: Reservation, *, timeout_ms: int = 20_000
    ) -> PullResult:
        return await asyncio.to_thread(
            self.client.pull_session,
            host="127.0.0.1",
            port=self.port,
            uid=UID,
            epoch=1,
            session_id=session_id,
            blocks=reservation.blocks[reservation.num_blocks_cached :],
            timeout_ms=timeout_ms,
        )

    async def hand_off(self, request: EngineRequest) -> list[int]:
        """The whole protocol; the target's tokens."""
        reservation = await self.target.engine.reserve(request)
        session_id = next(_sessions)
        prefill = make_request(
            request.prompt + request.resume_tokens,
            session=session_id,
            sampling=request.sampling,
            skip_blocks=reservation.num_blocks_cached,
        )
        pulled, output = await asyncio.gather(
            self.pull(session_id, reservation), collect(self.source.engine.generate(prefill))
        )
        assert pulled.error == ""
        assert all(pulled.blocks_ok)
        assert len(output.tokens) == 1
        await self.source.engine.finish_handoff(prefill.request_id)
        stream = self.target.engine.activate(
            request.request_id,
            computed_tokens=len(prefill.prompt),
            extra_tokens=output.tokens,
        )
        return (await collect(stream)).tokens

    async def until_empty(self) -> None:
        await self.source.until_empty()
        await self.target.until_empty()


@asynccontextmanager
async def pair(*, chunk: int = 512, num_blocks: int = 64) -> AsyncIterator[Pair]:
    async with (
        serving(max_batch_tokens=chunk, num_blocks=num_blocks) as source,
        serving() as target,
    ):
        server = BlockServer(source.pool, host="127.0.0.1", port=0, uid=UID, epoch=1)
        client = BlockClient(target.pool)
        try:
            yield Pair(source, target, server.port, client)
        finally:
            client.close()
            server.stop()


async def reference(request: EngineRequest) -> list[int]:
    async with serving() as served:
        return await served.tokens(request)


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("chunk", [7, 512])
@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 64, 100])
async def test_a_handed_off_request_gives_the_same_tokens(
    num_tokens: int, chunk: int, sampling: dict
) -> None:
    request = make_request(prompt(num_tokens), max_tokens=40, **sampling)
    async with pair(chunk=chunk) as engines:
        tokens = await engines.hand_off(request)
        await engines.until_empty()
    assert tokens == await reference(request)


async def test_what_the_target_has_is_not_pulled_again() -> None:
    async with pair() as engines:
        first = make_request(prompt(100), max_tokens=40)
        tokens = await engines.hand_off(first)
        names = engines.target.engine.holds
        longer = make_request(prompt(100) + tuple(tokens) + (5, 6, 7), max_tokens=20)
        reservation = await engines.target.engine.reserve(longer)
        assert reservation.tokens_cached == 128  # blocks of output count as well
        assert names(reservation.names) == [True] * 4
        await engines.target.engine.release(longer.request_id)
        assert await engines.hand_off(longer) == await reference(longer)
        await engines.until_empty()


async def test_pulled_blocks_can_be_pulled_by_name_from_the_target() -> None:
    async with pair() as engines:
        request = make_request(prompt(100), max_tokens=2)
        await engines.hand_off(request)
        again = await engines.target.engine.reserve(make_request(prompt(100), request_id="again"))
        assert all(engines.target.pool.lookup(name) is not None for name in again.names)
        await engines.target.engine.release("again")


async def test_a_pull_that_brings_a_part_leaves_the_rest_to_be_computed() -> None:
    async with pair() as engines:
        request = make_request(prompt(100), max_tokens=40)
        expected = await reference(request)
        reservation = await engines.target.engine.reserve(request)
        prefill = make_request(prompt(100), session=901)
        output = await collect(engines.source.engine.generate(prefill))
        pulled = await engines.pull(901, reservation)
        assert all(pulled.blocks_ok)
        engines.target.pool.reset(reservation.blocks[2])  # as if it had been damaged
        stream = engines.target.engine.activate(
            request.request_id, computed_tokens=100, extra_tokens=output.tokens
        )
        outcome = await collect(stream)
        assert outcome.tokens == expected
        timing = outcome.events[-1].timing
        assert timing is not None
        assert (timing.tokens_fetched, timing.tokens_computed) == (64, 36)
        await engines.source.engine.finish_handoff(prefill.request_id)
        await engines.until_empty()


async def test_the_first_token_may_end_the_request() -> None:
    async with pair() as engines:
        request = make_request(prompt(40), max_tokens=1)
        reservation = await engines.target.engine.reserve(request)
        stream = engines.target.engine.activate(
            request.request_id, computed_tokens=0, extra_tokens=(7,)
        )
        output = await collect(stream)
        assert (output.tokens, output.finish_reason) == ([7], FinishReason.LENGTH)
        assert len(reservation.blocks) == 2
        await engines.until_empty()


async def test_memory_returns_when_the_prefill_is_cancelled_and_the_puller_is_told() -> None:
    async with pair(chunk=1) as engines:
        request = make_request(prompt(500), max_tokens=1)
        reservation = await engines.target.engine.reserve(request)
        prefill = make_request(prompt(500), session=902)
        stream = engines.source.engine.generate(prefill)
        pull = asyncio.create_task(engines.pull(902, reservation))
        load = engines.source.engine.load
        await engines.source.until(lambda: 0 < load().prefill_tokens_queued < 480)
        engines.source.engine.cancel(prefill.request_id, Reason.DRAINING)
        with pytest.raises(KvasirError) as ended:
            await collect(stream)
        assert ended.value.reason is Reason.DRAINING
        pulled = await pull
        assert pulled.error == "aborted"
        await engines.source.until_empty()
        await engines.target.engine.release(request.request_id)
        await engines.until_empty()


async def test_memory_returns_when_nobody_pulls() -> None:
    async with pair() as engines:
        prefill = make_request(prompt(100), session=903, deadline_ms=deadline_in(300))
        await collect(engines.source.engine.generate(prefill))
        assert engines.source.engine.load().num_handoffs == 1
        assert engines.source.num_blocks_free == 60
        await engines.source.until_empty()


async def test_memory_returns_when_a_handoff_is_given_up() -> None:
    async with pair() as engines:
        prefill = make_request(prompt(100), session=904)
        await collect(engines.source.engine.generate(prefill))
        await engines.source.engine.finish_handoff(prefill.request_id)
        await engines.source.engine.finish_handoff(prefill.request_id)
        assert engines.source.engine.num_requests_open == 0
        await engines.until_empty()


async def test_finishing_a_handoff_that_still_runs_ends_it() -> None:
    async with pair(chunk=1) as engines:
        prefill = make_request(prompt(1000), session=905)
        stream = engines.source.engine.generate(prefill)
        await engines.source.engine.finish_handoff(prefill.request_id)
        assert engines.source.engine.num_requests_open == 0
        with pytest.raises(KvasirError):
            await collect(stream)
        await engines.until_empty()


async def test_a_session_id_in_use_fails_the_second_request_only() -> None:
    async with pair() as engines:
        first, second = (make_request(prompt(40, seed=s), session=906) for s in (1, 2))
        await collect(engines.source.engine.generate(first))
        with pytest.raises(KvasirError) as failed:
            await collect(engines.source.engine.generate(second))
        assert failed.value.reason is Reason.INTERNAL
        await engines.source.until(lambda: engines.source.engine.num_requests_open == 1)
        assert engines.source.pool.num_sessions == 1
        await engines.source.engine.finish_handoff(first.request_id)
        await engines.until_empty()


async def test_a_reserved_prefill_streams_after_activation() -> None:
    """A prefill worker that fetches from the KV tier first."""
    async with pair() as engines:
        request = make_request(prompt(100), max_tokens=40)
        expected = await reference(request)
        reservation = await engines.target.engine.reserve(request)
        prefill = make_request(prompt(100), session=907)
        await engines.source.engine.reserve(prefill)
        stream = engines.source.engine.activate(prefill.request_id, computed_tokens=0)
        pulled, output = await asyncio.gather(engines.pull(907, reservation), collect(stream))
        assert pulled.error == ""
        rest = await collect(
            engines.target.engine.activate(
                request.request_id, computed_tokens=100, extra_tokens=output.tokens
            )
        )
        assert rest.tokens == expected
        await engines.source.engine.finish_handoff(prefill.request_id)
        await engines.until_empty()
