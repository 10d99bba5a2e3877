"""The engine as its process sees it: every end of a request, its memory, failures, events, load."""

import asyncio
import gc
import threading
import time
from contextlib import aclosing

import numpy as np
import pytest
from engine_builders import (
    collect,
    deadline_in,
    golden_model,
    make_request,
    prompt,
    serving,
)
from kvasir_engine.core.types import EngineRequest, FinishReason
from kvasir_kvstore.core.block import chain, root
from kvasir_proto.errors import KvasirError, Reason


class Gate:
    """A model whose steps wait for leave, or fail on demand."""

    def __init__(self) -> None:
        self.inner = golden_model()
        self.native = self
        self.fingerprint = self.inner.fingerprint
        self.layout = self.inner.layout
        self.leave = threading.Semaphore(0)
        self.is_open = False
        self.num_failures_due = 0
        self.is_computing = threading.Event()

    def attach_pool(self, *arrays: np.ndarray) -> None:
        self.inner.native.attach_pool(*arrays)

    def forward(self, **arrays: np.ndarray) -> None:
        self.is_computing.set()
        if not self.is_open:
            assert self.leave.acquire(timeout=20)
        if self.num_failures_due:
            self.num_failures_due -= 1
            raise RuntimeError("no such luck")
        self.inner.native.forward(**arrays)

    def sample(self, **arrays: np.ndarray) -> np.ndarray:
        return self.inner.native.sample(**arrays)

    def open(self) -> None:
        self.is_open = True
        self.leave.release()


async def reason_of(stream: object) -> Reason:
    with pytest.raises(KvasirError) as ended:
        await collect(stream)  # type: ignore[arg-type]
    return ended.value.reason


async def test_tokens_come_one_by_one_with_timings_at_both_ends() -> None:
    async with serving() as served:
        output = await collect(served.engine.generate(make_request(prompt(100), max_tokens=5)))
        assert len(output.tokens) == 5
        assert output.finish_reason is FinishReason.LENGTH
        first, last = output.events[0].timing, output.events[-1].timing
        assert first is not None
        assert last is not None
        assert (first.tokens_cached, first.tokens_computed) == (0, 100)
        assert first.prefill_ms > 0
        await served.until_empty()


async def test_memory_returns_after_a_stop_token() -> None:
    async with serving() as served:
        tokens = await served.tokens(make_request(prompt(50)))
    async with serving(eos=(tokens[3],)) as served:
        request = make_request(prompt(50), ignore_eos=False)
        output = await collect(served.engine.generate(request))
        assert output.tokens == tokens[: tokens.index(tokens[3]) + 1]
        assert output.finish_reason is FinishReason.STOP
        await served.until_empty()


@pytest.mark.parametrize("how", ["cancel", "close", "aclosing", "drop"])
async def test_memory_returns_when_the_consumer_goes_away(how: str) -> None:
    async with serving() as served:
        request = make_request(prompt(100), max_tokens=1500)
        stream = served.engine.generate(request)
        await anext(stream)
        assert served.num_blocks_free < served.num_blocks
        if how == "cancel":
            served.engine.cancel(request.request_id)
            assert await reason_of(stream) is Reason.CANCELLED
        elif how == "close":
            stream.close()
        elif how == "aclosing":
            async with aclosing(stream):
                await anext(stream)
        del stream
        gc.collect()
        await served.until_empty()


async def test_a_cancelled_request_ends_with_the_reason_given() -> None:
    async with serving() as served:
        request = make_request(prompt(10), max_tokens=1500)
        stream = served.engine.generate(request)
        await anext(stream)
        served.engine.cancel(request.request_id, Reason.DRAINING)
        assert await reason_of(stream) is Reason.DRAINING


@pytest.mark.parametrize("is_waiting", [True, False], ids=["waiting", "running"])
async def test_memory_returns_when_the_deadline_passes(is_waiting: bool) -> None:
    gate = Gate()
    async with serving(gate, max_running=1) as served:
        other = served.engine.generate(make_request(prompt(10, seed=2), max_tokens=1500))
        late = make_request(prompt(40), max_tokens=1500, deadline_ms=deadline_in(50))
        if not is_waiting:
            other.close()
        stream = served.engine.generate(late)
        await asyncio.to_thread(gate.is_computing.wait)
        await asyncio.sleep(0.06)
        gate.open()
        assert await reason_of(stream) is Reason.TIMEOUT
        other.close()
        await served.until_empty()


