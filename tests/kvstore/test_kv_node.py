"""A KV node as a real process: offers, fetches, restarts, eviction, Redis, signals."""

import contextlib
import json
import os
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from conftest import RedisServer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from kv_fleet import (
    LAYOUT,
    PROTO_LAYOUT,
    NodeProcess,
    describe,
    make_holder,
    node_stub,
    running_node,
)
from kvasir_kvstore.index import RedisIndex
from kvasir_kvstore.node.settings import KvNodeSettings
from kvasir_proto.errors import Reason
from kvasir_proto.rpc_errors import error_from_rpc
from kvasir_proto.v1 import common_pb2, kvnode_pb2
from kvstore_builders import eventually
from pydantic import ValidationError


def make_names(count: int) -> list[bytes]:
    return [os.urandom(16) for _ in range(count)]


@pytest.fixture(scope="module")
def shared_node() -> Iterator[NodeProcess]:
    """For tests that do not mind one another's blocks."""
    with running_node(memory_mb=16) as node:
        yield node


async def test_what_one_worker_offers_another_fetches() -> None:
    names = make_names(6)
    with running_node() as node:
        async with make_holder([node.spec]) as a, make_holder([node.spec]) as b:
            a.publish(names)
            await a.offer(names)
            result = await b.tier.locate_and_fetch(names, [9, 3, 5, 7, 1, 0], timeout_ms=10_000)
            assert (result.num_fetched_leading, result.problem) == (6, "")
            assert result.bytes_moved == 6 * LAYOUT.block_bytes
            for name, block in zip(names, [9, 3, 5, 7, 1, 0], strict=True):
                assert np.array_equal(b.pool.data[block], a.contents[name])
                assert b.pool.ready[block] == LAYOUT.num_layers
        description = await describe(node)
        assert description.blocks_used == description.blocks_pulled == 6
        assert description.layout == PROTO_LAYOUT
        assert description.index == "memory"
        assert node.metric("kvasir_kvnode_blocks_served_total") == 6
        assert node.metric("kvasir_kvnode_blocks_used") == 6


async def test_blocks_outlive_the_worker_that_computed_them(shared_node: NodeProcess) -> None:
    names = make_names(3)
    async with make_holder([shared_node.spec]) as a:
        a.publish(names)
        contents = a.contents
        await a.offer(names)
    async with make_holder([shared_node.spec]) as b:
        result = await b.tier.locate_and_fetch(names, [0, 1, 2], timeout_ms=10_000)
        assert result.num_fetched_leading == 3
        assert np.array_equal(b.pool.data[2], contents[names[2]])


async def test_only_the_leading_part_that_is_held_is_fetched(shared_node: NodeProcess) -> None:
    names = make_names(5)
    async with make_holder([shared_node.spec]) as a, make_holder([shared_node.spec]) as b:
        a.publish([*names[:2], *names[3:]])
        await a.offer(names)
        result = await b.tier.locate_and_fetch(names, [0, 1, 2, 3, 4], timeout_ms=10_000)
        assert (result.num_fetched_leading, result.problem) == (2, "")
        assert list(b.pool.ready[:5]) == [4, 4, 0, 0, 0]
        nothing = await b.tier.locate_and_fetch(make_names(2), [5, 6], timeout_ms=10_000)
        assert (nothing.num_fetched_leading, nothing.problem) == (0, "")


async def test_an_offer_of_what_is_there_moves_nothing(shared_node: NodeProcess) -> None:
    names = make_names(4)
    async with make_holder([shared_node.spec]) as a, node_stub(shared_node) as stub:
        a.publish(names)
        request = kvnode_pb2.OfferRequest(
            source=a.address, layout=PROTO_LAYOUT, names=names, timeout_ms=5000
        )
        first = await stub.Offer(request, timeout=10)
        again = await stub.Offer(request, timeout=10)
        assert (first.num_pulled, first.num_held, first.num_missed) == (4, 0, 0)
        assert (again.num_pulled, again.num_held, again.num_missed) == (0, 4, 0)
        assert a.server.stats()["blocks_sent"] == 4


