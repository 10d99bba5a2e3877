"""The tiers of a KV node together, in this process."""

import os
from collections.abc import Sequence

from kv_fleet import LAYOUT
from kvasir_kvstore.core.cache import Held, Origin
from kvasir_kvstore.node.arena import Arena
from kvasir_kvstore.node.object_store import ObjectTier
from kvasir_kvstore.node.settings import KvNodeSettings
from kvasir_proto.v1 import common_pb2
from kvstore_builders import free_port, random_uid

NAME = os.urandom(16)


class Elsewhere(ObjectTier):
    """A tier that has the block, since another node has brought it."""

    def __init__(self) -> None:
        self.num_read = 0

    def find(self, name: bytes) -> Held | None:
        return Held(0, Origin(), 0)

    def touch(self, names: Sequence[bytes]) -> None:
        """Nothing to do."""

    async def read(self, name: bytes, target: int) -> bool:
        self.num_read += 1
        return True

    async def close(self, *, timeout_ms: int) -> None:
        """Nothing to do."""


async def test_a_block_on_its_way_to_memory_is_not_loaded_into_a_second_slot() -> None:
    layout = common_pb2.KvLayout(
        num_layers=LAYOUT.num_layers, block_bytes=LAYOUT.block_bytes, digest=LAYOUT.digest
    )
    address = common_pb2.PeerAddress(uid=random_uid(), epoch=1, data_port=free_port())
    settings = KvNodeSettings(name="n", host="127.0.0.1", memory_mb=1)
    arena = Arena(layout, settings, address, now_ms=lambda: 1, on_change=lambda *_: None)
    tier = Elsewhere()
    arena.below.append(tier)
    (slot,) = arena.cache.reserve([NAME], Origin(), now_ms=1).slots
    assert await arena.load([NAME], timeout_ms=1000) == 0
    arena.cache.commit(NAME)
    assert tier.num_read == 0
    held = arena.cache.find(NAME, now_ms=1)
    assert held is not None
    assert (held.slot, arena.cache.num_reserved) == (slot, 0)
    assert await arena.load([NAME], timeout_ms=1000) == 1
    await arena.close(timeout_ms=0)
