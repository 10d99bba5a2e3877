"""Errors keep their reason, field and retry hint across a real gRPC call."""

from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from kvasir_proto import rpc_errors
from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import common_pb2, kvnode_pb2, kvnode_pb2_grpc


class RefusingNode(kvnode_pb2_grpc.KvNodeServicer):
    """Refuses every call with the error it was made with."""

    def __init__(self, error: KvasirError) -> None:
        self.error = error

    async def Describe(self, request, context):
        """Refuses."""
        await rpc_errors.abort(context, self.error)


@pytest.fixture
async def refused() -> AsyncIterator:
    """A function that makes a server refuse with an error and returns what the caller saw."""
    servers = []

    async def refuse(error: KvasirError) -> KvasirError:
        server = grpc.aio.server()
        kvnode_pb2_grpc.add_KvNodeServicer_to_server(RefusingNode(error), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await kvnode_pb2_grpc.KvNodeStub(channel).Describe(
                    kvnode_pb2.DescribeKvNodeRequest(), timeout=10
                )
        return rpc_errors.error_from_rpc(caught.value)

    yield refuse
    for server in servers:
        await server.stop(None)


@pytest.mark.parametrize("reason", list(Reason))
async def test_caller_sees_the_callees_error(refused, reason: Reason) -> None:
    seen = await refused(KvasirError(reason, "why", param="sampling.top_p", retry_after_ms=70))
    assert (seen.reason, seen.message, seen.param, seen.retry_after_ms) == (
        reason,
        "why",
        "sampling.top_p",
        70,
    )


async def test_nobody_listening_is_no_worker(unused_tcp_port: int) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{unused_tcp_port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await kvnode_pb2_grpc.KvNodeStub(channel).Describe(
                kvnode_pb2.DescribeKvNodeRequest(), timeout=10
            )
    assert rpc_errors.error_from_rpc(caught.value).reason is Reason.NO_WORKER


def test_unknown_reason_becomes_internal() -> None:
    seen = rpc_errors.error_from_message(common_pb2.Error(reason="from_the_future", message="m"))
    assert (seen.reason, seen.message) == (Reason.INTERNAL, "m")
