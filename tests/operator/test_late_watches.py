"""Kinds of gateways are watched once they are served and asked for, and missed by nobody before."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

from kvasir_operator.cache import CachedCluster
from kvasir_operator.cluster import KubeCluster
from kvasir_operator.core.manifests import (
    API_OF_GATEWAY_KIND,
    MANAGED_BY,
    SERVICE_LABEL,
    Manifest,
    Ref,
)
from kvasir_operator.errors import ClusterError
from kvasir_operator.watch import OPENED, Event

POOL = Ref("InferencePool", "ns", "chat")


def make_pool(version: int) -> Manifest:
    labels = {**MANAGED_BY, SERVICE_LABEL: "chat"}
    metadata = {"name": "chat", "namespace": "ns", "uid": "u", "labels": labels}
    return {"kind": "InferencePool", "metadata": {**metadata, "resourceVersion": str(version)}}


class Server:
    """An API server without gateways' kinds at first; one pool, once they are there."""

    def __init__(self) -> None:
        self.served = False
        self.is_changed = asyncio.Event()
        self.watched: list[str] = []
        self.fetched: list[Ref] = []

    async def is_served(self, kind: str) -> bool:
        return self.served

    async def get(self, ref: Ref) -> Manifest | None:
        self.fetched.append(ref)
        return make_pool(5) if self.served else None

    async def pages(
        self, kind: str, namespace: str, **query: Any
    ) -> AsyncIterator[tuple[list[Manifest], int]]:
        if kind in API_OF_GATEWAY_KIND and not self.served:
            raise ClusterError(404, "NotFound", "the server could not find the requested resource")
        yield [make_pool(5)] if kind == POOL.kind else [], 5

    async def watch(self, kind: str, namespace: str, **query: Any) -> AsyncIterator[Event]:
        self.watched.append(kind)
        yield OPENED
        if kind == POOL.kind:
            await self.is_changed.wait()
            yield Event("MODIFIED", make_pool(9) | {"spec": {"targetPorts": []}})
        await asyncio.Event().wait()


async def test_a_kind_is_watched_from_when_it_is_served_and_asked_for() -> None:
    server, news = Server(), asyncio.Queue[Ref]()
    cluster = CachedCluster(cast(KubeCluster, server), namespaces=(), on_news=news.put_nowait)
    running = asyncio.create_task(cluster.run())
    try:
        async with asyncio.timeout(30):
            await cluster.wait_until_synced()
            assert not await cluster.is_served(POOL.kind)
            assert await cluster.get(POOL) is None
            assert server.fetched == [POOL], "no cache could have said so"
            server.served = True
            assert await cluster.is_served(POOL.kind)
            assert await cluster.is_served(POOL.kind), "one watch, however often it is asked"
            assert await news.get() == Ref("ModelService", "ns", "chat")
            assert (await cluster.get(POOL) or {})["metadata"]["resourceVersion"] == "5"
            assert server.fetched == [POOL], "the cache knows"
            server.is_changed.set()
            assert await news.get() == Ref("ModelService", "ns", "chat")
            assert (await cluster.get(POOL) or {})["spec"] == {"targetPorts": []}
        assert server.watched.count(POOL.kind) == 1
        assert POOL.kind not in cluster.lags_s(), "a cluster may lose the kind again"
    finally:
        running.cancel()
