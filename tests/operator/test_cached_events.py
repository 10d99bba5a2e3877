"""Warnings about the operator's objects are kept, however many there are about others."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from kvasir_operator.cache import CachedCluster
from kvasir_operator.cluster import KubeCluster
from kvasir_operator.core.manifests import MANAGED_BY, POOL_LABEL, ROLE_LABEL, Manifest
from kvasir_operator.watch import OPENED, WARNINGS_MAX, Event

LABELS = {**MANAGED_BY, POOL_LABEL: "chat", ROLE_LABEL: "decode"}
POD: Manifest = {
    "kind": "Pod",
    "metadata": {
        "name": "chat-0",
        "namespace": "ns",
        "uid": "ours",
        "resourceVersion": "1",
        "labels": LABELS,
    },
}


def make_warning(number: int, *, uid: str, message: str) -> Manifest:
    metadata = {"name": f"e-{number}", "namespace": "ns", "uid": f"e-{number}"}
    return {
        "kind": "Event",
        "metadata": {**metadata, "resourceVersion": str(10 + number)},
        "involvedObject": {"kind": "Pod", "namespace": "ns", "name": "chat-0", "uid": uid},
        "reason": "FailedMount",
        "message": message,
    }


class Busy:
    """An API server with one pod of ours, a warning about it, and a flood of others.

    The pod is listed late; half of the flood is there from the start, the rest comes by the watch.
    """

    def __init__(self) -> None:
        self.is_over = asyncio.Event()
        self._flood = [make_warning(n, uid=f"u-{n}", message="x") for n in range(3 * WARNINGS_MAX)]

    async def pages(
        self, kind: str, namespace: str, **query: Any
    ) -> AsyncIterator[tuple[list[Manifest], int]]:
        half = len(self._flood) // 2
        if kind == "Event":
            yield [make_warning(-1, uid="ours", message="no such volume"), *self._flood[:half]], 9
        else:
            for _ in range(10):
                await asyncio.sleep(0)
            yield [POD] if kind == "Pod" else [], 1

    async def watch(self, kind: str, namespace: str, **query: Any) -> AsyncIterator[Event]:
        yield OPENED
        if kind == "Event":
            for warning in self._flood[len(self._flood) // 2 :]:
                yield Event("ADDED", warning)
            self.is_over.set()
        await asyncio.Event().wait()


async def test_warning_about_our_pod_outlives_a_flood() -> None:
    busy = Busy()
    cluster = CachedCluster(cast(KubeCluster, busy), namespaces=(), on_news=lambda _: None)
    running = asyncio.create_task(cluster.run())
    async with asyncio.timeout(60):
        await busy.is_over.wait()
    assert await cluster.warning("ours", "ns") == "FailedMount: no such volume"
    assert cluster.sizes()["Event"] <= WARNINGS_MAX
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
