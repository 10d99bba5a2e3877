"""kvasir.v1.RouterPeer: this replica's extended keys, for the others to read."""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc.aio
from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.rpc_errors import abort
from kvasir_proto.v1 import peering_pb2, peering_pb2_grpc

from kvasir_router.core.keys import KeyTree
from kvasir_router.peering.wire import to_messages

WATCHERS_MAX = 256
LOOK_S = 0.2
"""How soon a change is told: many in a row are told as one."""
LOOKS_PER_SIGN = 5
"""A sign of life after so many looks without a change."""


class RouterPeerService(peering_pb2_grpc.RouterPeerServicer):
    """Streams of this replica's records."""

    def __init__(self, keys: KeyTree, *, replica: bytes, endpoint: Callable[[], str]) -> None:
        self._keys, self._replica, self._endpoint = keys, replica, endpoint
        self._num_watchers = 0

    async def WatchKeys(  # type: ignore[override]
        self, request: peering_pb2.WatchKeysRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> None:
        """All records, then all again on change."""
        if self._num_watchers >= WATCHERS_MAX:
            await abort(context, KvasirError(Reason.OVERLOADED, "too many peers are watching"))
        self._num_watchers += 1
        try:
            await self._tell(context)
        finally:
            self._num_watchers -= 1

    async def _tell(self, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        told: int | None = None
        while True:
            version = self._keys.shared_version
            news = peering_pb2.KeyRecords(replica=self._replica, endpoint=self._endpoint())
            if version != told:
                news.records.extend(to_messages(self._keys.shared()))
                told = version
            await context.write(news)
            for _ in range(LOOKS_PER_SIGN):
                await asyncio.sleep(LOOK_S)
                if self._keys.shared_version != told:
                    break
