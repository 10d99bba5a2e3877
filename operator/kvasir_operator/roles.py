"""Tells workers their role over gRPC, one call per worker at a time.

What a worker was told is kept until routers have had time to hear of it from the worker; after
that they alone are believed, so that a worker which restarted in its first role is told again.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc.aio
from kvasir_proto.v1 import common_pb2, worker_pb2, worker_pb2_grpc

from kvasir_operator import metrics
from kvasir_operator.channels import ChannelError, Channels, why
from kvasir_operator.core.manifests import WORKER_GRPC_PORT, Ref
from kvasir_operator.core.views import Door, PodView

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 5.0
BELIEVED_S = 10.0
CALLS_MAX = 64
ROLES = {
    "prefill": common_pb2.ROLE_PREFILL,
    "decode": common_pb2.ROLE_DECODE,
}


@dataclass(slots=True)
class _Told:
    role: str
    until_s: float


class RoleSetter:
    """The changes of role of this process. `on_progress` is told which pool to look at again."""

    def __init__(self, channels: Channels, *, on_progress: Callable[[Ref], None]) -> None:
        self._channels = channels
        self._on_progress = on_progress
        self._told: dict[str, _Told] = {}
        self._calls: dict[str, asyncio.Task[None]] = {}

    def told(self) -> Mapping[str, str]:
        """Roles that workers have accepted lately, by pod UID."""
        now_s = time.monotonic()
        self._told = {uid: told for uid, told in self._told.items() if told.until_s > now_s}
        return {uid: told.role for uid, told in self._told.items()}

    def start(self, pool: Ref, pod: PodView, role: str) -> bool:
        """Tell a worker its role; False: it is being told already, or too many are."""
        if pod.uid in self._calls or len(self._calls) >= CALLS_MAX:
            return False
        call = asyncio.create_task(self._call(pool, pod, role), name=f"role of {pod.name}")
        self._calls[pod.uid] = call
        call.add_done_callback(lambda _: self._calls.pop(pod.uid, None))
        return True

    async def close(self) -> None:
        """End all calls."""
        calls = list(self._calls.values())
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    async def _call(self, pool: Ref, pod: PodView, role: str) -> None:
        door = Door(f"{pod.ip}:{WORKER_GRPC_PORT}", pool.namespace, pod.tls_secret)
        outcome = "failed"
        try:
            async with self._channels.open(door) as channel:
                request = worker_pb2.SetRoleRequest(role=ROLES[role])
                stub = worker_pb2_grpc.WorkerStub(channel)
                await stub.SetRole(request, timeout=CALL_TIMEOUT_S)
            self._told[pod.uid] = _Told(role, time.monotonic() + BELIEVED_S)
            outcome = "flipped"
            logger.info("%s serves as %s from now on", pod.name, role)
            self._on_progress(pool)
        except (grpc.aio.AioRpcError, ChannelError) as error:
            logger.info("role of %s: %s", pod.name, why(error))
        metrics.ROLE_FLIPS.labels(outcome).inc()