async def test_the_least_recently_used_blocks_make_room() -> None:
    num_slots = (1 << 20) // LAYOUT.block_bytes
    names = make_names(num_slots + 4)
    with running_node(memory_mb=1, memory_high=1) as node:
        async with make_holder([node.spec], num_blocks=num_slots + 4) as a:
            a.publish(names)
            await a.offer(names[:num_slots])
            await a.offer(names[num_slots:])
            description = await describe(node)
            assert description.blocks_total == description.blocks_used == num_slots
            assert description.blocks_evicted == 4
            async with make_holder([node.spec]) as b:
                new = await b.tier.locate_and_fetch(
                    names[num_slots:], [0, 1, 2, 3], timeout_ms=10_000
                )
                assert new.num_fetched_leading == 4
                assert np.array_equal(b.pool.data[3], a.contents[names[-1]])
                old = await b.tier.locate_and_fetch(
                    names[num_slots - 4 : num_slots], [4, 5, 6, 7], timeout_ms=10_000
                )
                assert old.num_fetched_leading == 0


async def test_a_restarted_nodes_old_address_is_refused_and_is_a_miss(
    shared_redis: RedisServer,
) -> None:
    names = make_names(3)
    url = shared_redis.url
    with running_node(redis=url, uid=None) as node:
        async with make_holder([node.spec], redis_url=url) as a:
            a.publish(names)
            await a.offer(names)
            before = (await describe(node)).address
            node.kill()
            node.start()
            after = (await describe(node)).address
            assert after.epoch > before.epoch
            await a.offer(make_names(1))  # the data plane serves from the first offer on
            async with make_holder([node.spec], redis_url=url) as b:
                result = await b.tier.locate_and_fetch(names, [0, 1, 2], timeout_ms=5_000)
                assert (result.num_fetched_leading, result.problem) == (0, "stale_peer")
                assert not b.pool.ready.any()
                result = await b.tier.locate_and_fetch(names, [0, 1, 2], timeout_ms=5_000)
                assert (result.num_fetched_leading, result.problem) == (0, "")
            assert node.metric("kvasir_kvnode_stale_refused_total") >= 1


async def test_workers_find_blocks_by_redis_in_one_look_up(shared_redis: RedisServer) -> None:
    names = make_names(4)
    url = shared_redis.url
    with running_node(redis=url) as node:
        async with (
            make_holder([node.spec], redis_url=url) as a,
            make_holder([node.spec], redis_url=url) as b,
        ):
            a.publish(names)
            await a.offer(names)
            result = await b.tier.locate_and_fetch(names, [0, 1, 2, 3], timeout_ms=10_000)
            assert result.num_fetched_leading == 4
        assert node.terminate() == 0
        index = RedisIndex(url, timeout_ms=5000)
        assert await index.locate(names) == [], "a node that stops withdraws its entries"
        await index.close()


@pytest.mark.parametrize(
    "change", [{"data_port": 70_000}, {"uid": b"short"}, {"host": ""}], ids=["port", "uid", "host"]
)
async def test_an_index_entry_that_cannot_be_pulled_from_is_a_miss(
    shared_redis: RedisServer, change: dict[str, object]
) -> None:
    names = make_names(2)
    fields = {"uid": bytes(16), "epoch": 1, "host": "127.0.0.1", "data_port": 1} | change
    index = RedisIndex(shared_redis.url, timeout_ms=5000)
    assert await index.announce(names, common_pb2.PeerAddress(**fields))  # type: ignore[arg-type]
    async with make_holder([], redis_url=shared_redis.url) as worker:
        result = await worker.tier.locate_and_fetch(names, [0, 1], timeout_ms=10_000)
    assert result.num_fetched_leading == 0
    await index.close()


