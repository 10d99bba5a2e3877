"""The tiers of a KV node, and what moves its blocks, in this process."""

import asyncio
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import pytest
from kv_fleet import LAYOUT, PROTO_LAYOUT, make_holder
from kvasir_kvstore.core.cache import BlockCache, Held, Limits, Origin
from kvasir_kvstore.index import MemoryIndex
from kvasir_kvstore.node import moves, object_store
from kvasir_kvstore.node import upkeep as upkeep_module
from kvasir_kvstore.node.arena import Arena
from kvasir_kvstore.node.block_file import BlockFile
from kvasir_kvstore.node.object_store import ObjectTier
from kvasir_kvstore.node.settings import KvNodeSettings
from kvasir_kvstore.node.store import NodeStore
from kvasir_kvstore.node.upkeep import Upkeep
from kvasir_kvstore.nodes import NodeSet
from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import common_pb2, kvnode_pb2
from kvstore_builders import eventually, fill, free_port, make_pool, random_uid
from obstore.store import MemoryStore

NAME = os.urandom(16)
T = TypeVar("T")


class Elsewhere(ObjectTier):
    """A tier that has the block, since another node has brought it."""

    def __init__(self, awaited: Sequence[bytes] = ()) -> None:
        self.num_read = 0
        self._awaited = awaited

    def find(self, name: bytes) -> Held | None:
        return Held(0, Origin(), 0)

    def touch(self, names: Sequence[bytes]) -> None:
        """Nothing to do."""

    async def read(self, name: bytes, target: int) -> bool:
        self.num_read += 1
        return True

    def awaits(self, name: bytes) -> bool:
        return name in self._awaited

    async def close(self, *, timeout_ms: int) -> None:
        """Nothing to do."""


def make_arena(failed: list[str] | None = None) -> Arena:
    """`failed` gets the names of background work that failed."""
    address = common_pb2.PeerAddress(uid=random_uid(), epoch=1, data_port=free_port())
    return Arena(
        PROTO_LAYOUT,
        KvNodeSettings(name="n", host="127.0.0.1", memory_mb=1, memory_high=1, memory_low=1),
        address,
        upkeep=Upkeep((failed if failed is not None else []).append),
        now_ms=lambda: 1,
        on_change=lambda *_: None,
    )


async def store_in(arena: Arena, names: list[bytes]) -> None:
    """As if they had been offered."""
    slots = arena.cache.reserve(names, Origin(), now_ms=1).slots
    for name, slot in zip(names, slots, strict=True):
        fill(arena.pool, slot, seed=slot)
        arena.pool.publish(name, slot)
        arena.cache.commit(name)
    for tier in arena.below:
        tier.put(names)


async def test_a_disk_that_has_nothing_to_write_holds_up_no_stop(tmp_path: Path) -> None:
    arena = make_arena()
    file = BlockFile(tmp_path)
    arena.attach_disk(file, file.begin(PROTO_LAYOUT, num_slots=4))
    async with asyncio.timeout(60):
        await arena.close(timeout_ms=600_000)
    file.close()


async def test_a_block_on_its_way_to_memory_is_not_loaded_into_a_second_slot() -> None:
    arena = make_arena()
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


async def test_of_many_blocks_in_the_object_store_the_last_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(object_store, "KNOWN_MAX", 2)
    names = [os.urandom(16) for _ in range(5)]
    pool = make_pool(8, num_layers=LAYOUT.num_layers, layer_bytes=LAYOUT.layer_bytes)
    memory = BlockCache(Limits.of(8))
    for slot in memory.reserve(names, Origin(chain_head=names[0]), now_ms=1).slots:
        fill(pool, slot, seed=slot)
    gone: list[bytes] = []
    tier = ObjectTier(
        MemoryStore(),
        pool,
        memory=memory,
        ttl_ms=0,
        upkeep=Upkeep(lambda _: None),
        now_ms=lambda: 1,
        on_change=lambda _, removed: gone.extend(removed),
        on_settled=lambda: None,
    )
    for name in names:
        memory.commit(name)
        tier.put([name])

        async def num_written() -> int:
            return tier.describe().blocks_written

        expected = names.index(name) + 1
        await eventually(num_written, lambda count, expected=expected: count == expected)
    assert (tier.names(), gone) == (names[3:], names[:3])
    await tier.close(timeout_ms=0)