async def test_a_deadline_ends_a_request_while_nothing_is_computed() -> None:
    async with serving(num_blocks=4) as served:
        held = make_request(prompt(120))
        await served.engine.reserve(held)
        late = served.engine.generate(make_request(prompt(40), deadline_ms=deadline_in(50)))
        assert await reason_of(late) is Reason.TIMEOUT
        await served.engine.release(held.request_id)
        await served.until_empty()


async def test_a_failed_step_ends_its_requests_and_the_engine_lives_on() -> None:
    gate = Gate()
    gate.num_failures_due = 1
    gate.open()
    async with serving(gate) as served:
        assert await reason_of(served.engine.generate(make_request(prompt(40)))) is Reason.INTERNAL
        assert served.engine.problem == ""
        assert len(await served.tokens(make_request(prompt(40)))) == 8
        assert served.engine.counters().num_step_failures == 1
        await served.until_empty()


async def test_repeated_failures_show_as_a_problem_until_a_step_succeeds() -> None:
    gate = Gate()
    gate.num_failures_due = 3
    gate.open()
    async with serving(gate) as served:
        for _ in range(3):
            await reason_of(served.engine.generate(make_request(prompt(40))))
        assert "no such luck" in served.engine.problem
        assert len(await served.tokens(make_request(prompt(40)))) == 8
        assert served.engine.problem == ""


async def test_a_broken_scheduler_ends_everything_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving() as served:

        def explode(**_: object) -> None:
            raise AssertionError("a bug")

        monkeypatch.setattr("kvasir_engine.core.scheduler.Scheduler.schedule", explode)
        stream = served.engine.generate(make_request(prompt(40)))
        assert await reason_of(stream) is Reason.INTERNAL
        assert served.engine.problem
        with pytest.raises(KvasirError):
            served.engine.generate(make_request(prompt(40)))


async def test_a_reservation_cannot_be_activated_once_the_engine_has_stopped() -> None:
    async with serving() as served:
        request = make_request(prompt(100))
        await served.engine.reserve(request)
        await served.engine.stop()
        with pytest.raises(KvasirError) as stopped:
            served.engine.activate(request.request_id, computed_tokens=0)
        assert stopped.value.reason is Reason.DRAINING
        await served.engine.release(request.request_id)
        await served.until_empty()


async def test_memory_returns_when_a_reservation_is_released() -> None:
    async with serving() as served:
        request = make_request(prompt(100))
        reservation = await served.engine.reserve(request)
        assert len(reservation.blocks) == 4
        assert served.num_blocks_free == served.num_blocks - 4
        assert served.engine.load().num_reserved == 1
        await served.engine.release(request.request_id)
        await served.engine.release(request.request_id)
        await served.until_empty()


async def test_memory_returns_when_an_activation_fails() -> None:
    async with serving() as served:
        request = make_request(prompt(100), deadline_ms=deadline_in(30))
        await served.engine.reserve(request)
        await asyncio.sleep(0.04)
        with pytest.raises(KvasirError) as late:
            served.engine.activate(request.request_id, computed_tokens=0)
        assert late.value.reason is Reason.TIMEOUT
        await served.until_empty()
        with pytest.raises(KvasirError) as unknown:
            served.engine.activate(request.request_id, computed_tokens=0)
        assert unknown.value.reason is Reason.INVALID_REQUEST


async def test_a_session_is_given_up_when_its_activation_fails() -> None:
    async with serving() as served:
        request = make_request(prompt(100), session=3, deadline_ms=deadline_in(30))
        await served.engine.reserve(request)
        assert served.pool.num_sessions == 1
        await asyncio.sleep(0.04)
        with pytest.raises(KvasirError):
            served.engine.activate(request.request_id, computed_tokens=0)
        await served.until_empty()


