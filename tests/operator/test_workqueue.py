"""The queue of objects to reconcile."""

import asyncio

import pytest
from kvasir_operator.core.manifests import Ref
from kvasir_operator.workqueue import BACKOFF_MS_MAX, BACKOFF_MS_MIN, WorkQueue

A, B = Ref("ModelService", "default", "a"), Ref("ModelService", "default", "b")


async def test_a_key_waits_only_once() -> None:
    queue = WorkQueue()
    for key in (A, A, B):
        queue.add(key)
    assert [await queue.get(), await queue.get()] == [A, B]


async def test_a_key_that_runs_is_not_handed_out_again_before_it_is_done() -> None:
    queue = WorkQueue()
    queue.add(A)
    assert await queue.get() == A
    queue.add(A)
    queue.add(B)
    assert await queue.get() == B
    queue.done(A)
    assert await queue.get() == A


async def test_failures_back_off_to_a_maximum() -> None:
    queue = WorkQueue()
    delays = [queue.failed(A) for _ in range(20)]
    for delay_ms, least_ms in zip(delays, (BACKOFF_MS_MIN, 2 * BACKOFF_MS_MIN), strict=False):
        assert least_ms <= delay_ms < 1.25 * least_ms
    assert BACKOFF_MS_MAX <= delays[-1] < 1.25 * BACKOFF_MS_MAX
    queue.succeeded(A)
    assert queue.failed(A) < 2 * BACKOFF_MS_MIN
    queue.forget(A)


async def test_the_wait_counts_from_the_first_news() -> None:
    waits: list[float] = []
    queue = WorkQueue(on_wait=waits.append)
    queue.add(A)
    queue.add(A)
    await queue.get()
    assert len(waits) == 1
    assert waits[0] >= 0


async def test_the_earliest_of_several_times_counts() -> None:
    queue = WorkQueue()
    queue.add_after(A, 60_000)
    queue.add_after(A, 0)
    queue.add_after(A, 60_000)
    assert await asyncio.wait_for(queue.get(), 10) == A


async def test_a_forgotten_key_does_not_come_back() -> None:
    queue = WorkQueue()
    queue.add_after(A, 0)
    queue.forget(A)
    queue.add_after(B, 0)
    assert await asyncio.wait_for(queue.get(), 10) == B
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.get(), 0.05)