async def test_redis_away_degrades_and_its_return_restores_the_entries(
    own_redis: RedisServer,
) -> None:
    names = make_names(3)
    own_redis.start()
    url = own_redis.url
    with running_node(redis=url, lease_ttl_ms=1500) as node:
        async with (
            make_holder([node.spec], redis_url=url) as a,
            make_holder([node.spec], redis_url=url) as b,
        ):
            a.publish(names)
            await a.offer(names)
            own_redis.stop()
            result = await b.tier.locate_and_fetch(names, [0, 1, 2], timeout_ms=5000)
            assert result.num_fetched_leading == 3, "nodes answer from what they hold"
            assert "Redis" in b.tier.problem
            assert b.tier.healthy

            async def degraded() -> list[str]:
                status, body = node.get("/readyz")
                assert status == 200
                answer: list[str] = json.loads(body)["degraded"]
                return answer

            await eventually(degraded, bool)
            own_redis.start()  # empty: nothing was saved
            await eventually(degraded, lambda problems: not problems)

            async def fetch() -> int:
                found = await b.tier.locate_and_fetch(names, [0, 1, 2], timeout_ms=5000)
                return found.num_fetched_leading

            assert await eventually(fetch, lambda count: count == 3) == 3


async def test_a_wiped_redis_degrades_and_is_filled_again_long_before_leases_end(
    own_redis: RedisServer,
) -> None:
    names = make_names(3)
    own_redis.start()
    url = own_redis.url
    with running_node(redis=url, lease_ttl_ms=3_600_000) as node:
        async with (
            make_holder([node.spec], redis_url=url) as a,
            make_holder([node.spec], redis_url=url) as b,
        ):
            a.publish(names)
            await a.offer(names)
            result = await b.tier.locate_and_fetch(names, [0, 1, 2], timeout_ms=5000)
            assert (result.num_fetched_leading, b.tier.problem) == (3, "")
            index = RedisIndex(url, timeout_ms=5000)
            await index._redis.flushall()
            result = await b.tier.locate_and_fetch(names, [3, 4, 5], timeout_ms=5000)
            assert result.num_fetched_leading == 3, "nodes answer from what they hold"
            assert "lost" in b.tier.problem
            found = await eventually(lambda: index.locate(names), bool, timeout_s=60)
            assert found[0].count == 3
            await index.close()


async def test_two_nodes_share_the_chains_and_both_are_asked() -> None:
    with running_node(name="kv-0") as one, running_node(name="kv-1") as two:
        specs = [one.spec, two.spec]
        async with make_holder(specs) as a, make_holder(specs) as b:
            chains = [make_names(2) for _ in range(16)]
            for chain in chains:
                a.publish(chain)
                await a.offer(chain)
            used = [(await describe(node)).blocks_used for node in (one, two)]
            assert sum(used) == 32
            assert min(used) > 0
            for chain in chains:
                tail = await b.tier.locate_and_fetch(chain[1:], [0], timeout_ms=5000)
                assert tail.num_fetched_leading == 1
            one.kill()
            found = 0
            for chain in chains:
                result = await b.tier.locate_and_fetch(chain, [0, 1], timeout_ms=5000)
                found += result.num_fetched_leading
            assert found == used[1]
            assert b.tier.healthy
            assert one.spec in b.tier.problem


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"names": [b"short"]}, Reason.INVALID_REQUEST),
        ({"names": [bytes(16)] * 8193}, Reason.TOO_LARGE),
        ({"source": common_pb2.PeerAddress(host="127.0.0.1")}, Reason.INVALID_REQUEST),
        (
            {"source": common_pb2.PeerAddress(uid=bytes(16), host="127.0.0.1", data_port=70_000)},
            Reason.INVALID_REQUEST,
        ),
        (
            {"layout": common_pb2.KvLayout(digest=b"x" * 16, num_layers=4, block_bytes=4094)},
            Reason.INVALID_REQUEST,
        ),
        (
            {"layout": common_pb2.KvLayout(digest=b"x" * 16, num_layers=5000, block_bytes=5000)},
            Reason.INVALID_REQUEST,
        ),
        ({"layout": common_pb2.KvLayout()}, Reason.INVALID_REQUEST),
        (
            {"layout": common_pb2.KvLayout(digest=b"x" * 16, num_layers=1, block_bytes=1 << 30)},
            Reason.UNSUPPORTED,
        ),
    ],
    ids=["name", "names", "source", "port", "layout", "layers", "no layout", "block too large"],
)
async def test_a_malformed_offer_is_refused_with_its_reason(
    shared_node: NodeProcess, change: dict[str, object], reason: Reason
) -> None:
    fields: dict[str, object] = {
        "source": common_pb2.PeerAddress(
            uid=bytes(16), epoch=1, host="127.0.0.1", data_port=1, name="w"
        ),
        "layout": PROTO_LAYOUT,
        "names": make_names(1),
        "timeout_ms": 1000,
    }
    request = kvnode_pb2.OfferRequest(**(fields | change))  # type: ignore[arg-type]
    async with node_stub(shared_node) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Offer(request, timeout=5)
        assert error_from_rpc(caught.value).reason is reason


