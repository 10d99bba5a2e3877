"""Work between steps: it ends once, keeps no step waiting, and leaves when its caller does."""

import asyncio
import threading
from collections.abc import Iterator

import pytest
from engine_builders import make_request, prompt, serving


def counted(seen: list[str], count: int, name: str = "") -> Iterator[None]:
    for _ in range(count):
        seen.append(name)
        yield


async def test_pieces_run_in_an_idle_engine_and_end() -> None:
    async with serving() as served:
        seen: list[str] = []
        assert await served.engine.run_between_steps(counted(seen, 5))
        assert len(seen) == 5
        assert await served.engine.run_between_steps(iter(()))


async def test_several_errands_take_turns() -> None:
    async with serving() as served:
        seen: list[str] = []
        first, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def a() -> Iterator[None]:
            loop.call_soon_threadsafe(first.set)
            go_on.wait(20)
            yield
            yield from counted(seen, 3, "a")

        running = asyncio.create_task(served.engine.run_between_steps(a()))
        await first.wait()
        other = asyncio.create_task(served.engine.run_between_steps(counted(seen, 3, "b")))
        await asyncio.sleep(0)
        go_on.set()
        assert await running
        assert await other
        assert seen == ["b", "a"] * 3 or seen == ["a", "b"] * 3


async def test_requests_are_computed_meanwhile() -> None:
    async with serving() as served:
        is_over = threading.Event()

        def until_over() -> Iterator[None]:
            while not is_over.is_set():
                yield

        errand = asyncio.create_task(served.engine.run_between_steps(until_over()))
        assert len(await served.tokens(make_request(prompt(40)))) == 8
        is_over.set()
        assert await errand
        await served.until_empty()


async def test_failed_piece_ends_the_errand_and_nothing_else() -> None:
    def failing() -> Iterator[None]:
        yield
        raise ValueError("no")

    async with serving() as served:
        assert not await served.engine.run_between_steps(failing())
        assert len(await served.tokens(make_request(prompt(40)))) == 8


async def test_cancelled_caller_leaves_when_nothing_runs_any_more() -> None:
    async with serving() as served:
        loop, begun, may_end = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
        ended: list[str] = []

        def slow() -> Iterator[None]:
            loop.call_soon_threadsafe(begun.set)
            may_end.wait(20)
            ended.append("piece")
            yield
            ended.append("more")

        errand = asyncio.create_task(served.engine.run_between_steps(slow()))
        await begun.wait()
        errand.cancel()
        await asyncio.sleep(0)
        assert not errand.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await errand
        assert ended == ["piece"]


async def test_stopped_engine_ends_its_errands() -> None:
    async with serving() as served:
        loop, begun = asyncio.get_running_loop(), asyncio.Event()

        def endless() -> Iterator[None]:
            while True:
                loop.call_soon_threadsafe(begun.set)
                yield

        errand = asyncio.create_task(served.engine.run_between_steps(endless()))
        await begun.wait()
        await served.engine.stop()
        assert not await errand
        assert not await served.engine.run_between_steps(endless())


async def test_borrowed_blocks_stay_until_they_are_given_back() -> None:
    async with serving(num_blocks=8) as served:
        await served.tokens(make_request(prompt(100), max_tokens=1))
        (watch,) = [served.engine.block_events()]
        names = (await anext(watch)).stored
        watch.close()
        blocks = served.engine.borrow(names)
        assert len(blocks) == 3
        assert served.num_blocks_free == 5
        await served.tokens(make_request(prompt(150, seed=2), max_tokens=1))
        assert all(served.engine.holds(names))
        served.engine.give_back(blocks)
        await served.until_empty()
