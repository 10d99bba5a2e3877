"""A KV node with a disk, as a real process: killed, torn, full, under another layout."""

import json
import os
import resource
from pathlib import Path

import numpy as np
from kv_fleet import LAYOUT, PROTO_LAYOUT, NodeProcess, describe, make_holder, running_node
from kvasir_proto.v1 import common_pb2, kvnode_pb2
from kvstore_builders import eventually

BLOCKS_OF_ONE_MIB = (1 << 20) // LAYOUT.block_bytes


def make_names(count: int) -> list[bytes]:
    return [os.urandom(16) for _ in range(count)]


async def disk_of(node: NodeProcess) -> kvnode_pb2.TierDescription:
    (tier,) = (await describe(node)).tiers
    return tier


async def written(node: NodeProcess, count: int) -> None:
    await eventually(lambda: disk_of(node), lambda tier: tier.blocks_written >= count, 30)


async def fetch(node: NodeProcess, names: list[bytes], contents: dict[bytes, np.ndarray]) -> int:
    """Fetches into a fresh worker: how many came; every one must be right."""
    async with make_holder([node.spec], num_blocks=max(len(names), 1)) as worker:
        blocks = list(range(len(names)))
        result = await worker.tier.locate_and_fetch(names, blocks, timeout_ms=20_000)
        for block, name in zip(blocks[: result.num_fetched_leading], names, strict=False):
            assert np.array_equal(worker.pool.data[block], contents[name]), "a wrong block"
        return result.num_fetched_leading


async def test_a_killed_node_restarts_with_what_was_whole(tmp_path: Path) -> None:
    names = make_names(6)
    with running_node(disk_dir=tmp_path) as node:
        async with make_holder([node.spec]) as worker:
            worker.publish(names)
            await worker.offer(names)
            await written(node, 6)
            node.kill()
            node.start()
            assert await fetch(node, names, worker.contents) == 6
            tier = await disk_of(node)
            assert (tier.blocks_used, tier.blocks_read, tier.blocks_bad) == (6, 6, 0)
            again = await describe(node)
            assert (again.blocks_used, again.layout) == (6, PROTO_LAYOUT)
            assert await fetch(node, names, worker.contents) == 6
            assert (await disk_of(node)).blocks_read == 6, "once read, they are in memory"


async def test_what_memory_gives_up_is_read_from_disk(tmp_path: Path) -> None:
    names = make_names(2 * BLOCKS_OF_ONE_MIB)
    with running_node(disk_dir=tmp_path, memory_mb=1, memory_high=1) as node:
        async with make_holder([node.spec], num_blocks=len(names)) as worker:
            worker.publish(names)
            for start in range(0, len(names), 32):
                await worker.offer(names[start : start + 32])
                await written(node, start + 32)
            description = await describe(node)
            assert description.blocks_used == BLOCKS_OF_ONE_MIB
            assert description.blocks_evicted == BLOCKS_OF_ONE_MIB
            for start in range(0, len(names), 64):
                part = names[start : start + 64]
                assert await fetch(node, part, worker.contents) == len(part)
            assert (await disk_of(node)).blocks_read >= BLOCKS_OF_ONE_MIB


async def test_memory_makes_room_in_the_background_and_what_it_gives_up_is_on_disk(
    tmp_path: Path,
) -> None:
    names = make_names(BLOCKS_OF_ONE_MIB)
    marks = {"memory_high": 0.75, "memory_low": 0.5}
    with running_node(disk_dir=tmp_path, memory_mb=1, **marks) as node:
        async with make_holder([node.spec], num_blocks=len(names)) as worker:
            worker.publish(names)
            for start in range(0, len(names), 8):
                await worker.offer(names[start : start + 8])
                await written(node, start + 8)
            description = await eventually(
                lambda: describe(node),
                lambda found: 0 < found.blocks_used <= 0.75 * BLOCKS_OF_ONE_MIB,
                30,
            )
            assert description.blocks_trimmed >= BLOCKS_OF_ONE_MIB // 4
            assert description.blocks_evicted == 0, "nothing had to wait for room"
            assert node.metric("kvasir_kvnode_blocks_trimmed_total") > 0
            for start in range(0, len(names), 8):
                assert await fetch(node, names[start : start + 8], worker.contents) == 8


async def test_a_killed_nodes_torn_files_hold_no_wrong_block(tmp_path: Path) -> None:
    names = make_names(4)
    with running_node(disk_dir=tmp_path) as node:
        async with make_holder([node.spec]) as worker:
            worker.publish(names)
            await worker.offer(names)
            await written(node, 4)
            node.kill()
            blocks = tmp_path / "blocks"
            content = bytearray(blocks.read_bytes())
            content[LAYOUT.block_bytes + 7] ^= 1
            blocks.write_bytes(content[: 3 * LAYOUT.block_bytes + 9])
            node.start()
            found = [await fetch(node, [name], worker.contents) for name in names]
            assert sorted(found) == [0, 0, 1, 1]
            tier = await disk_of(node)
            assert (tier.blocks_used, tier.blocks_bad) == (2, 2)
            await worker.offer(names)  # what was lost comes back
            assert [await fetch(node, [name], worker.contents) for name in names] == [1] * 4


