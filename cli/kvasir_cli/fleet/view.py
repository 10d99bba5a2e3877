"""What the parts of a running fleet say of themselves, asked by gRPC."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from kvasir_proto.links import Links
from kvasir_proto.v1 import inference_pb2, inference_pb2_grpc, kvnode_pb2, kvnode_pb2_grpc

from kvasir_cli.errors import CommandError

CALL_TIMEOUT_S = 3.0
CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0),)


@dataclass(frozen=True, slots=True)
class KvNodeView:
    """One KV node; `description` is None if it does not answer."""

    address: str
    description: kvnode_pb2.KvNodeDescription | None


async def ask_router(address: str) -> inference_pb2.FleetView:
    """The router's view of its workers.

    Raises:
        CommandError: it does not answer.
    """
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        try:
            return await stub.Fleet(inference_pb2.FleetRequest(), timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise CommandError(
                f"the router does not answer at {address}: {error.details()}"
            ) from error


async def ask_kv_nodes(addresses: Sequence[str], links: Links) -> list[KvNodeView]:
    """All KV nodes' descriptions, in order."""
    return list(await asyncio.gather(*(_ask_kv_node(address, links) for address in addresses)))


async def _ask_kv_node(address: str, links: Links) -> KvNodeView:
    async with links.channel(address, CHANNEL_OPTIONS) as channel:
        stub = kvnode_pb2_grpc.KvNodeStub(channel)
        request = kvnode_pb2.DescribeKvNodeRequest()
        try:
            return KvNodeView(address, await stub.Describe(request, timeout=CALL_TIMEOUT_S))
        except grpc.aio.AioRpcError:
            return KvNodeView(address, None)
