"""Three KV nodes as real processes: copies outlive a node, and a node that joins gets its share."""

import asyncio
import contextlib
import os
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import RedisServer
from kv_fleet import PROTO_LAYOUT, Holder, NodeProcess, describe, make_holder
from kvasir_kvstore.node.arena import Arena
from kvasir_kvstore.node.block_file import BlockFile
from kvstore_builders import eventually, free_port


def make_fleet(count: int, **settings: object) -> list[NodeProcess]:
    """Nodes that know one another, not started."""
    ports = [free_port() for _ in range(count)]
    specs = [f"127.0.0.1:{port}" for port in ports]
    return [
        NodeProcess(name=f"kv-{i}", grpc_port=port, kv_nodes=specs, **settings)
        for i, port in enumerate(ports)
    ]


async def start(nodes: list[NodeProcess]) -> None:
    for node in nodes:
        node.spawn()
    await asyncio.gather(*(asyncio.to_thread(node.wait_ready) for node in nodes))


def publish_chains(worker: Holder, count: int) -> list[list[bytes]]:
    chains = [[os.urandom(16) for _ in range(3)] for _ in range(count)]
    for chain in chains:
        worker.publish(chain)
    return chains


async def num_fetched(worker: Holder, chains: list[list[bytes]], source: Holder) -> int:
    """Blocks that another worker gets; each must be right."""
    count = 0
    for chain in chains:
        result = await worker.tier.locate_and_fetch(chain, [0, 1, 2], timeout_ms=20_000)
        for block, name in enumerate(chain[: result.num_fetched_leading]):
            assert np.array_equal(worker.pool.data[block], source.contents[name]), "a wrong block"
        count += result.num_fetched_leading
    return count


async def on_disk(node: NodeProcess) -> int:
    return sum(tier.blocks_written for tier in (await describe(node)).tiers)


async def used(nodes: list[NodeProcess]) -> int:
    return sum([(await describe(node)).blocks_used for node in nodes])


@pytest.mark.parametrize("has_redis", [False, True], ids=["asked", "redis"])
async def test_with_two_copies_reads_go_on_when_a_node_is_killed(
    shared_redis: RedisServer, has_redis: bool
) -> None:
    url = shared_redis.url if has_redis else None
    nodes = make_fleet(3, kv_replicas=2, redis=url)
    specs = [node.spec for node in nodes]
    async with contextlib.AsyncExitStack() as stack:
        for node in nodes:
            stack.callback(node.close)
        await start(nodes)
        a = await stack.enter_async_context(make_holder(specs, replicas=2))
        b = await stack.enter_async_context(make_holder(specs, redis_url=url))
        chains = publish_chains(a, 12)
        for chain in chains:
            await a.offer(chain)
        assert await used(nodes) == 2 * 36
        nodes[0].kill()
        assert await num_fetched(b, chains, a) == 36
        # What had a copy there gets another, in the background.
        await eventually(lambda: used(nodes[1:]), lambda count: count == 2 * 36, timeout_s=60)


async def test_blocks_on_disk_move_too_and_keep_their_age(tmp_path: Path) -> None:
    nodes = make_fleet(2, move_mb_per_s=1000, kv_replicas=2, memory_mb=1, block_ttl_ms=3_600_000)
    for node in nodes:
        node.settings = node.settings.model_copy(update={"disk_dir": tmp_path / node.settings.name})
    # Holds all in memory until it is written, however slow the disk.
    nodes[1].settings = nodes[1].settings.model_copy(update={"memory_mb": 4})
    async with contextlib.AsyncExitStack() as stack:
        for node in nodes:
            stack.callback(node.close)
        await start(nodes[:1])
        specs = [node.spec for node in nodes]
        a = await stack.enter_async_context(make_holder(specs, num_blocks=150))
        chains = publish_chains(a, 40)  # more than memory holds
        for count, chain in enumerate(chains, start=1):
            await a.offer(chain)
            await eventually(lambda: on_disk(nodes[0]), lambda n, c=3 * count: n >= c, 30)
        await start(nodes[1:])
        told_ms = time.time_ns() // 1_000_000  # ages lose the time of the offer
        await eventually(lambda: on_disk(nodes[1]), lambda count: count == 120, timeout_s=60)
        nodes[1].kill()
        disk = BlockFile(tmp_path / nodes[1].settings.name)
        moved = disk.begin(
            PROTO_LAYOUT, num_slots=Arena.disk_slots(nodes[1].settings, PROTO_LAYOUT)
        )
        disk.close()
        assert {block.name for block in moved} == {name for chain in chains for name in chain}
        assert all(block.stored_ms < told_ms for block in moved)


async def test_a_node_that_joins_gets_its_share_and_no_more() -> None:
    nodes = make_fleet(3, move_mb_per_s=1000)
    specs = [node.spec for node in nodes]
    async with contextlib.AsyncExitStack() as stack:
        for node in nodes:
            stack.callback(node.close)
        await start(nodes[:2])
        a = await stack.enter_async_context(make_holder(specs, num_blocks=150))
        chains = publish_chains(a, 48)
        for chain in chains:
            await a.offer(chain)
        assert await used(nodes[:2]) == 144
        await start(nodes[2:])
        joined = await eventually(
            lambda: describe(nodes[2]), lambda found: found.blocks_used > 0, timeout_s=60
        )
        assert joined.blocks_used % 3 == 0
        moved = [node.metric("kvasir_kvnode_blocks_moved_total") for node in nodes[:2]]
        assert sum(moved) < 2 / 3 * 144
        b = await stack.enter_async_context(make_holder(specs))
        assert await num_fetched(b, chains, a) == 144
