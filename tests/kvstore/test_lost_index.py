"""A node whose index lost its entries says so until they are announced again."""

import asyncio
import contextlib

import pytest
from kvasir_kvstore.index import MemoryIndex
from kvasir_kvstore.node.settings import KvNodeSettings
from kvasir_kvstore.node.store import NodeStore
from kvstore_builders import eventually, random_uid


class WipedIndex(MemoryIndex):
    """Of another generation from one day to the next."""

    day = b"1"
    num_asked = 0

    async def generation(self) -> bytes | None:
        self.num_asked += 1
        return self.day


async def test_a_node_is_degraded_while_it_announces_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index, rounds, is_announced = WipedIndex(), [b""], asyncio.Event()
    settings = KvNodeSettings(name="kv-0", host="127.0.0.1", lease_ttl_ms=3_600_000)
    monkeypatch.setattr("kvasir_kvstore.node.store.LEASE_TICK_S", 0.01)
    store = NodeStore(settings, uid=random_uid(), epoch=1, index=index)

    async def announce_all() -> bool:
        rounds.append(index.day)
        await is_announced.wait()
        return True

    async def state() -> tuple[int, int, list[str]]:
        return index.num_asked, len(rounds), store.degraded

    monkeypatch.setattr(store, "_announce_all", announce_all)
    keeping = asyncio.create_task(store.keep_leases())
    try:
        await eventually(state, lambda now: now[0] > 2)
        assert await state() == (index.num_asked, 1, []), "nothing was lost"
        index.day = b"2"
        _, _, problems = await eventually(state, lambda now: now[1] == 2)
        assert problems == ["index: entries were lost; they are announced again"]
        is_announced.set()
        await eventually(state, lambda now: not now[2])
        asked = index.num_asked
        await eventually(state, lambda now: now[0] > asked + 1)
        assert rounds == [b"", b"2"], "once"
    finally:
        keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeping
        await store.close()
