"""The block index: one table of behaviour for both kinds, and Redis away."""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable

import pytest
from conftest import RedisServer
from kvasir_kvstore.core.placement import Run
from kvasir_kvstore.index import (
    REBUILD_MS,
    BlockIndex,
    Location,
    MemoryIndex,
    RedisIndex,
    make_index,
)
from kvasir_proto.v1 import common_pb2
from kvstore_builders import eventually

IndexMaker = Callable[[int], BlockIndex]


def make_holder(name: str, *, epoch: int = 1) -> common_pb2.PeerAddress:
    uid = name.encode().ljust(16, b"\0")
    return common_pb2.PeerAddress(name=name, uid=uid, epoch=epoch, host="h", data_port=7)


A, B = make_holder("a"), make_holder("b")


def make_names(count: int) -> list[bytes]:
    return [os.urandom(16) for _ in range(count)]


def brief(locations: list[Location]) -> list[tuple[str, int, int]]:
    return [(run.holder.name, run.first, run.count) for run in locations]


@pytest.fixture(params=["memory", "redis"])
async def make(request: pytest.FixtureRequest) -> AsyncIterator[IndexMaker]:
    opened: list[BlockIndex] = []

    def build(ttl_ms: int = 60_000) -> BlockIndex:
        if request.param == "memory":
            index: BlockIndex = MemoryIndex(ttl_ms=ttl_ms)
        else:
            server: RedisServer = request.getfixturevalue("shared_redis")
            index = RedisIndex(server.url, ttl_ms=ttl_ms, timeout_ms=5000)
        opened.append(index)
        return index

    yield build
    for index in opened:
        await index.close()


async def test_a_chain_is_located_whole(make: IndexMaker) -> None:
    index, names = make(60_000), make_names(5)
    assert await index.announce(names, A)
    assert await index.locate(names) == [Run(A, 0, 5)]
    assert index.healthy
    assert index.problem == ""


async def test_unknown_names_are_a_miss(make: IndexMaker) -> None:
    index = make(60_000)
    assert await index.locate(make_names(3)) == []
    assert await index.locate([]) == []


async def test_what_follows_a_gap_is_not_located(make: IndexMaker) -> None:
    index, names = make(60_000), make_names(5)
    await index.announce([*names[:2], *names[3:]], A)
    assert brief(await index.locate(names)) == [("a", 0, 2)]
    assert await index.locate(names[2:]) == []


async def test_runs_alternate_between_holders(make: IndexMaker) -> None:
    index, names = make(60_000), make_names(5)
    await index.announce(names, A)
    await index.announce(names[1:3], B)
    assert brief(await index.locate(names)) == [("a", 0, 1), ("b", 1, 2), ("a", 3, 2)]


async def test_only_the_holder_itself_withdraws(make: IndexMaker) -> None:
    index, names = make(60_000), make_names(3)
    await index.announce(names, A)
    assert await index.withdraw(names, B)
    assert brief(await index.locate(names)) == [("a", 0, 3)]
    assert await index.withdraw(names[1:], A)
    assert brief(await index.locate(names)) == [("a", 0, 1)]
    assert await index.withdraw([], A)


async def test_an_earlier_life_cannot_withdraw_the_later_ones_entries(make: IndexMaker) -> None:
    index, names = make(60_000), make_names(2)
    await index.announce(names, make_holder("a", epoch=2))
    await index.withdraw(names, make_holder("a", epoch=1))
    assert [run.holder.epoch for run in await index.locate(names)] == [2]


async def test_a_lease_that_is_not_renewed_ends(make: IndexMaker) -> None:
    index, names = make(60), make_names(2)
    await index.announce(names, A)
    await eventually(lambda: index.locate(names), lambda found: not found)
    await index.announce(names, A)
    assert await index.locate(names)


async def test_a_renewed_lease_lives_on(make: IndexMaker) -> None:
    index, names = make(1000), make_names(1)
    end = time.monotonic() + 1.2
    while time.monotonic() < end:
        await index.announce(names, A)
        await asyncio.sleep(0.02)
    assert await index.locate(names)


async def test_a_full_memory_index_forgets_the_oldest() -> None:
    index, names = MemoryIndex(entries_max=3), make_names(5)
    for name in names:
        await index.announce([name], A)
    assert await index.locate(names[:1]) == []
    assert brief(await index.locate(names[2:])) == [("a", 0, 3)]


