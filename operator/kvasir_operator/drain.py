"""Drains workers over gRPC and knows how far each has come.

One task per pod, at most DRAINS_MAX at a time. A call that fails is made again until the drain's
deadline: a worker that cannot be reached may still serve. What is known here is lost with the
process; the mark on the pod is not, so a new operator takes the drain up again.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import grpc.aio
from kvasir_proto.v1 import worker_pb2, worker_pb2_grpc

from kvasir_operator import metrics
from kvasir_operator.channels import ChannelError, Channels, why
from kvasir_operator.core.manifests import WORKER_GRPC_PORT, Ref
from kvasir_operator.core.views import Door, DrainView, PodView

logger = logging.getLogger(__name__)

DRAINS_MAX = 256
RETRY_DELAY_S = 1.0
ANSWER_MARGIN_S = 5.0  # a worker answers a little after its own deadline
FORGET_AFTER_S = 600.0


@dataclass(slots=True)
class _Drain:
    pool: Ref
    view: DrainView
    task: asyncio.Task[None] | None = None
    ended_at_s: float | None = None


class Drainer:
    """The drains of this process. `on_progress` is told which pool to look at again."""

    def __init__(self, channels: Channels, *, on_progress: Callable[[Ref], None]) -> None:
        self._channels = channels
        self._on_progress = on_progress
        self._drains: dict[str, _Drain] = {}

    def views(self) -> Mapping[str, DrainView]:
        """How far each drain has come, by pod UID."""
        return MappingProxyType({uid: drain.view for uid, drain in self._drains.items()})

    def start(self, pool: Ref, pod: PodView, *, timeout_s: int) -> bool:
        """Begin to drain a pod; False: it runs already, or too many do."""
        self._forget_old()
        if pod.uid in self._drains or len(self._drains) >= DRAINS_MAX:
            return False
        drain = _Drain(pool=pool, view=DrainView())
        self._drains[pod.uid] = drain
        drain.task = asyncio.create_task(self._run(drain, pod, timeout_s), name=f"drain {pod.name}")
        return True

    async def close(self) -> None:
        """End all tasks; the workers go on draining."""
        tasks = [drain.task for drain in self._drains.values() if drain.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget_old(self) -> None:
        limit_s = time.monotonic() - FORGET_AFTER_S
        for uid, drain in list(self._drains.items()):
            if drain.ended_at_s is not None and drain.ended_at_s < limit_s:
                del self._drains[uid]

    async def _run(self, drain: _Drain, pod: PodView, timeout_s: int) -> None:
        deadline_s = time.monotonic() + timeout_s + ANSWER_MARGIN_S
        door = Door(f"{pod.ip}:{WORKER_GRPC_PORT}", drain.pool.namespace, pod.tls_secret)
        outcome = "timeout"
        while (left_s := deadline_s - time.monotonic()) > 0:
            try:
                await self._follow(drain, door, left_s, timeout_s)
                outcome = "drained"
                break
            except (grpc.aio.AioRpcError, ChannelError) as error:
                logger.info("drain of %s: %s", pod.name, why(error))
                await asyncio.sleep(min(RETRY_DELAY_S, left_s))
        logger.info("drain of %s ended: %s", pod.name, outcome)
        metrics.DRAINS.labels(outcome).inc()
        drain.ended_at_s = time.monotonic()
        view = drain.view
        self._report(drain, DrainView(view.requests_left, view.blocks_left, is_over=True))

    async def _follow(self, drain: _Drain, door: Door, left_s: float, timeout_s: int) -> None:
        """One call; returns when the worker has said that it is drained."""
        async with self._channels.open(door) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            request = worker_pb2.DrainRequest(timeout_ms=timeout_s * 1000)
            async for progress in stub.Drain(request, timeout=left_s):
                self._report(drain, DrainView(progress.num_requests_left, progress.num_blocks_left))

    def _report(self, drain: _Drain, view: DrainView) -> None:
        if view != drain.view:
            drain.view = view
            self._on_progress(drain.pool)
