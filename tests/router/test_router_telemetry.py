"""Telemetry for the planner: counters that only grow, lengths, attainment, the queue's age."""

import asyncio
from pathlib import Path

import grpc.aio
import pytest
from fake_worker import FakeWorker, Script
from kvasir_proto.v1 import common_pb2, inference_pb2
from router_fixtures import running_router


def ask(num_tokens: int = 5) -> inference_pb2.InferenceRequest:
    sampling = common_pb2.SamplingParams(max_tokens=num_tokens)
    return inference_pb2.InferenceRequest(model="tiny", prompt="hello", sampling=sampling)


async def told(stub) -> inference_pb2.RouterTelemetry:
    return await stub.Telemetry(inference_pb2.TelemetryRequest(), timeout=5)


async def test_served_requests_are_measured_and_judged(tmp_path: Path) -> None:
    async with running_router(tmp_path, FakeWorker("p", "prefill"), FakeWorker("d", "decode")) as r:
        before = await told(r.stub)
        for _ in range(3):
            async for _ in r.stub.Generate(ask(), timeout=10):
                pass
        after = await told(r.stub)
    assert (before.arrivals, before.measured) == (0, 0)
    assert after.epoch_ms == before.epoch_ms > 0
    assert (after.arrivals, after.measured, after.judged, after.attained) == (3, 3, 3, 3)
    assert after.prompt_tokens == 3 * 5
    assert after.output_tokens == 3 * 5
    assert (after.requests_waiting, after.queue_age_ms) == (0, 0)


async def test_refused_requests_have_missed_their_slo(tmp_path: Path) -> None:
    async with running_router(tmp_path, FakeWorker("p", "prefill")) as router:
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in router.stub.Generate(ask(), timeout=10):
                pass
        after = await told(router.stub)
    assert (after.arrivals, after.refused, after.judged, after.attained) == (1, 1, 1, 0)
    assert after.measured == 0


async def test_request_without_a_first_token_counts_as_waiting(tmp_path: Path) -> None:
    held = Script(pause_after=0)
    workers = FakeWorker("p", "prefill", script=held), FakeWorker("d", "decode", script=held)
    async with running_router(tmp_path, *workers) as router:
        call = router.stub.Generate(ask(), timeout=10)
        async with asyncio.timeout(10):
            waiting = await told(router.stub)
            while not waiting.queue_age_ms:
                waiting = await told(router.stub)
        assert waiting.requests_waiting == 1
        for worker in workers:
            worker.resume.set()
        async for _ in call:
            pass
        assert (await told(router.stub)).requests_waiting == 0
