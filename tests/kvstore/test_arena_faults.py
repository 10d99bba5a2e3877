"""What a KV node's tiers leave when something goes wrong inside: nothing, and nobody waits."""

import os
from pathlib import Path

import pytest
from kv_fleet import LAYOUT, PROTO_LAYOUT, make_holder
from kvasir_kvstore.core.cache import BlockCache, Limits, Origin
from kvasir_kvstore.node.arena import Arena
from kvasir_kvstore.node.block_file import BlockFile
from kvasir_kvstore.node.disk import DiskTier
from kvasir_kvstore.node.settings import KvNodeSettings
from kvasir_kvstore.node.upkeep import Upkeep
from kvasir_proto.v1 import common_pb2
from kvstore_builders import eventually, fill, free_port, make_pool, random_uid

NAME = os.urandom(16)


def refuse(*_: object) -> None:
    raise RuntimeError("what nobody expected")


async def test_a_block_that_cannot_be_published_keeps_no_slot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arena = Arena(
        PROTO_LAYOUT,
        KvNodeSettings(name="n", host="127.0.0.1", memory_mb=1),
        common_pb2.PeerAddress(uid=random_uid(), epoch=1, data_port=free_port()),
        upkeep=Upkeep(lambda _: None),
        now_ms=lambda: 1,
        on_change=lambda *_: None,
    )
    async with make_holder([]) as source:
        source.publish([NAME])

        async def fill_one() -> tuple[bytes, ...]:
            filled = await arena.fill(
                source.address, [NAME], Origin(), stored_ms={}, timeout_ms=60_000
            )
            return filled.committed

        with monkeypatch.context() as broken:
            broken.setattr(arena, "_publish", refuse)
            with pytest.raises(RuntimeError, match="nobody expected"):
                await fill_one()
        assert arena.cache.num_reserved == 0
        assert await fill_one() == (NAME,)
    await arena.close(timeout_ms=0)


@pytest.mark.parametrize("num_failures", [0, 1])
async def test_a_disk_says_when_it_has_nothing_left_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_failures: int
) -> None:
    failures = [refuse] * num_failures
    write = BlockFile.write
    monkeypatch.setattr(
        BlockFile, "write", lambda *blocks: failures.pop()() if failures else write(*blocks)
    )
    pool = make_pool(4, num_layers=LAYOUT.num_layers, layer_bytes=LAYOUT.layer_bytes)
    memory = BlockCache(Limits.of(4))
    (slot,) = memory.reserve([NAME], Origin(), now_ms=1).slots
    fill(pool, slot, seed=1)
    memory.commit(NAME)
    file = BlockFile(tmp_path)
    file.begin(PROTO_LAYOUT, num_slots=4)
    was_behind: list[bool] = []
    disk = DiskTier(
        file,
        pool,
        memory=memory,
        limits=Limits.of(4),
        upkeep=Upkeep(lambda _: None),
        now_ms=lambda: 1,
        on_gone=lambda _: None,
        on_settled=lambda: was_behind.append(disk.is_behind),
    )
    disk.put([NAME])

    async def told() -> bool:
        return False in was_behind

    assert await eventually(told, bool)
    await disk.close(timeout_ms=0)
    file.close()