async def test_a_disk_writer_that_fails_is_told_of_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failed: list[str] = []
    arena = make_arena(failed)
    file = BlockFile(tmp_path)
    arena.attach_disk(file, file.begin(PROTO_LAYOUT, num_slots=8))
    (disk,) = arena.below

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(file, "write", broken)
        await store_in(arena, [os.urandom(16) for _ in range(2)])
        await eventually(lambda: _now(failed), lambda names: names == ["writing to disk"])
    assert disk.describe().blocks_dropped == 2
    assert "ZeroDivisionError" in caplog.text
    await store_in(arena, [NAME])
    await eventually(lambda: _now(disk.names()), lambda names: names == [NAME])
    assert arena.cache.num_reserved == 0
    await arena.close(timeout_ms=0)
    file.close()


async def test_a_burst_of_offers_gives_up_no_block_that_awaits_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the disk, and is refused if that takes too long; the rest goes on."""
    arena = make_arena()
    num_slots = arena.cache.num_slots
    file = BlockFile(tmp_path)
    arena.attach_disk(file, file.begin(PROTO_LAYOUT, num_slots=2 * num_slots))
    (disk,) = arena.below
    is_free = threading.Event()
    write = file.write

    def slow_write(*blocks: object) -> OSError | None:
        is_free.wait(60)
        return write(*blocks)

    monkeypatch.setattr(file, "write", slow_write)
    first = [os.urandom(16) for _ in range(num_slots)]
    second = [os.urandom(16) for _ in range(16)]
    await store_in(arena, first)
    async with make_holder([], num_blocks=len(second)) as source:
        source.publish(second)
        refused = await arena.fill(source.address, second, Origin(), stored_ms={}, timeout_ms=100)
        assert (refused.num_refused, refused.committed, refused.results) == (16, (), ())
        assert arena.cache.names() == first
        waiting = asyncio.create_task(
            arena.fill(source.address, second, Origin(), stored_ms={}, timeout_ms=120_000)
        )
        await asyncio.wait({waiting}, timeout=0.05)
        is_free.set()
        assert set((await waiting).committed) == set(second)
        await eventually(lambda: _now(disk.names()), lambda names: len(names) == num_slots + 16)
    assert disk.describe().blocks_dropped == 0
    await arena.close(timeout_ms=0)
    file.close()


async def test_blocks_that_nobody_wants_displace_what_is_kept_below_and_one_another(
    tmp_path: Path,
) -> None:
    arena = make_arena()
    file = BlockFile(tmp_path)
    num_slots = arena.cache.num_slots
    arena.attach_disk(file, file.begin(PROTO_LAYOUT, num_slots=8 * num_slots))
    (disk,) = arena.below
    hot = [os.urandom(16) for _ in range(num_slots)]
    await store_in(arena, hot)
    await eventually(lambda: _now(disk.is_behind), lambda is_behind: not is_behind)
    moved = [os.urandom(16) for _ in range(2 * num_slots)]
    async with make_holder([], num_blocks=len(moved)) as source:
        source.publish(moved)
        for start in range(0, len(moved), 4):
            part = moved[start : start + 4]
            filled = await arena.fill(
                source.address, part, Origin(), stored_ms={}, timeout_ms=120_000, is_cold=True
            )
            assert set(filled.committed) == set(part)
            await eventually(lambda: _now(disk.is_behind), lambda is_behind: not is_behind)
    assert set(disk.names()) == {*hot, *moved}
    assert len(set(hot) - set(arena.cache.names())) <= 4, "as many as are on their way to disk"
    await arena.close(timeout_ms=0)
    file.close()


async def test_blocks_that_nobody_wants_do_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do they hold the turn of an offer meanwhile."""
    settings = KvNodeSettings(name="n", memory_mb=1, disk_dir=tmp_path, disk_mb=1)
    store = NodeStore(settings, uid=random_uid(), epoch=1, index=MemoryIndex())
    is_free = threading.Event()
    async with make_holder([]) as source:
        names = [os.urandom(16) for _ in range(2)]
        source.publish(names)
        hot = kvnode_pb2.OfferRequest(source=source.address, layout=PROTO_LAYOUT, names=names[:1])
        cold = kvnode_pb2.OfferRequest(
            source=source.address, layout=PROTO_LAYOUT, names=names[1:], is_cold=True
        )
        monkeypatch.setattr(BlockFile, "write", lambda *_: is_free.wait(60) and None)
        assert (await store.offer(hot)).num_pulled == 1
        with pytest.raises(KvasirError) as caught:
            await store.offer(cold)
        assert (caught.value.reason, caught.value.retry_after_ms > 0) == (Reason.OVERLOADED, True)
        hot.is_cold = True
        assert (await store.offer(hot)).num_held == 1, "what is here costs nothing"
        is_free.set()

        async def offered() -> int:
            try:
                return (await store.offer(cold)).num_pulled
            except KvasirError:
                return 0

        assert await eventually(offered, bool) == 1
    await store.close()


