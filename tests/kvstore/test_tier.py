"""A worker's side of the KV tier when nodes are away, slow or wrong: misses, never errors."""

import asyncio
import os
import socket
import time

import grpc.aio
import pytest
from conftest import RedisServer
from kv_fleet import PROTO_LAYOUT, make_holder
from kvasir_kvstore.client import KvTier
from kvasir_kvstore.index import RedisIndex
from kvasir_kvstore.nodes import NodeSet
from kvasir_kvstore.peers import PeerSpec, parse_spec
from kvasir_proto.errors import KvasirError
from kvasir_proto.v1 import common_pb2, kvnode_pb2, kvnode_pb2_grpc
from kvstore_builders import free_port, make_pool
from prometheus_client import CollectorRegistry


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("kv:7000", PeerSpec("kv", 7000, False)),
        ("dns:kv.ns.svc:7000", PeerSpec("kv.ns.svc", 7000, True)),
        ("[::1]:7000", PeerSpec("::1", 7000, False)),
    ],
    ids=["host", "dns", "ipv6"],
)
def test_specs(text: str, spec: PeerSpec) -> None:
    assert parse_spec(text) == spec


@pytest.mark.parametrize("text", ["kv", ":7000", "kv:", "kv:x", "kv:0", "kv:70000", "dns:kv"])
def test_a_malformed_spec_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="neither HOST:PORT"):
        parse_spec(text)


async def test_with_no_node_up_fetches_miss_and_offers_are_counted() -> None:
    names = [os.urandom(16)]
    registry = CollectorRegistry()
    tier = KvTier(make_pool(), nodes=[f"127.0.0.1:{free_port()}"], registry=registry)
    await tier.start()
    assert not tier.healthy
    assert "127.0.0.1" in tier.problem
    result = await tier.locate_and_fetch(names, [0], timeout_ms=2000)
    assert (result.num_fetched_leading, result.problem) == (0, "unreachable")
    await tier.offer(names, common_pb2.PeerAddress(), PROTO_LAYOUT)
    assert await tier.flush(timeout_ms=5000)
    assert registry.get_sample_value("kvasir_kvtier_offers_total", {"reason": "no_node"}) == 1
    await tier.close()


async def test_a_node_that_says_nothing_costs_one_bounded_wait() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        tier = KvTier(make_pool(), nodes=[f"127.0.0.1:{mute.getsockname()[1]}"])
        await tier.start()
        start = time.monotonic()
        for _ in range(20):
            result = await tier.locate_and_fetch([os.urandom(16)], [0], timeout_ms=2000)
            assert result.num_fetched_leading == 0
        assert time.monotonic() - start < 8
        await tier.close()


async def test_a_name_that_does_not_resolve_is_a_problem() -> None:
    tier = KvTier(make_pool(), nodes=["dns:no-such-host.invalid:7000"])
    await tier.start()
    assert not tier.healthy
    assert "no-such-host.invalid" in tier.problem
    assert (await tier.locate_and_fetch([os.urandom(16)], [0], timeout_ms=500)).problem
    await tier.close()


async def test_offers_beyond_the_bound_are_dropped_and_counted() -> None:
    registry = CollectorRegistry()
    tier = KvTier(
        make_pool(),
        nodes=[f"127.0.0.1:{free_port()}"],
        registry=registry,
        offer_names_waiting_max=10,
    )
    for _ in range(4):  # not started: nothing is taken off the queue
        names = [os.urandom(16) for _ in range(4)]
        await tier.offer(names, common_pb2.PeerAddress(), PROTO_LAYOUT)
    assert tier.num_offers_pending == 8
    assert registry.get_sample_value("kvasir_kvtier_offers_total", {"reason": "dropped"}) == 2
    assert not await tier.flush(timeout_ms=20)
    await tier.close()


async def test_a_cancelled_fetch_returns_only_after_its_last_write(
    shared_redis: RedisServer,
) -> None:
    """The holder named by the index accepts and then says nothing; the request is given up."""
    names = [os.urandom(16) for _ in range(2)]
    with socket.create_server(("127.0.0.1", 0)) as mute:
        holder = common_pb2.PeerAddress(
            uid=bytes(16), epoch=1, host="127.0.0.1", data_port=mute.getsockname()[1]
        )
        index = RedisIndex(shared_redis.url, timeout_ms=5000)
        await index.announce(names, holder)
        async with make_holder(["127.0.0.1:1"], redis_url=shared_redis.url) as worker:
            fetch = asyncio.create_task(
                worker.tier.locate_and_fetch(names, [0, 1], timeout_ms=60_000)
            )
            connection = (await asyncio.to_thread(mute.accept))[0]
            fetch.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fetch
            with connection:  # the worker's end is closed: nobody can write to the blocks
                connection.settimeout(5)
                while await asyncio.to_thread(connection.recv, 4096):
                    pass
            assert list(worker.pool.ready[:2]) == [0, 0]
        await index.close()