async def test_a_full_disk_is_told_of_and_the_node_goes_on(tmp_path: Path) -> None:
    names = make_names(128)
    with running_node(disk_dir=tmp_path) as node:
        async with make_holder([node.spec], num_blocks=len(names)) as worker:
            assert node._process is not None
            size = 40 * LAYOUT.block_bytes
            resource.prlimit(node._process.pid, resource.RLIMIT_FSIZE, (size, size))
            worker.publish(names)
            for start in range(0, len(names), 16):
                await worker.offer(names[start : start + 16])
            tier = await eventually(
                lambda: disk_of(node), lambda tier: tier.blocks_dropped > 0, timeout_s=30
            )
            assert "File too large" in tier.problem
            assert 0 < tier.blocks_used <= 40
            status, body = node.get("/readyz")
            assert status == 200
            assert any("disk" in problem for problem in json.loads(body)["degraded"])
            assert await fetch(node, names[-16:], worker.contents) == 16
            node.kill()
            node.start()
            again = await disk_of(node)
            assert again.blocks_used > 0
            assert again.problem == ""
            await fetch(node, names, worker.contents)


async def test_a_disk_that_is_not_there_is_told_of_and_the_node_serves(tmp_path: Path) -> None:
    (tmp_path / "lost").write_text("no folder")
    names = make_names(2)
    with running_node(disk_dir=tmp_path / "lost" / "kv") as node:
        async with make_holder([node.spec]) as worker:
            worker.publish(names)
            await worker.offer(names)
            assert await fetch(node, names, worker.contents) == 2
        status, body = node.get("/readyz")
        assert status == 200
        assert json.loads(body)["degraded"] == ["disk: Not a directory"]
        assert (await describe(node)).degraded == ["disk: Not a directory"]


async def test_another_layout_takes_the_place_of_what_nobody_offers_any_more(
    tmp_path: Path,
) -> None:
    names = make_names(2)
    with running_node(disk_dir=tmp_path) as node:
        async with make_holder([node.spec]) as worker:
            worker.publish(names)
            await worker.offer(names)
            await written(node, 2)
            node.kill()
            node.start()
            other = common_pb2.KvLayout()
            other.CopyFrom(PROTO_LAYOUT)
            other.digest = b"o" * 16
            await worker.tier.offer(names, worker.address, other)
            assert await worker.tier.flush(timeout_ms=20_000)
        description = await describe(node)
        assert description.layout == other
        assert description.blocks_used == description.tiers[0].blocks_used == 0


async def test_blocks_whose_time_is_over_are_served_by_no_tier(tmp_path: Path) -> None:
    names = make_names(3)
    with running_node(disk_dir=tmp_path, block_ttl_ms=1500) as node:
        async with make_holder([node.spec]) as worker:
            worker.publish(names)
            await worker.offer(names)
            await written(node, 3)
            description = await eventually(
                lambda: describe(node), lambda found: found.blocks_used == 0, timeout_s=30
            )
            assert description.blocks_expired == 3
            assert description.tiers[0].blocks_used == 0
            assert await fetch(node, names, worker.contents) == 0
            node.kill()
            node.start()
            assert await fetch(node, names, worker.contents) == 0


async def test_a_tenant_does_not_take_more_than_its_share() -> None:
    quota = BLOCKS_OF_ONE_MIB // 4
    names = make_names(BLOCKS_OF_ONE_MIB)
    with running_node(memory_mb=1, tenant_share_max=0.25) as node:
        async with make_holder([node.spec], num_blocks=2 * len(names)) as worker:
            worker.publish(names)
            mine = make_names(4)
            worker.publish(mine)
            await worker.tier.offer(mine, worker.address, PROTO_LAYOUT, tenant=b"a" * 16)
            await worker.tier.offer(names, worker.address, PROTO_LAYOUT, tenant=b"b" * 16)
            assert await worker.tier.flush(timeout_ms=20_000)
            assert (await describe(node)).blocks_used == quota + 4
            assert await fetch(node, mine, worker.contents) == 4


async def test_a_second_node_on_the_same_folder_does_not_start(tmp_path: Path) -> None:
    with running_node(disk_dir=tmp_path):
        second = NodeProcess(disk_dir=tmp_path)
        second.spawn()
        assert second.wait() != 0
        assert "another process" in second.log()
        second.close()