async def test_blocks_that_nobody_wants_get_no_room_where_they_cannot_stay() -> None:
    arena = make_arena()
    hot = [os.urandom(16) for _ in range(arena.cache.num_slots)]
    await store_in(arena, hot)
    async with make_holder([]) as source:
        source.publish([NAME])
        filled = await arena.fill(
            source.address, [NAME], Origin(), stored_ms={}, timeout_ms=120_000, is_cold=True
        )
    assert filled.results == ()
    assert arena.cache.names() == hot
    await arena.close(timeout_ms=0)


async def test_a_load_for_a_request_finds_room_though_all_blocks_await_the_disk() -> None:
    arena = make_arena()
    names = [os.urandom(16) for _ in range(arena.cache.num_slots)]
    await store_in(arena, names)
    tier = Elsewhere(awaited=names)
    arena.below.append(tier)
    assert await arena.load([NAME], timeout_ms=10_000) == 1
    await arena.close(timeout_ms=0)


async def test_a_load_that_fails_is_a_miss_and_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[str] = []
    arena = make_arena(failed)
    tier = Elsewhere()
    arena.below.append(tier)

    async def broken(name: bytes, target: int) -> bool:
        raise ZeroDivisionError

    monkeypatch.setattr(tier, "read", broken)
    assert await arena.load([NAME], timeout_ms=10_000) == 0
    assert (failed, arena.cache.num_reserved) == (["loading"], 0)
    await arena.close(timeout_ms=0)


async def test_work_that_fails_begins_again_later_each_time_and_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []
    now_s = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds
        waits.append(seconds)
        if len(waits) == 12:
            raise asyncio.CancelledError

    async def work() -> None:
        nonlocal now_s
        if len(waits) == 10:
            now_s += 2 * upkeep_module.SHOWN_S  # it works for long
            problems.append(upkeep.problems)
        raise ValueError

    problems: list[list[str]] = []
    monkeypatch.setattr(upkeep_module.time, "monotonic", lambda: now_s)
    monkeypatch.setattr(upkeep_module.asyncio, "sleep", sleep)
    upkeep = Upkeep(lambda _: None)
    with pytest.raises(asyncio.CancelledError):
        await upkeep.start(work, name="work")
    low, high = upkeep_module.BACKOFF_S_MIN, upkeep_module.BACKOFF_S_MAX
    assert waits == [*(min(low * 2**i, high) for i in range(10)), low, 2 * low]
    assert problems == [[]]
    assert upkeep.problems == ["work failed: ValueError"]


async def _now(value: T) -> T:
    return value


class Refusing(NodeSet):
    """One node that takes nothing."""

    def __init__(self) -> None:
        super().__init__([])

    def weights(self) -> dict[str, float]:
        return {"kv:1": 1.0}

    def lives(self) -> dict[str, int]:
        return {"kv:1": 1}

    async def offer(
        self, target: str, request: kvnode_pb2.OfferRequest
    ) -> kvnode_pb2.OfferResponse:
        raise KvasirError(Reason.UNSUPPORTED, "another layout")


class One:
    """A node that holds one block."""

    def layout(self) -> common_pb2.KvLayout:
        return PROTO_LAYOUT

    def blocks(self, *, on_disk: bool) -> dict[bytes, Held]:
        return {NAME: Held(0, Origin(chain_head=NAME), stored_ms=1)}

    async def load(self, names: Sequence[bytes], *, timeout_ms: int, is_cold: bool) -> int:
        raise AssertionError("nobody lacks anything")


