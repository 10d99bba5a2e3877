"""Reads the extended keys of the other replicas: dialled, followed, dialled again with backoff.

A replica that meets itself (its own address is among those behind the name of its Service) lets go
of that address until the addresses change.
"""

import asyncio
import logging
import random
from collections.abc import Sequence

import grpc
import grpc.aio
from kvasir_proto.links import Links
from kvasir_proto.v1 import peering_pb2, peering_pb2_grpc

from kvasir_router.core.keys import KeyTree
from kvasir_router.membership.discovery import follow_targets
from kvasir_router.membership.fleet import now_ms
from kvasir_router.peering.wire import from_messages

log = logging.getLogger(__name__)

SILENCE_S = 5.0
"""Signs of life come every second."""
BACKOFF_S_MIN = 0.2
BACKOFF_S_MAX = 5.0
NEWS_BYTES_MAX = 1 << 20
"""All records that a replica may hold, twice over."""


class Peers:
    """The other replicas."""

    def __init__(
        self, specs: Sequence[str], keys: KeyTree, links: Links, *, replica: bytes, interval_ms: int
    ) -> None:
        self._specs, self._keys, self._replica = specs, keys, replica
        self._links = links
        self._interval_ms = interval_ms
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._endpoints: dict[str, str] = {}  # of those whose keys are followed now
        self._group: asyncio.TaskGroup

    @property
    def num_connected(self) -> int:
        """Peers whose keys are followed now."""
        return len(self._endpoints)

    def endpoints(self) -> frozenset[str]:
        """Where their OpenAI APIs take new requests."""
        return frozenset(filter(None, self._endpoints.values()))

    async def run(self) -> None:
        """Follows all peers until cancelled."""
        async with asyncio.TaskGroup() as self._group:
            await follow_targets(
                self._specs, interval_ms=self._interval_ms, on_targets=self._set_targets
            )

    def _set_targets(self, wanted: frozenset[str]) -> None:
        for target in self._tasks.keys() - wanted:
            self._tasks.pop(target).cancel()
            self._endpoints.pop(target, None)
        for target in sorted(wanted - self._tasks.keys()):
            self._tasks[target] = self._group.create_task(self._keep(target), name=f"peer {target}")

    async def _keep(self, target: str) -> None:
        backoff_s = BACKOFF_S_MIN
        while True:
            try:
                if await self._follow(target):
                    log.info("the peer at %s is this router itself", target)
                    return
                error = "it ended its stream"
            except grpc.aio.AioRpcError as rpc_error:
                error = rpc_error.details() or rpc_error.code().name.lower()
            except TimeoutError:
                error = "no sign of life"
            was_connected = self._endpoints.pop(target, None) is not None
            if was_connected:
                log.warning("router peer %s is unreachable: %s", target, error)
            backoff_s = BACKOFF_S_MIN if was_connected else min(2 * backoff_s, BACKOFF_S_MAX)
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))

    async def _follow(self, target: str) -> bool:
        """One stream to its end; True: it is this router's own."""
        options = (
            ("grpc.max_receive_message_length", NEWS_BYTES_MAX),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
        )
        async with self._links.channel(target, options) as channel:
            call = peering_pb2_grpc.RouterPeerStub(channel).WatchKeys(
                peering_pb2.WatchKeysRequest()
            )
            while True:
                async with asyncio.timeout(SILENCE_S):
                    news = await call.read()
                if not isinstance(news, peering_pb2.KeyRecords):
                    return False
                if news.replica == self._replica:
                    return True
                self._endpoints[target] = news.endpoint
                if news.records:
                    self._keys.merge(from_messages(news.records), now_ms=now_ms())
