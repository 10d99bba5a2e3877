"""One worker process: sockets first, then the model, then requests until a signal, then a drain.

Decides the order of start and stop. A port that is taken or a model that cannot be loaded ends the
process with an error; SIGTERM and SIGINT drain it and end it with status 0.
"""

import asyncio
import logging
import os
import secrets
import signal
import ssl
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc.aio
import uvloop
from aiohttp import web
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from kvasir_kvstore.peers import join_target
from kvasir_proto.v1 import worker_pb2, worker_pb2_grpc

from kvasir_engine.worker import canary, loading, remote
from kvasir_engine.worker.chunk_reuse import ChunkReuse
from kvasir_engine.worker.compute import Compute
from kvasir_engine.worker.crossing import Crossing
from kvasir_engine.worker.drain import Drain
from kvasir_engine.worker.generate import EngineGenerator, Generator
from kvasir_engine.worker.handoff import Handoff
from kvasir_engine.worker.host import Host
from kvasir_engine.worker.http import HttpApi, make_app
from kvasir_engine.worker.offers import Offers
from kvasir_engine.worker.peers import MESSAGE_BYTES_MAX
from kvasir_engine.worker.prefill import Prefiller
from kvasir_engine.worker.service import WorkerService
from kvasir_engine.worker.settings import WorkerSettings

log = logging.getLogger(__name__)

SERVICE_NAME = worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name
CONTROL_RPCS_MAX = 512
"""Calls beside requests: watchers, descriptions, health."""
HEALTH_S = 0.5
"""How often gRPC's health status follows readiness."""
STOP_GRACE_S = 2.0
"""After a drain: time for the last bytes to reach their readers."""
_GRPC_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a taken port is an error, not a second server
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
)