async def test_a_node_that_refuses_is_not_asked_all_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            raise asyncio.CancelledError

    monkeypatch.setattr(moves.asyncio, "sleep", sleep)
    mover = moves.Mover(
        KvNodeSettings(name="n"),
        Refusing(),
        common_pb2.PeerAddress(host="kv", grpc_port=2),
        source=One(),
    )
    with pytest.raises(asyncio.CancelledError):
        await mover.run()
    assert waits == [moves.INTERVAL_S, moves.RETRY_S, moves.RETRY_S]


class Lacking(Refusing):
    """A node that lacks everything, and takes its time to say so."""

    def __init__(self, clock: list[int]) -> None:
        super().__init__()
        self._clock = clock
        self.asked: list[kvnode_pb2.OfferRequest] = []

    async def offer(
        self, target: str, request: kvnode_pb2.OfferRequest
    ) -> kvnode_pb2.OfferResponse:
        self.asked.append(request)
        self._clock[0] += 7_000
        return kvnode_pb2.OfferResponse(num_missed=len(request.names))


class OnDisk(One):
    """A node that has its block on disk."""

    def blocks(self, *, on_disk: bool) -> dict[bytes, Held]:
        return super().blocks(on_disk=on_disk) if on_disk else {}

    async def load(self, names: Sequence[bytes], *, timeout_ms: int, is_cold: bool) -> int:
        assert is_cold
        return len(names)


async def test_blocks_that_are_loaded_to_be_moved_are_offered_as_cold_and_with_their_age_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [10_000]
    target = Lacking(clock)

    async def sleep(_: float) -> None:
        if target.asked:
            raise asyncio.CancelledError

    monkeypatch.setattr(moves.time, "time_ns", lambda: clock[0] * 1_000_000)
    monkeypatch.setattr(moves.asyncio, "sleep", sleep)
    address = common_pb2.PeerAddress(host="kv", grpc_port=2)
    with pytest.raises(asyncio.CancelledError):
        await moves.Mover(KvNodeSettings(name="n"), target, address, source=OnDisk()).run()
    assert [(list(asked.ages_ms), asked.is_cold) for asked in target.asked] == [
        ([9_999], True),
        ([16_999], True),
    ]


class Overloaded(Refusing):
    """A node that has too much to do, for so many offers."""

    def __init__(self, num_refusals: int) -> None:
        super().__init__()
        self.num_refusals, self.num_asked = num_refusals, 0

    async def offer(
        self, target: str, request: kvnode_pb2.OfferRequest
    ) -> kvnode_pb2.OfferResponse:
        self.num_asked += 1
        if self.num_asked <= self.num_refusals:
            raise KvasirError(Reason.OVERLOADED, "not now", retry_after_ms=200)
        return kvnode_pb2.OfferResponse(num_held=len(request.names))


class Many(One):
    """A node that holds a chain of two offers."""

    def blocks(self, *, on_disk: bool) -> dict[bytes, Held]:
        names = [i.to_bytes(16, "big") for i in range(2 * moves.NAMES_PER_OFFER)]
        return {name: Held(0, Origin(chain_head=NAME), stored_ms=1) for name in names}


@pytest.mark.parametrize(
    ("num_refusals", "num_asked", "next_round_s"),
    [(3, 3 + 2, moves.INTERVAL_S), (1000, moves.TRIES_MAX, moves.RETRY_S)],
    ids=["for a while", "for long"],
)
async def test_a_node_that_is_overloaded_is_asked_again_and_then_left_for_a_round(
    monkeypatch: pytest.MonkeyPatch, num_refusals: int, num_asked: int, next_round_s: float
) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if waits.count(moves.INTERVAL_S) + waits.count(moves.RETRY_S) == 2:
            raise asyncio.CancelledError

    monkeypatch.setattr(moves.asyncio, "sleep", sleep)
    target = Overloaded(num_refusals)
    address = common_pb2.PeerAddress(host="kv", grpc_port=2)
    with pytest.raises(asyncio.CancelledError):
        await moves.Mover(KvNodeSettings(name="n"), target, address, source=Many()).run()
    assert target.num_asked == num_asked
    assert waits[-1] == next_round_s
