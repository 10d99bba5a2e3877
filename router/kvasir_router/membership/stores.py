"""The KV nodes as this router sees them: which blocks each holds, while its event stream lives.

Keeps `FleetView.stores` and the nodes' part of the prefix view. All of it only makes estimates
better: routing goes on without KV nodes, and one that is lost is forgotten until it is back.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc.aio
from kvasir_proto.links import Links
from kvasir_proto.v1 import kvnode_pb2, kvnode_pb2_grpc

from kvasir_router.core.fleet import FleetView
from kvasir_router.membership.discovery import follow_targets
from kvasir_router.membership.stream import LOAD_INTERVAL_MS, Followed


class Stores:
    """KV nodes by target."""

    def __init__(
        self,
        specs: Sequence[str],
        view: FleetView,
        *,
        links: Links,
        interval_ms: int,
        silence_timeout_ms: int,
    ) -> None:
        self._specs, self._view, self._links = specs, view, links
        self._interval_ms, self._silence_ms = interval_ms, silence_timeout_ms
        self._nodes: dict[str, Store] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup

    async def run(self) -> None:
        """Follows all KV nodes until cancelled."""
        async with asyncio.TaskGroup() as self._group:
            await follow_targets(
                self._specs, interval_ms=self._interval_ms, on_targets=self._set_targets
            )

    def degraded(self) -> list[str]:
        """KV nodes that are not followed now, and why."""
        nodes = sorted(self._nodes.items())
        return [f"KV node {t}: unreachable: {n.error}" for t, n in nodes if not n.reachable]

    def _set_targets(self, wanted: frozenset[str]) -> None:
        for target in self._nodes.keys() - wanted:
            self._tasks.pop(target).cancel()
            self.forget(self._nodes.pop(target))
        for target in sorted(wanted - self._nodes.keys()):
            node = Store(target, self, links=self._links, silence_timeout_ms=self._silence_ms)
            self._nodes[target] = node
            self._tasks[target] = self._group.create_task(node.run(), name=f"KV node {target}")

    def learn(self, node: "Store", event: kvnode_pb2.KvNodeEvent) -> None:
        """A node that is followed told what it holds, or what has changed."""
        prefix = self._view.prefix
        if event.snapshot:
            prefix.snapshot(node.holder, event.stored)
        else:
            prefix.removed(node.holder, event.removed)
            prefix.stored(node.holder, event.stored)
        if node.holder not in self._view.stores:
            self._view.stores = (*self._view.stores, node.holder)

    def lose(self, node: "Store") -> None:
        """A node cannot be reached: nothing is expected of it."""
        self._view.stores = tuple(s for s in self._view.stores if s != node.holder)

    def forget(self, node: "Store") -> None:
        """What a node holds is no longer known."""
        self.lose(node)
        self._view.prefix.forget(node.holder)


class Store(Followed[kvnode_pb2.KvNodeEvent]):
    """A KV node at one address."""

    kind = "KV node"
    event_type = kvnode_pb2.KvNodeEvent

    def __init__(
        self, target: str, stores: Stores, *, links: Links, silence_timeout_ms: int
    ) -> None:
        super().__init__(target, links=links, silence_timeout_ms=silence_timeout_ms)
        self._stores = stores

    @property
    def name(self) -> str:
        """Its address: that is what it was configured by."""
        return self.target

    @property
    def holder(self) -> str:
        """How the prefix view knows it: no worker has such a name."""
        return f"kv-node:{self.target}"

    def _watch(
        self, channel: grpc.aio.Channel, *, after: int
    ) -> "grpc.aio.UnaryStreamCall[Any, kvnode_pb2.KvNodeEvent]":
        return kvnode_pb2_grpc.KvNodeStub(channel).WatchEvents(
            kvnode_pb2.WatchKvNodeRequest(load_interval_ms=LOAD_INTERVAL_MS, after=after)
        )

    def _tell(self, event: kvnode_pb2.KvNodeEvent) -> None:
        self._stores.learn(self, event)

    def _lost(self) -> None:
        self._stores.lose(self)

    def _forget(self) -> None:
        self._stores.forget(self)