async def test_a_dead_holder_is_a_miss_and_says_why(shared_redis: RedisServer) -> None:
    names = [os.urandom(16)]
    index = RedisIndex(shared_redis.url, timeout_ms=5000)
    holder = common_pb2.PeerAddress(uid=bytes(16), epoch=1, host="127.0.0.1", data_port=free_port())
    await index.announce(names, holder)
    async with make_holder(["127.0.0.1:1"], redis_url=shared_redis.url) as worker:
        result = await worker.tier.locate_and_fetch(names, [0], timeout_ms=2000)
        assert (result.num_fetched_leading, result.problem) == (0, "unreachable")
    await index.close()


async def test_a_node_that_is_given_up_while_it_is_asked_is_an_error_not_a_cancellation() -> None:
    server, node = grpc.aio.server(), _Busy()
    kvnode_pb2_grpc.add_KvNodeServicer_to_server(node, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    target = f"127.0.0.1:{port}"
    nodes = NodeSet([target])
    await nodes.start()
    asking = asyncio.create_task(nodes.load(target, [os.urandom(16)], timeout_ms=60_000))
    async with asyncio.timeout(30):
        await node.is_asked.wait()
        await nodes.close()
        with pytest.raises(KvasirError, match="is gone"):
            await asking
    await server.stop(0)


class _Busy(kvnode_pb2_grpc.KvNodeServicer):
    """A KV node that never comes to load blocks."""

    def __init__(self) -> None:
        self.is_asked = asyncio.Event()

    async def Load(
        self, request: kvnode_pb2.LoadRequest, context: object
    ) -> kvnode_pb2.LoadResponse:
        self.is_asked.set()
        await asyncio.Event().wait()
        raise AssertionError


async def test_a_holder_that_does_not_come_to_load_blocks_costs_no_more_than_it_may(
    shared_redis: RedisServer,
) -> None:
    """What it had in memory counts, and the index still says that it has the rest."""
    names = [os.urandom(16) for _ in range(4)]
    asked: list[float] = []

    def goes_on(num_arrived: float) -> bool:
        asked.append(num_arrived)
        return asked.count(2) < 10

    server = grpc.aio.server()
    kvnode_pb2_grpc.add_KvNodeServicer_to_server(_Busy(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    index = RedisIndex(shared_redis.url, timeout_ms=5000)
    async with (
        make_holder([]) as holder,
        make_holder([f"127.0.0.1:{port}"], redis_url=shared_redis.url) as worker,
    ):
        holder.publish(names[:2])
        holder.address.grpc_port = port
        await index.announce(names, holder.address)
        async with asyncio.timeout(60):
            result = await worker.tier.locate_and_fetch(
                names, range(4), timeout_ms=600_000, goes_on=goes_on
            )
        assert (result.num_fetched_leading, result.problem) == (2, "slow")
        assert [(run.first, run.count) for run in await index.locate(names)] == [(0, 4)]
    await index.close()
    await server.stop(0)


async def test_closing_ends_a_running_fetch(shared_redis: RedisServer) -> None:
    names = [os.urandom(16)]
    with socket.create_server(("127.0.0.1", 0)) as mute:
        index = RedisIndex(shared_redis.url, timeout_ms=5000)
        holder = common_pb2.PeerAddress(
            uid=bytes(16), epoch=1, host="127.0.0.1", data_port=mute.getsockname()[1]
        )
        await index.announce(names, holder)
        async with make_holder(["127.0.0.1:1"], redis_url=shared_redis.url) as worker:
            fetch = asyncio.create_task(worker.tier.locate_and_fetch(names, [0], timeout_ms=60_000))
            connection = (await asyncio.to_thread(mute.accept))[0]
            await worker.tier.close()
            assert (await fetch).problem == "cancelled"
            connection.close()
        await index.close()