async def test_a_reservation_waits_for_memory() -> None:
    async with serving(num_blocks=4) as served:
        first, second = make_request(prompt(100)), make_request(prompt(100, seed=2))
        await served.engine.reserve(first)
        waiting = asyncio.create_task(served.engine.reserve(second))
        await served.until(lambda: served.engine.load().num_waiting == 1)
        assert not waiting.done()
        await served.engine.release(first.request_id)
        assert len((await waiting).blocks) == 4
        await served.engine.release(second.request_id)
        await served.until_empty()


async def test_memory_returns_when_whoever_waits_for_a_reservation_gives_up() -> None:
    async with serving(num_blocks=4) as served:
        first, second = make_request(prompt(100)), make_request(prompt(100, seed=2))
        await served.engine.reserve(first)
        waiting = asyncio.create_task(served.engine.reserve(second))
        await served.until(lambda: served.engine.load().num_waiting == 1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await served.engine.release(first.request_id)
        await served.until_empty()


async def test_an_activated_reservation_believes_only_blocks_that_are_whole() -> None:
    async with serving() as served:
        expected = await served.tokens(make_request(prompt(100), max_tokens=40))
    async with serving() as served:
        request = make_request(prompt(100), max_tokens=40)
        await served.engine.reserve(request)
        stream = served.engine.activate(request.request_id, computed_tokens=100)
        assert (await collect(stream)).tokens == expected
        await served.until_empty()


async def test_one_request_too_many_is_busy_and_says_when_to_come_again() -> None:
    gate = Gate()
    async with serving(gate, max_running=1, max_waiting=2) as served:
        streams = [served.engine.generate(make_request(prompt(9, seed=1)))]
        await asyncio.to_thread(gate.is_computing.wait)
        streams += [served.engine.generate(make_request(prompt(9, seed=s))) for s in (2, 3)]
        with pytest.raises(KvasirError) as busy:
            served.engine.generate(make_request(prompt(9, seed=4)))
        assert busy.value.reason is Reason.BUSY
        assert busy.value.retry_after_ms > 0
        gate.open()
        assert [len((await collect(stream)).tokens) for stream in streams] == [8, 8, 8]
        await served.until_empty()


@pytest.mark.parametrize(
    ("request_", "reason", "param"),
    [
        (EngineRequest("x", ()), Reason.INVALID_REQUEST, "prompt"),
        (EngineRequest("x", (512,)), Reason.INVALID_REQUEST, "prompt"),
        (make_request(prompt(5), temperature=-1.0), Reason.INVALID_REQUEST, "temperature"),
        (make_request(prompt(5), top_p=1e-50), Reason.INVALID_REQUEST, "top_p"),
        (make_request(prompt(5), max_tokens=4096), Reason.CONTEXT_LENGTH, "max_tokens"),
        (make_request(prompt(2048)), Reason.CONTEXT_LENGTH, "prompt"),
    ],
    ids=["empty", "vocabulary", "temperature", "top_p", "output", "prompt"],
)
async def test_what_cannot_be_served_is_refused(
    request_: EngineRequest, reason: Reason, param: str
) -> None:
    async with serving() as served:
        with pytest.raises(KvasirError) as refused:
            served.engine.generate(request_)
        assert (refused.value.reason, refused.value.param) == (reason, param)
        assert served.engine.num_requests_open == 0


async def test_a_slow_consumer_gets_merged_events_and_holds_nobody_up() -> None:
    async with serving() as served:
        slow = served.engine.generate(make_request(prompt(40), max_tokens=200))
        await served.until_empty()
        await asyncio.sleep(0)  # what was made has been handed out
        output = await collect(slow)
        assert len(output.tokens) == 200
        assert len(output.events) == 1
        assert output.events[0].timing is not None


async def test_a_call_does_not_wait_for_the_running_step() -> None:
    gate = Gate()
    async with serving(gate) as served:
        stream = served.engine.generate(make_request(prompt(40)))
        await asyncio.to_thread(gate.is_computing.wait)
        other = make_request(prompt(40, seed=2))
        reservation = await served.engine.reserve(other)
        assert len(reservation.blocks) == 2
        assert served.engine.load().num_waiting == 1
        await served.engine.release(other.request_id)
        stream.close()
        assert served.num_blocks_free == served.num_blocks - 2  # the step writes there
        gate.open()
        await served.until_empty()


async def test_an_id_can_be_used_again_at_once() -> None:
    async with serving() as served:
        request = make_request(prompt(40), max_tokens=5)
        await served.engine.reserve(request)
        await served.engine.release(request.request_id)
        assert len(await served.tokens(request)) == 5
        # Long enough to be there still when the next asks for its id.
        long = make_request(prompt(40), max_tokens=800, request_id=request.request_id)
        stream = served.engine.generate(long)
        with pytest.raises(KvasirError) as twice:
            served.engine.generate(request)
        assert twice.value.reason is Reason.INVALID_REQUEST
        assert len((await collect(stream)).tokens) == 800


async def test_closing_an_old_stream_leaves_a_new_request_of_the_same_id_alone() -> None:
    gate = Gate()
    async with serving(gate, max_running=1) as served:
        other = served.engine.generate(make_request(prompt(9, seed=2), max_tokens=1))
        await asyncio.to_thread(gate.is_computing.wait)
        request = make_request(prompt(40), max_tokens=5)
        old = served.engine.generate(request)
        old.close()
        new = served.engine.generate(request)
        old.close()
        gate.open()
        assert len((await collect(new)).tokens) == 5
        other.close()


async def test_block_events_tell_what_the_cache_holds() -> None:
    async with serving(num_blocks=4) as served:
        names = chain(root(golden_model().fingerprint), prompt(70))
        watch = served.engine.block_events()
        assert (await anext(watch)).snapshot
        await served.tokens(make_request(prompt(70), max_tokens=1))
        change = await anext(watch)
        assert change.stored == tuple(names)
        assert served.engine.holds([*names, bytes(16)]) == [True, True, False]
        await served.tokens(make_request(prompt(100, seed=2), max_tokens=1))
        change = await anext(watch)
        assert names[1] in change.removed
        late = served.engine.block_events()
        others = chain(root(golden_model().fingerprint), prompt(100, seed=2))
        assert set(others) <= set((await anext(late)).stored)
        watch.close()
        with pytest.raises(StopAsyncIteration):
            await anext(watch)


async def test_an_idle_engine_does_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as served:
        await served.tokens(make_request(prompt(40)))
        calls = []
        scheduler = served.engine._steps._scheduler
        schedule = scheduler.schedule
        monkeypatch.setattr(
            scheduler, "schedule", lambda **now: calls.append(now) or schedule(**now)
        )
        await asyncio.sleep(0.1)
        assert len(calls) <= 1


async def test_an_idle_engine_takes_no_processor_time() -> None:
    """Neither its own thread nor those of the kernels."""
    async with serving(golden_model(num_threads=3)) as served:
        await served.tokens(make_request(prompt(40)))
        await asyncio.sleep(0.05)  # helpers look for work a moment longer
        started = time.process_time()
        await asyncio.sleep(0.4)
        assert time.process_time() - started < 0.1


async def test_stopping_ends_what_is_open() -> None:
    async with serving() as served:
        stream = served.engine.generate(make_request(prompt(40), max_tokens=1500))
        await anext(stream)
        held = make_request(prompt(400, seed=2))
        await served.engine.reserve(held)
        waiting = asyncio.create_task(served.engine.reserve(make_request(prompt(1900, seed=3))))
        await asyncio.sleep(0)
        await served.engine.stop()
        assert await reason_of(stream) is Reason.CANCELLED
        with pytest.raises(KvasirError):
            await waiting
        with pytest.raises(KvasirError):
            served.engine.generate(make_request(prompt(5)))


async def test_load_tells_speed_and_memory() -> None:
    async with serving() as served:
        before = served.engine.load()
        assert (before.prefill_us_per_token, before.decode_ms_per_step) == (0, 0)
        await served.tokens(make_request(prompt(60)))
        after = served.engine.load()
        assert after.prefill_us_per_token > 0
        assert after.decode_ms_per_step > 0
        assert after.blocks_free == after.blocks_total == served.num_blocks