async def test_a_malformed_look_up_is_refused(shared_node: NodeProcess) -> None:
    async with node_stub(shared_node) as stub:
        with pytest.raises(grpc.aio.AioRpcError, match="16 bytes"):
            await stub.Locate(kvnode_pb2.LocateRequest(names=[b"short"]), timeout=5)


async def test_blocks_of_another_layout_are_refused(shared_node: NodeProcess) -> None:
    names = make_names(1)
    async with make_holder([shared_node.spec]) as a, node_stub(shared_node) as stub:
        a.publish(names)
        await a.offer(names)
        other = common_pb2.KvLayout(
            digest=b"y" * 16, num_layers=2, block_bytes=4096, block_tokens=32
        )
        request = kvnode_pb2.OfferRequest(
            source=a.address, layout=other, names=names, timeout_ms=1000
        )
        with pytest.raises(grpc.aio.AioRpcError, match="another layout"):
            await stub.Offer(request, timeout=5)


async def test_a_source_that_is_away_costs_nothing_but_the_offer(shared_node: NodeProcess) -> None:
    names = make_names(2)
    async with make_holder([shared_node.spec]) as a, node_stub(shared_node) as stub:
        a.publish(names)
        used = (await describe(shared_node)).blocks_used
        gone = common_pb2.PeerAddress()
        gone.CopyFrom(a.address)
        gone.epoch += 1
        response = await stub.Offer(
            kvnode_pb2.OfferRequest(source=gone, layout=PROTO_LAYOUT, names=names, timeout_ms=1000),
            timeout=5,
        )
        assert (response.num_pulled, response.num_missed) == (0, 2)
        assert a.server.stats()["stale_refused"] == 1
        await a.offer(names)
        assert (await describe(shared_node)).blocks_used == used + 2


async def test_health_reflection_and_a_clean_stop() -> None:
    with running_node() as node:
        assert node.get("/healthz")[0] == 200
        assert json.loads(node.get("/readyz")[1])["ready"] is True
        async with grpc.aio.insecure_channel(node.spec) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            answer = await check(
                health_pb2.HealthCheckRequest(service="kvasir.v1.KvNode"), timeout=5
            )
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            ask_for = reflection_pb2.ServerReflectionRequest(list_services="")
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            listed = stub.ServerReflectionInfo(iter([ask_for]), timeout=5)
            services = {s.name for s in (await listed.read()).list_services_response.service}
            assert "kvasir.v1.KvNode" in services
            listed.cancel()
        assert node.terminate() == 0
        assert "Traceback" not in node.log()


@pytest.mark.parametrize("field", ["grpc_port", "http_port", "data_port"])
def test_a_port_that_is_taken_ends_the_process_with_a_reason(
    shared_node: NodeProcess, field: str
) -> None:
    port = getattr(shared_node.settings, field)
    with contextlib.closing(NodeProcess(**{field: port})) as node:
        node.spawn()
        assert node.wait() != 0
        assert str(port) in node.log()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": ""}, "name"),
        ({"name": "a", "memory_mb": 0}, "memory_mb"),
        ({"name": "a", "grpc_port": 70000}, "grpc_port"),
        ({"name": "a", "host": "0.0.0.0"}, "advertise_host"),
        ({"name": "a", "redis": "http://x"}, "redis"),
        ({"name": "a", "grpc_port": 1, "data_port": 1}, "must differ"),
        ({"name": "a", "colour": "red"}, "colour"),
        ({"name": "a", "uid": b"short"}, "16 bytes"),
    ],
    ids=["name", "memory", "port", "advertise", "redis", "ports", "unknown", "uid"],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        KvNodeSettings.model_validate(settings)
