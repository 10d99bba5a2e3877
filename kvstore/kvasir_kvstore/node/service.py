"""gRPC of a KV node: turns messages into calls of the store, and its errors into statuses."""

from contextlib import aclosing
from typing import Any

import grpc.aio
from kvasir_proto.errors import KvasirError
from kvasir_proto.rpc_errors import abort
from kvasir_proto.v1 import kvnode_pb2, kvnode_pb2_grpc

from kvasir_kvstore.node.store import NodeStore

Context = grpc.aio.ServicerContext[Any, Any]


class KvNodeService(kvnode_pb2_grpc.KvNodeServicer):
    """kvasir.v1.KvNode."""

    def __init__(self, store: NodeStore) -> None:
        self._store = store

    async def Describe(
        self, request: kvnode_pb2.DescribeKvNodeRequest, context: Context
    ) -> kvnode_pb2.KvNodeDescription:
        """What this node is and holds."""
        return self._store.describe()

    async def Offer(
        self, request: kvnode_pb2.OfferRequest, context: Context
    ) -> kvnode_pb2.OfferResponse:
        """Pulls what is missing here from the source."""
        try:
            return await self._store.offer(request)
        except KvasirError as error:
            await abort(context, error)

    async def Locate(
        self, request: kvnode_pb2.LocateRequest, context: Context
    ) -> kvnode_pb2.LocateResponse:
        """Where the names' leading part is held."""
        try:
            runs = await self._store.locate(request.names)
        except KvasirError as error:
            await abort(context, error)
        return kvnode_pb2.LocateResponse(
            locations=[
                kvnode_pb2.BlockLocation(holder=run.holder, first=run.first, count=run.count)
                for run in runs
            ]
        )

    async def Load(
        self, request: kvnode_pb2.LoadRequest, context: Context
    ) -> kvnode_pb2.LoadResponse:
        """Brings blocks from slower tiers into memory."""
        try:
            num_leading = await self._store.load(request.names, timeout_ms=request.timeout_ms)
        except KvasirError as error:
            await abort(context, error)
        return kvnode_pb2.LoadResponse(num_leading=num_leading)

    async def WatchEvents(  # type: ignore[override]
        self, request: kvnode_pb2.WatchKvNodeRequest, context: Context
    ) -> None:
        """A snapshot or what was missed, then changes; ends if the watcher falls behind."""
        watch = self._store.hub.watch(
            load_interval_ms=request.load_interval_ms, after=request.after
        )
        try:
            async with aclosing(watch) as events:
                async for event in events:
                    await context.write(event)
        except KvasirError as error:
            await abort(context, error)