def run(settings: WorkerSettings) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        KvasirError, OSError, ValueError: it cannot start; the message says what is wrong.
    """
    uvloop.run(_serve_until_signal(settings))
    if loading.is_loading():  # asked to stop meanwhile: its threads would hold up the exit
        logging.shutdown()
        os._exit(0)


async def _serve_until_signal(settings: WorkerSettings) -> None:
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    async with worker(settings) as parts:
        waiting = asyncio.create_task(asked.wait())
        await asyncio.wait({waiting, parts.loaded}, return_when=asyncio.FIRST_COMPLETED)
        if parts.loaded.done():
            parts.loaded.result()  # raises what went wrong
            await waiting
        log.info("asked to stop: draining")
        async for _ in parts.drain.run(timeout_ms=settings.drain_timeout_ms):
            pass


class Parts:
    """The parts of one worker process."""

    def __init__(self, settings: WorkerSettings) -> None:
        uid = settings.uid or secrets.token_bytes(16)
        self.host = Host(settings, uid=uid, epoch=time.time_ns() // 1_000_000)
        self.offers = Offers(self.host)
        compute = Compute(self.host, ChunkReuse(self.host, self.offers))
        self.vllm = remote.VllmGenerator(self.host) if settings.vllm_url else None
        self.generator: Generator = self.vllm or EngineGenerator(
            self.host, compute, Handoff(self.host), self.offers
        )
        self.prefiller = Prefiller(self.host, compute, self.offers)
        self.drain = Drain(self.host, self.offers)
        self.crossing = Crossing(self.host)
        self.grpc_health = health.aio.HealthServicer()
        self.tasks: set[asyncio.Task[None]] = set()
        self.loaded: asyncio.Task[None]
        """Done when the worker can serve; fails if it never will."""

    def keep(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> None:
        """Runs a task as long as the worker; if it fails, the worker must be restarted."""

        async def supervised() -> None:
            try:
                await coroutine
            except Exception as error:
                log.exception("%s failed", name)
                self.host.state.failed = f"{name} failed: {error!r}"

        self.tasks.add(asyncio.create_task(supervised(), name=name))


@asynccontextmanager
async def worker(settings: WorkerSettings) -> AsyncIterator[Parts]:
    """A worker whose sockets are open; it serves once `Parts.loaded` is done.

    Raises:
        OSError: a port is taken.
    """
    parts = Parts(settings)
    # The engine outlives the servers: what they still run must be able to end.
    async with AsyncExitStack() as engine_stack, AsyncExitStack() as stack:
        await _start_http(parts, stack)
        await _start_grpc(parts, stack)
        stack.push_async_callback(parts.host.peers.close)
        parts.keep(_follow_readiness(parts), name="health")
        parts.loaded = asyncio.create_task(_load(parts, engine_stack), name="load")
        parts.tasks.add(parts.loaded)
        try:
            yield parts
        finally:
            for task in parts.tasks:
                task.cancel()
            await asyncio.gather(*parts.tasks, return_exceptions=True)
            parts.host.hub.close()


async def _start_http(parts: Parts, stack: AsyncExitStack) -> None:
    """One port for all, or two: what has no certificate may see health and metrics only."""
    host, api = parts.host, HttpApi(parts.host, parts.generator)
    port, tls = host.settings.http_port, host.links.server_context()
    if tls is None:
        host.address.http_port = await _listen(host, [*api.probes(), *api.streams()], port, stack)
        host.address.stream_port = host.address.http_port
        return
    host.address.http_port = await _listen(host, api.probes(), port, stack)
    port = host.settings.stream_port
    host.address.stream_port = await _listen(host, api.streams(), port, stack, tls=tls)


async def _listen(
    host: Host,
    routes: Sequence[web.RouteDef],
    port: int,
    stack: AsyncExitStack,
    *,
    tls: ssl.SSLContext | None = None,
) -> int:
    runner = web.AppRunner(
        make_app(routes),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=STOP_GRACE_S,
    )
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, host.settings.host, port, ssl_context=tls).start()
    bound: int = runner.addresses[0][1]
    return bound


async def _start_grpc(parts: Parts, stack: AsyncExitStack) -> None:
    host = parts.host
    server = grpc.aio.server(
        options=_GRPC_OPTIONS, maximum_concurrent_rpcs=host.settings.max_requests + CONTROL_RPCS_MAX
    )
    service = WorkerService(host, parts.generator, parts.prefiller, parts.drain, parts.crossing)
    worker_pb2_grpc.add_WorkerServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(parts.grpc_health, server)
    names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    target = join_target(host.settings.host, host.settings.grpc_port)
    host.address.grpc_port = host.links.listen(server, target)
    await server.start()
    stack.push_async_callback(server.stop, STOP_GRACE_S)


async def _load(parts: Parts, stack: AsyncExitStack) -> None:
    """Loads the model, starts what needs it, and opens the worker for requests."""
    host = parts.host
    if parts.vllm is not None:
        await stack.enter_async_context(remote.connected(host, parts.vllm))
        parts.keep(remote.watch(host, parts.vllm), name="vLLM checks")
        if host.settings.vllm_events:
            parts.keep(remote.follow_events(host, parts.vllm), name="vLLM events")
        return
    # 1. Model, KV memory, engine, data plane.
    serving = await stack.enter_async_context(loading.serving(host))
    host.serving = serving
    # 2. What runs beside requests.
    parts.keep(_follow_blocks(host), name="block events")
    # 3. Warm, and proven to be able to move KV.
    problem = await canary.check(host)
    if problem:
        log.error("KV data plane: %s", problem)
        host.health.broke(problem)
    parts.keep(canary.watch(host), name="transfer checks")
    host.state.loading = ""
    host.hub.description_changed()
    log.info(
        "%s serves %s as %s: grpc %d, http %d, data %d",
        host.settings.name,
        host.settings.model_name,
        host.state.role,
        host.address.grpc_port,
        host.address.http_port,
        host.address.data_port,
    )


async def _follow_blocks(host: Host) -> None:
    """Tells the hub what the engine's cache holds."""
    async for change in host.served().engine.block_events():
        host.hub.blocks_changed(stored=change.stored, removed=change.removed)
        host.admission.blocks_stored(change.stored)


async def _follow_readiness(parts: Parts) -> None:
    """Keeps gRPC's health status equal to readiness."""
    shown = None
    while True:
        problems = parts.host.problems()
        if problems != shown:
            shown = problems
            log.info("ready" if not problems else f"not ready: {'; '.join(problems)}")
            kind = health_pb2.HealthCheckResponse
            status = kind.NOT_SERVING if problems else kind.SERVING
            for name in ("", SERVICE_NAME):
                await parts.grpc_health.set(name, status)
        await asyncio.sleep(HEALTH_S)
