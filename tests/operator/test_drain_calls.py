"""Drains over gRPC against a worker that only knows Drain."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from kvasir_operator import drain as drain_module
from kvasir_operator.core.manifests import Ref
from kvasir_operator.core.views import DrainView, PodView
from kvasir_operator.drain import Drainer
from kvasir_proto.v1 import worker_pb2, worker_pb2_grpc
from operator_builders import make_channels, make_pod_view

POOL = Ref("DecodePool", "default", "chat-decode")


class FakeWorker(worker_pb2_grpc.WorkerServicer):
    """Drains in two steps; refuses the first `num_failures` calls."""

    def __init__(self, *, num_failures: int = 0) -> None:
        self.num_failures = num_failures
        self.timeouts_ms: list[int] = []

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.DrainProgress]:
        self.timeouts_ms.append(request.timeout_ms)
        if self.num_failures:
            self.num_failures -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        yield worker_pb2.DrainProgress(num_requests_left=2, num_blocks_left=5)
        yield worker_pb2.DrainProgress(drained=True)


def make_worker() -> PodView:
    return make_pod_view("p-0", uid="uid", ip="127.0.0.1")


async def serve(worker: FakeWorker, monkeypatch: pytest.MonkeyPatch) -> grpc.aio.Server:
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
    monkeypatch.setattr(drain_module, "WORKER_GRPC_PORT", server.add_insecure_port("127.0.0.1:0"))
    monkeypatch.setattr(drain_module, "RETRY_DELAY_S", 0.01)
    await server.start()
    return server


async def wait_until_over(drainer: Drainer, changed: asyncio.Event) -> DrainView:
    async with asyncio.timeout(20):
        while not drainer.views()["uid"].is_over:
            await changed.wait()
            changed.clear()
    return drainer.views()["uid"]


@pytest.mark.parametrize("num_failures", [0, 2])
async def test_drain_follows_the_worker_to_its_end(
    num_failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, changed, told = FakeWorker(num_failures=num_failures), asyncio.Event(), []
    server = await serve(worker, monkeypatch)

    def on_progress(pool: Ref) -> None:
        told.append(pool)
        changed.set()

    drainer = Drainer(make_channels(), on_progress=on_progress)
    assert drainer.start(POOL, make_worker(), timeout_s=30)
    assert not drainer.start(POOL, make_worker(), timeout_s=30)
    view = await wait_until_over(drainer, changed)
    assert view == DrainView(0, 0, is_over=True)
    assert worker.timeouts_ms == [30_000] * (num_failures + 1)
    assert set(told) == {POOL}
    await drainer.close()
    await server.stop(None)


async def test_worker_that_cannot_be_reached_is_given_up_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drain_module, "WORKER_GRPC_PORT", 1)
    monkeypatch.setattr(drain_module, "RETRY_DELAY_S", 0.01)
    monkeypatch.setattr(drain_module, "ANSWER_MARGIN_S", 0.1)
    changed = asyncio.Event()
    drainer = Drainer(make_channels(), on_progress=lambda _: changed.set())
    assert drainer.start(POOL, make_worker(), timeout_s=0)
    view = await wait_until_over(drainer, changed)
    assert view == DrainView(is_over=True)
    await drainer.close()
