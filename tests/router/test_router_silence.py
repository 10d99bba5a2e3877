"""Silence of a peer ends a wait, the process's own hold-up does not."""

import asyncio
import time

import pytest
from kvasir_router.membership.silence import HELD_UP_S, Silence


async def test_silence_ends_the_wait() -> None:
    with pytest.raises(TimeoutError):
        async with Silence(0.02):
            await asyncio.Event().wait()


async def test_a_cancellation_from_outside_stays_one() -> None:
    async def wait() -> None:
        async with Silence(3_600):
            started.set()
            await asyncio.Event().wait()

    started = asyncio.Event()
    task = asyncio.create_task(wait())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_who_is_heard_is_not_silent() -> None:
    loop = asyncio.get_running_loop()
    async with Silence(1.0) as silence:
        until_s = loop.time() + 1.3
        while loop.time() < until_s:
            await asyncio.sleep(0.01)
            silence.heard()


async def test_a_hold_up_of_this_process_is_nobodys_silence() -> None:
    """What came meanwhile is read in the turn after the late timer."""
    limit_s = 0.05
    async with Silence(limit_s) as silence:
        await asyncio.sleep(0)
        time.sleep(limit_s + 2 * HELD_UP_S)  # noqa: ASYNC251
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        silence.heard()


async def test_a_process_held_up_again_and_again_still_notices_silence() -> None:
    limit_s = 0.05

    async def stall() -> None:
        async with Silence(limit_s):
            while True:
                time.sleep(limit_s + 2 * HELD_UP_S)  # noqa: ASYNC251
                await asyncio.sleep(0)

    task = asyncio.create_task(stall())
    done, _ = await asyncio.wait({task}, timeout=60)
    assert done, "the silence was never noticed"
    with pytest.raises(TimeoutError):
        task.result()