async def test_redis_answers_a_long_chain_in_one_round_trip(shared_redis: RedisServer) -> None:
    names = make_names(256)
    async with _index(shared_redis.url, timeout_ms=5000) as index:
        await index.announce(names, A)
        before = await index._redis.info("commandstats")
        assert brief(await index.locate(names)) == [("a", 0, 256)]
        after = await index._redis.info("commandstats")
        calls = {
            name: stats["calls"] - before.get(name, {"calls": 0})["calls"]
            for name, stats in after.items()
        }
        counted = {name for name, count in calls.items() if count}
        assert counted == {"cmdstat_eval", "cmdstat_get", "cmdstat_mget", "cmdstat_info"}
        assert all(calls[f"cmdstat_{name}"] == 1 for name in ("eval", "get", "mget"))


@pytest.mark.parametrize("gap", [0, 255, 256, 600, 8191], ids=str)
async def test_redis_takes_the_longest_chain_there_may_be(
    shared_redis: RedisServer, gap: int
) -> None:
    names = make_names(8192)
    async with _index(shared_redis.url, timeout_ms=5000) as index:
        await index.announce(names[:200], A)
        await index.announce(names[200:], B)
        await index._redis.delete(b"kvasir:block:" + names[gap])
        expected = [("a", 0, min(gap, 200)), ("b", 200, gap - 200)]
        assert brief(await index.locate(names)) == [run for run in expected if run[2] > 0]


async def test_an_answer_that_nobody_waited_for_is_not_taken_for_the_next(
    shared_redis: RedisServer,
) -> None:
    ours, others = make_names(8192), make_names(3)
    async with _index(shared_redis.url, timeout_ms=5000) as index:
        await index.announce(ours, A)
        await index.announce(others, B)
        for _ in range(10):
            asking = asyncio.create_task(index.locate(ours))
            for _ in range(4):  # the question is on its way by then
                await asyncio.sleep(0)
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asking
            assert brief(await index.locate(others)) == [("b", 0, 3)]


@contextlib.asynccontextmanager
async def _index(
    url: str,
    *,
    timeout_ms: int = 100,
    clock_ms: Callable[[], float] = lambda: time.monotonic() * 1000,
) -> AsyncIterator[RedisIndex]:
    index = RedisIndex(url, timeout_ms=timeout_ms, retry_ms=50, clock_ms=clock_ms)
    try:
        yield index
    finally:
        await index.close()


async def test_redis_away_is_a_miss_and_visible_and_ends_by_itself(own_redis: RedisServer) -> None:
    names = make_names(2)
    async with _index(own_redis.url) as index:
        assert await index.locate(names) == []
        assert not await index.announce(names, A)
        assert not await index.withdraw(names, A)
        assert not index.healthy
        assert "Redis" in index.problem
        own_redis.start()
        await eventually(lambda: index.announce(names, A), bool)
        assert index.healthy
        assert brief(await index.locate(names)) == [("a", 0, 2)]
        own_redis.stop()
        assert await index.locate(names) == []
        assert not index.healthy


async def test_a_wiped_redis_is_unhealthy_until_holders_had_time(own_redis: RedisServer) -> None:
    own_redis.start()
    names, now_ms = make_names(2), 0.0
    async with (
        _index(own_redis.url, timeout_ms=5000, clock_ms=lambda: now_ms) as index,
        _index(own_redis.url, timeout_ms=5000) as other,
    ):
        await other.announce(names, A)
        before = await other.generation()
        for is_announced in (False, True):
            assert await index.locate(names)
            assert index.healthy
            await other._redis.flushall()
            if is_announced:  # by another holder than that of these names
                await other.announce(make_names(1), B)
            assert await index.locate(names) == []
            assert not index.healthy
            assert "lost" in index.problem
            now_ms += REBUILD_MS
            await other.announce(names, A)
            assert brief(await index.locate(names)) == [("a", 0, 2)]
            now_ms += REBUILD_MS
            assert index.healthy
        assert before != await other.generation()


async def test_a_redis_that_hangs_delays_one_call_only() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        index = RedisIndex(
            f"redis://127.0.0.1:{mute.getsockname()[1]}/0", timeout_ms=100, retry_ms=60_000
        )
        start = time.monotonic()
        for _ in range(50):
            assert await index.locate(make_names(3)) == []
        assert time.monotonic() - start < 6
        assert not index.healthy
        await index.close()


async def test_garbage_in_redis_is_a_miss(shared_redis: RedisServer) -> None:
    names = make_names(3)
    async with _index(shared_redis.url, timeout_ms=5000) as index:
        await index.announce(names, A)
        await index._redis.set(b"kvasir:block:" + names[1], b"\xff\xffnot an address")
        assert brief(await index.locate(names)) == [("a", 0, 1)]


@pytest.mark.parametrize("url", ["http://host", "redis://host:port"], ids=["scheme", "port"])
def test_a_url_that_is_not_of_redis_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"URL of Redis|port|Port"):
        make_index(url)
