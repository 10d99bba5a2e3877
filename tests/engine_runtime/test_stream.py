"""Streams and watches: what consumers see, and that what waits for them is bounded."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvasir_engine.core.types import BlockChange, FinishReason, RequestTiming, TokenEvent
from kvasir_engine.stream import BlockWatch, TokenStream
from kvasir_proto.errors import KvasirError, Reason


class Closings:
    """Counts how a stream was ended by its consumer."""

    def __init__(self) -> None:
        self.num_closed = 0
        self.num_dropped = 0

    def stream(self) -> TokenStream:
        return TokenStream("r", on_close=self._close, on_drop=self._drop)

    def _close(self) -> None:
        self.num_closed += 1

    def _drop(self) -> None:
        self.num_dropped += 1


async def test_tokens_that_wait_are_merged() -> None:
    stream = Closings().stream()
    stream.put(TokenEvent((1,)))
    stream.put(TokenEvent((2, 3)))
    assert (await anext(stream)).token_ids == (1, 2, 3)
    stream.put(TokenEvent((4,), FinishReason.LENGTH))
    assert await anext(stream) == TokenEvent((4,), FinishReason.LENGTH)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_merged_event_keeps_the_newest_timing() -> None:
    first, last = (RequestTiming(1.0, prefill_ms, 0, 0, 5, 0) for prefill_ms in (2.0, 3.0))
    stream = Closings().stream()
    stream.put(TokenEvent((1,), timing=first))
    stream.put(TokenEvent((2,)))
    assert (await anext(stream)).timing == first
    stream.put(TokenEvent((3,)))
    assert (await anext(stream)).timing is None
    stream.put(TokenEvent((4,), FinishReason.STOP, last))
    assert (await anext(stream)).timing == last


async def test_an_error_comes_after_the_tokens_made_before_it() -> None:
    stream = Closings().stream()
    stream.put(TokenEvent((1,)))
    stream.fail(KvasirError(Reason.INTERNAL, "no"))
    assert (await anext(stream)).token_ids == (1,)
    with pytest.raises(KvasirError):
        await anext(stream)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_an_end_without_tokens_is_an_event() -> None:
    stream = Closings().stream()
    stream.put(TokenEvent((), FinishReason.STOP))
    assert (await anext(stream)).finish_reason is FinishReason.STOP


async def test_only_a_stream_that_still_runs_is_cancelled() -> None:
    closings = Closings()
    stream = closings.stream()
    stream.close()
    del stream
    assert (closings.num_closed, closings.num_dropped) == (1, 0)
    ended = closings.stream()
    ended.put(TokenEvent((1,), FinishReason.LENGTH))
    await ended.aclose()
    del ended
    assert (closings.num_closed, closings.num_dropped) == (1, 0)
    dropped = closings.stream()
    del dropped
    assert (closings.num_closed, closings.num_dropped) == (1, 1)


@given(
    first=st.sets(st.integers(0, 5)),
    flips=st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=30),
)
def test_a_watch_tells_net_changes_whenever_it_is_read(
    first: set[int], flips: list[tuple[int, bool]]
) -> None:
    """Each flip stores or removes a block; the consumer reads at some of them."""

    async def run() -> None:
        held = {bytes([name]) for name in first}
        watch = BlockWatch(tuple(held), lambda _: None)
        known: set[bytes] = set()
        for number, is_read in flips:
            name = bytes([number])
            held ^= {name}
            change = BlockChange((name,), ()) if name in held else BlockChange((), (name,))
            watch.put(change)
            if is_read and (watch._stored or watch._removed):
                told = await anext(watch)
                assert set(told.removed) <= known
                known = known - set(told.removed) | set(told.stored)
                assert known == held
        assert len(watch._stored) + len(watch._removed) <= 6

    asyncio.run(run())
