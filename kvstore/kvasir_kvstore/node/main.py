"""The process of a KV node: starts its servers, waits for SIGTERM or SIGINT, stops in order."""

import asyncio
import contextlib
import logging
import os
import signal
import time

import grpc.aio
from aiohttp import web
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from kvasir_proto.links import Links
from kvasir_proto.v1 import kvnode_pb2, kvnode_pb2_grpc

from kvasir_kvstore.index import make_index
from kvasir_kvstore.node.http import make_app
from kvasir_kvstore.node.service import KvNodeService
from kvasir_kvstore.node.settings import KvNodeSettings
from kvasir_kvstore.node.store import NodeStore
from kvasir_kvstore.nodes import NodeSet
from kvasir_kvstore.peers import join_target

log = logging.getLogger(__name__)

SERVICE = kvnode_pb2.DESCRIPTOR.services_by_name["KvNode"].full_name
MESSAGE_BYTES_MAX = 4 << 20
RPCS_MAX = 512


def run(settings: KvNodeSettings) -> None:
    """Runs a KV node until SIGTERM or SIGINT.

    Raises:
        OSError: a port is taken.
        KvasirError: UNSUPPORTED: the data plane's transport does not work here.
    """
    asyncio.run(_run(settings))


async def _run(settings: KvNodeSettings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # 1. What holds the blocks.
    links = Links(settings.tls_dir)
    index = make_index(settings.redis, ttl_ms=settings.lease_ttl_ms, links=links)
    epoch = time.time_ns() // 1_000_000
    store = NodeStore(settings, uid=settings.uid or os.urandom(16), epoch=epoch, index=index)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        # 2. What serves it.
        health_servicer = health.aio.HealthServicer()
        server = _make_server(store, health_servicer)
        target = join_target(settings.host, settings.grpc_port)
        store.address.grpc_port = links.listen(server, target)
        await server.start()
        stack.push_async_callback(server.stop, settings.stop_timeout_ms / 1000)
        store.address.http_port = await _start_http(store, settings, stack)
        await store.restore()
        tasks = [store.upkeep.start(store.keep_leases, name="keeping leases")]
        if settings.kv_nodes:
            nodes = NodeSet(settings.kv_nodes, links=links, asks_live=True)
            stack.push_async_callback(nodes.close)
            await nodes.start()
            tasks.append(store.upkeep.start(lambda: store.move(nodes), name="moving blocks"))
        stack.push_async_callback(_cancel, tasks)
        await _set_health(health_servicer, health_pb2.HealthCheckResponse.SERVING)
        log.info(
            "KV node %s at %s: grpc %d, http %d, data %d",
            settings.name,
            settings.peer_host,
            store.address.grpc_port,
            store.address.http_port,
            store.address.data_port,
        )
        # 3. Until told to stop.
        await stop.wait()
        log.info("KV node %s stops", settings.name)
        store.is_draining = True
        store.hub.close()
        await _set_health(health_servicer, health_pb2.HealthCheckResponse.NOT_SERVING)


def _make_server(store: NodeStore, health_servicer: health.aio.HealthServicer) -> grpc.aio.Server:
    server = grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.so_reuseport", 0),  # a port that is taken is an error
        ),
        maximum_concurrent_rpcs=RPCS_MAX,
    )
    kvnode_pb2_grpc.add_KvNodeServicer_to_server(KvNodeService(store), server)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return server


async def _start_http(
    store: NodeStore, settings: KvNodeSettings, stack: contextlib.AsyncExitStack
) -> int:
    runner = web.AppRunner(make_app(store), access_log=None, shutdown_timeout=1)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    site = web.TCPSite(runner, settings.host, settings.http_port)
    await site.start()
    port: int = runner.addresses[0][1]
    return port


async def _set_health(
    servicer: health.aio.HealthServicer, status: "health_pb2.HealthCheckResponse.ServingStatus"
) -> None:
    for service in ("", SERVICE):
        await servicer.set(service, status)


async def _cancel(tasks: "list[asyncio.Task[None]]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
