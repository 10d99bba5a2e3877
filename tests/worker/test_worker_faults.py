"""Peers that die or hang in the middle of a hand-off: the right reason, and nothing is leaked."""

import asyncio
import signal
from pathlib import Path

import grpc.aio
import pytest
from kvasir_proto.errors import PEER_PARAM, Reason
from kvasir_proto.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from worker_builders import (
    address_of,
    make_model_dir,
    make_request,
    prompt,
    started,
    until,
    worker_process,
)

LONG = 1000
"""Tokens that take a while at one a step."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("models") / "tiny")


def prefill_request(
    length: int, *, session_id: int = 5, seed: int = 1
) -> worker_pb2.PrefillRequest:
    request = make_request(prompt(length, seed=seed))
    return worker_pb2.PrefillRequest(
        request_id=request.request_id,
        token_ids=request.token_ids,
        sampling=request.sampling,
        session_id=session_id,
        timeout_ms=60_000,
    )


async def begun(stub: worker_pb2_grpc.WorkerStub, request: worker_pb2.PrefillRequest):
    """A Prefill call as a decode worker makes it, as far as `start`."""
    call = stub.Prefill(timeout=60)
    await call.write(worker_pb2.PrefillCommand(request=request))
    assert (await call.read()).HasField("accepted")
    assert (await call.read()).HasField("turn")
    await call.write(worker_pb2.PrefillCommand(start=worker_pb2.PrefillStart()))
    return call


async def test_prefill_worker_killed_before_the_first_token_is_named(
    model: Path, unused_tcp_port: int
) -> None:
    with worker_process(
        model, "p", "prefill", grpc_port=unused_tcp_port, max_batch_tokens=1
    ) as process:
        async with started(model, "d", role="decode") as decode:
            peer = await address_of(unused_tcp_port)
            request = make_request(prompt(LONG), prefill_peer=peer)
            generating = asyncio.create_task(decode.generate(request))
            await until(lambda: decode.host.state.num_in_flight == 1)
            pool = decode.host.served().pool
            await until(lambda: bool((pool.ready > 0).sum() > 1) or generating.done())
            process.popen.kill()
            result = await generating
            assert result.error is not None
            assert result.error.reason in (Reason.NO_WORKER, Reason.KV_TRANSFER)
            assert result.error.param == PEER_PARAM
            await until(lambda: decode.is_idle)


async def test_prefill_worker_that_hangs_is_given_up(model: Path, unused_tcp_port: int) -> None:
    with worker_process(model, "p", "prefill", grpc_port=unused_tcp_port) as process:
        async with started(model, "d", role="decode", accept_timeout_ms=300) as decode:
            peer = await address_of(unused_tcp_port)
            process.popen.send_signal(signal.SIGSTOP)
            result = await decode.generate(make_request(prompt(70), prefill_peer=peer))
            assert (result.error.reason, result.error.param) == (Reason.NO_WORKER, PEER_PARAM)
            await until(lambda: decode.is_idle)


async def test_decode_worker_killed_while_it_pulls_leaves_nothing_behind(
    model: Path, unused_tcp_port: int
) -> None:
    async with started(model, "p", role="prefill", max_batch_tokens=1) as prefill:
        with worker_process(
            model, "d", "decode", grpc_port=unused_tcp_port, local_prefill_tokens_max=0
        ) as process:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{unused_tcp_port}") as channel:
                generate = channel.unary_stream(
                    "/kvasir.v1.Worker/Generate",
                    request_serializer=worker_pb2.GenerateRequest.SerializeToString,
                )
                request = make_request(prompt(LONG), prefill_peer=prefill.address)
                call = generate(request, timeout=60)
                await until(lambda: prefill.host.state.num_in_flight == 1)
                process.popen.kill()
                with pytest.raises(grpc.aio.AioRpcError):
                    await call.read()
        await until(lambda: prefill.is_idle)


async def test_kv_that_nobody_pulls_is_freed_at_its_deadline(model: Path) -> None:
    async with started(model, "p", role="prefill", handoff_hold_ms=100) as prefill:
        call = await begun(prefill.stub, prefill_request(100))
        finished = await call.read()
        assert await call.read() is grpc.aio.EOF
        assert finished.finished.tokens_computed == 100
        await until(lambda: prefill.is_idle)
        assert await prefill.metric('kvasir_worker_requests_total{reason="not_pulled"') == 1


async def test_cancelled_prefill_frees_its_kv(model: Path) -> None:
    async with started(model, "p", role="prefill") as prefill:
        call = await begun(prefill.stub, prefill_request(100))
        await call.read()
        assert not prefill.is_idle  # held
        call.cancel()
        await until(lambda: prefill.is_idle)


async def test_client_that_leaves_during_a_hand_off_frees_both_sides(model: Path) -> None:
    async with (
        started(model, "p", role="prefill", max_batch_tokens=1) as prefill,
        started(model, "d", role="decode") as decode,
    ):
        request = make_request(prompt(LONG), prefill_peer=prefill.address)
        posting = asyncio.create_task(decode.generate(request))
        await until(lambda: prefill.host.state.num_in_flight == 1)
        posting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await posting
        await until(lambda: prefill.is_idle and decode.is_idle)


async def test_deadline_during_a_hand_off_frees_both_sides(model: Path) -> None:
    async with (
        started(model, "p", role="prefill", max_batch_tokens=1) as prefill,
        started(model, "d", role="decode") as decode,
    ):
        request = make_request(prompt(LONG), prefill_peer=prefill.address, timeout_ms=60)
        result = await decode.generate(request)
        assert result.error.reason is Reason.TIMEOUT
        await until(lambda: prefill.is_idle and decode.is_idle)


async def test_drain_of_the_prefill_worker_hands_the_request_back(model: Path) -> None:
    async with (
        started(model, "p", role="prefill", max_batch_tokens=1) as prefill,
        started(model, "d", role="decode") as decode,
    ):
        request = make_request(prompt(LONG), prefill_peer=prefill.address)
        generating = asyncio.create_task(decode.generate(request))
        await until(lambda: prefill.host.state.num_in_flight == 1)
        drain = prefill.stub.Drain(worker_pb2.DrainRequest(timeout_ms=1), timeout=30)
        assert [progress async for progress in drain][-1].drained
        result = await generating
        assert (result.error.reason, result.error.param) == (Reason.DRAINING, PEER_PARAM)
        await until(lambda: prefill.is_idle and decode.is_idle)


async def test_request_that_would_wait_too_long_is_handed_back_busy(model: Path) -> None:
    async with (
        started(model, "p", role="both", max_batch_tokens=4) as prefill,
        started(model, "d", role="decode") as decode,
    ):
        await prefill.generate(make_request(prompt(100)))  # measures its speed
        ahead = [
            asyncio.create_task(
                decode.generate(make_request(prompt(LONG, seed=i), prefill_peer=prefill.address))
            )
            for i in range(1, 6)
        ]
        await until(lambda: prefill.host.load().prefill_tokens_queued > 3000)
        own_ms = 200 * prefill.host.engine_load().prefill_us_per_token / 1000
        terms = common_pb2.QueueTerms(ttft_left_ms=int(3 * own_ms) + 1)
        request = make_request(prompt(200), prefill_peer=prefill.address, terms=terms)
        result = await decode.generate(request)
        assert result.error is not None
        assert (result.error.reason, result.error.param) == (Reason.BUSY, PEER_PARAM)
        assert result.error.retry_after_ms > 0
        for task in ahead:
            task.cancel()
        await until(lambda: prefill.is_idle and decode.is_idle)
