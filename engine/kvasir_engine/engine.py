"""The engine as its process sees it: requests in, token streams out, in one event loop.

Decides which reason a consumer is told; requests are the scheduler's choice, steps run in a
thread of their own. Invariants: no call waits for a step; a consumer gets its events in order, and
exactly one end; a stream that nobody holds any more is cancelled.
"""

import asyncio
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol, Self

from kvasir_kvstore._native import BlockPool
from kvasir_kvstore.core.block import BLOCK_TOKENS
from kvasir_proto.errors import KvasirError, Reason

from kvasir_engine.core.decisions import Decision, Emitted, Ended, Granted
from kvasir_engine.core.scheduler import Scheduler
from kvasir_engine.core.sequence import Phase, SequenceState
from kvasir_engine.core.types import (
    BlockChange,
    EngineCounters,
    EngineLimits,
    EngineLoad,
    EngineRequest,
    Refusal,
    RefusedError,
    Reservation,
    TokenEvent,
)
from kvasir_engine.errands import Errand
from kvasir_engine.loop import StepLoop, now_ms
from kvasir_engine.sessions import CLOSE_POLL_MS
from kvasir_engine.step import ForwardModel, StepRunner
from kvasir_engine.stream import BlockWatch, TokenStream

RETRY_AFTER_MS_MIN = 100
RETRY_AFTER_MS_MAX = 10_000
REASONS = {
    Refusal.INVALID: Reason.INVALID_REQUEST,
    Refusal.NEVER_FITS: Reason.CONTEXT_LENGTH,
    Refusal.QUEUE_FULL: Reason.BUSY,
    Refusal.DUPLICATE: Reason.INVALID_REQUEST,
    Refusal.EXPIRED: Reason.TIMEOUT,
    Refusal.CANCELLED: Reason.CANCELLED,
    Refusal.FAILED: Reason.INTERNAL,
}
MESSAGES = {
    Refusal.EXPIRED: "the deadline has passed",
    Refusal.CANCELLED: "the request was cancelled",
    Refusal.FAILED: "a step of the engine failed",
}


class EngineModel(Protocol):
    """`kvasir_engine.model.LoadedModel`, as far as the engine needs it."""

    @property
    def native(self) -> ForwardModel:
        """What computes."""

    @property
    def fingerprint(self) -> bytes:
        """The root of block names."""


class Engine:
    """Serves requests on one model. All methods are for the thread of one event loop."""

    def __init__(
        self,
        model: EngineModel,
        pool: BlockPool,
        *,
        limits: EngineLimits,
        eos_token_ids: Iterable[int],
    ) -> None:
        self.limits = limits
        self.eos_token_ids = tuple(eos_token_ids)
        model.native.attach_pool(pool.data, pool.ready, pool.progress)
        scheduler = Scheduler(
            limits, pool, fingerprint=model.fingerprint, eos_token_ids=self.eos_token_ids
        )
        runner = StepRunner(
            model.native, vocab_size=limits.vocab_size, num_sampled_max=limits.num_running_max
        )
        self._pool = pool
        self._prepare = scheduler.prepare  # reads nothing that changes: needs no lock
        self._steps = StepLoop(scheduler, runner, pool, self._deliver)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_stopped = False
        # By number of arrival: an id may come again while the end of its past life is on its way.
        self._streams: weakref.WeakValueDictionary[int, TokenStream] = weakref.WeakValueDictionary()
        self._grants: dict[int, asyncio.Future[Reservation]] = {}
        self._reasons: dict[int, Reason] = {}
        self._watches: set[BlockWatch] = set()

    # Life

    def start(self) -> None:
        """Begins to serve consumers in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._steps.start()

    async def stop(self) -> None:
        """Ends after the step that runs; requests still open end as cancelled. Idempotent."""
        self._is_stopped = True
        await asyncio.to_thread(self._steps.stop)
        for stream in list(self._streams.values()):
            stream.fail(_error(Refusal.CANCELLED, Reason.CANCELLED))
        for granted in self._grants.values():
            if not granted.done():
                granted.set_exception(_error(Refusal.CANCELLED, Reason.CANCELLED))
        for watch in list(self._watches):
            watch.close()

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def problem(self) -> str:
        """Why the engine cannot be relied upon; empty: it can."""
        return self._steps.problem

    # Requests

    def generate(self, request: EngineRequest) -> TokenStream:
        """Takes a request; its stream raises KvasirError if the request ends early.

        The engine holds the stream weakly: when its consumer drops it, the request is cancelled.

        Raises:
            KvasirError: INVALID_REQUEST, CONTEXT_LENGTH, BUSY or TIMEOUT: it was not taken.
        """
        arrival = self._submit(request, wants_reservation=False)
        return self._new_stream(request.request_id, arrival)

    async def reserve(self, request: EngineRequest) -> Reservation:
        """Waits in the queue until the request has memory; activate or release it afterwards.

        Raises:
            KvasirError: INVALID_REQUEST, CONTEXT_LENGTH, BUSY or TIMEOUT: nothing is reserved.
        """
        arrival = self._submit(request, wants_reservation=True)
        granted = self._running_loop().create_future()
        self._grants[arrival] = granted
        try:
            reservation: Reservation = await granted
        except asyncio.CancelledError:
            await self.release(request.request_id)
            raise
        finally:
            self._grants.pop(arrival, None)
        return reservation

    def activate(
        self, request_id: str, *, computed_tokens: int, extra_tokens: Sequence[int] = ()
    ) -> TokenStream:
        """Lets a reservation run.

        The KV of its leading `computed_tokens` is in its blocks (as far as those are whole), and
        nobody writes to them any more; the rest is computed here. `extra_tokens` follow the known
        tokens: they were sampled elsewhere, and are part of the stream.

        Raises:
            KvasirError: cancelled, expired or not reserved; the reservation is gone. DRAINING: the
                engine has stopped, and the reservation is still to be released.
        """
        self._check_serves()
        with self._refusals(), self._steps.changing() as scheduler:
            sequence = scheduler.roster.reserved(request_id)
            num_whole = self._num_whole(sequence)
            scheduler.activate(
                request_id,
                computed_tokens=min(computed_tokens, num_whole * BLOCK_TOKENS),
                extra_tokens=extra_tokens,
                now_ms=now_ms(),
            )
        return self._new_stream(request_id, sequence.arrival)

    async def release(self, request_id: str) -> None:
        """Gives up a reservation to which nobody writes any more. Idempotent."""
        with self._steps.changing() as scheduler:
            scheduler.release(request_id, now_ms=now_ms())

    def cancel(self, request_id: str, reason: Reason = Reason.CANCELLED) -> None:
        """Ends a request in any phase; its stream raises KvasirError(reason). Idempotent.

        A reservation stays until its owner releases or activates it (which then fails).
        """
        with self._steps.changing() as scheduler:
            sequence = scheduler.roster.sequences.get(request_id)
            if sequence is not None:
                if sequence.phase is not Phase.HELD:  # else its end has been told
                    self._reasons.setdefault(sequence.arrival, reason)
                scheduler.cancel(request_id, now_ms=now_ms())

    async def finish_handoff(self, request_id: str) -> None:
        """Lets the blocks of a prefill-only request go, pulled or not. Idempotent.

        Returns when no sender reads them any more.
        """
        while not self._steps.let_go(request_id):  # noqa: ASYNC110
            await asyncio.sleep(CLOSE_POLL_MS / 1000)  # senders tell nobody when they stop

    # Work beside requests

    async def run_between_steps(self, pieces: Iterator[None]) -> bool:
        """Runs pieces of native work in the engine's thread; False: one failed, or it has stopped.

        When this returns, or raises because its caller is cancelled, none of them runs any more.
        """
        errand = Errand(pieces, self._running_loop())
        self._steps.add_errand(errand)
        return await errand.wait()

    def borrow(self, names: Iterable[bytes]) -> tuple[int, ...]:
        """Blocks of the longest leading run of names that is held; they stay until given back."""
        with self._steps.changing() as scheduler:
            blocks = scheduler.blocks.match(names)
            scheduler.blocks.acquire(blocks)
        return tuple(blocks)

    def give_back(self, blocks: Sequence[int]) -> None:
        """Lets go of borrowed blocks, which nobody reads any more."""
        with self._steps.changing() as scheduler:
            scheduler.blocks.release(blocks)

    # What is known

    def load(self) -> EngineLoad:
        """How busy it is, and how fast."""
        return self._steps.load()

    def counters(self) -> EngineCounters:
        """Totals since the start."""
        return self._steps.counters()

    @property
    def num_requests_open(self) -> int:
        """Requests that hold, or wait for, anything."""
        with self._steps.reading() as scheduler:
            return len(scheduler.roster.sequences)

    def holds(self, names: Iterable[bytes]) -> list[bool]:
        """Which of these blocks are held whole."""
        with self._steps.reading() as scheduler:
            return [scheduler.blocks.holds(name) for name in names]

    def block_events(self) -> BlockWatch:
        """An async iterator over the prefix cache: a snapshot, then changes. Close it."""
        with self._steps.reading() as scheduler:
            watch = BlockWatch(scheduler.blocks.names(), self._watches.discard)
        self._watches.add(watch)
        return watch

    # Inside

    def _submit(self, request: EngineRequest, *, wants_reservation: bool) -> int:
        """Takes a request; its number."""
        self._check_serves()
        with self._refusals():
            sequence = self._prepare(request, wants_reservation=wants_reservation)
            with self._steps.changing() as scheduler:
                scheduler.submit(sequence, now_ms=now_ms())
        return sequence.arrival

    def _check_serves(self) -> None:
        if self._is_stopped or self._steps.is_broken:
            raise KvasirError(Reason.DRAINING, "the engine has stopped")

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """The core's refusals as errors of the protocol."""
        try:
            yield
        except RefusedError as refused:
            is_busy = refused.refusal is Refusal.QUEUE_FULL
            raise KvasirError(
                REASONS[refused.refusal],
                refused.message,
                param=refused.param,
                retry_after_ms=self._retry_after_ms() if is_busy else 0,
            ) from refused

    def _retry_after_ms(self) -> int:
        """About the time in which what is queued is computed."""
        load = self._steps.load()
        queued_ms = load.prefill_tokens_queued * load.prefill_us_per_token / 1000
        return int(min(max(queued_ms, RETRY_AFTER_MS_MIN), RETRY_AFTER_MS_MAX))

    def _num_whole(self, sequence: SequenceState) -> int:
        """Leading blocks of a reservation that are whole, whatever its owner believes."""
        is_whole = self._pool.ready[sequence.blocks.view()] == self._pool.num_layers
        return len(is_whole) if is_whole.all() else int(is_whole.argmin())

    def _new_stream(self, request_id: str, arrival: int) -> TokenStream:
        """Events come only after the caller has returned to the event loop."""
        stream = TokenStream(
            request_id,
            on_close=partial(self._cancel_arrival, request_id, arrival),
            on_drop=partial(self._cancel_dropped, request_id, arrival),
        )
        self._streams[arrival] = stream
        return stream

    def _cancel_arrival(self, request_id: str, arrival: int) -> None:
        with self._steps.reading() as scheduler:
            sequence = scheduler.roster.sequences.get(request_id)
        if sequence is not None and sequence.arrival == arrival:
            self.cancel(request_id)

    def _cancel_dropped(self, request_id: str, arrival: int) -> None:
        """The collector may run in any thread, under any lock: cancel later."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._cancel_arrival, request_id, arrival)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        assert self._loop is not None, "the engine is started first"
        return self._loop

    def _deliver(self, decisions: list[Decision], change: BlockChange | None) -> None:
        """Called in any thread: consumers live in the loop's, and get everything in order."""
        loop = self._running_loop()
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._hand_out, decisions, change)

    def _hand_out(self, decisions: list[Decision], change: BlockChange | None) -> None:
        for decision in decisions:
            match decision:
                case Emitted(_, event, arrival):
                    self._emit(arrival, event)
                case Granted(_, reservation, arrival):
                    self._grant(arrival, reservation)
                case Ended(_, refusal, arrival):
                    self._end(arrival, refusal)
        if change is not None:
            for watch in self._watches:
                watch.put(change)

    def _emit(self, arrival: int, event: TokenEvent) -> None:
        stream = self._streams.get(arrival)
        if stream is not None:
            stream.put(event)
        if event.finish_reason is not None:
            self._forget(arrival)

    def _grant(self, arrival: int, reservation: Reservation) -> None:
        granted = self._grants.get(arrival)
        if granted is not None and not granted.done():
            granted.set_result(reservation)

    def _end(self, arrival: int, refusal: Refusal) -> None:
        asked = self._reasons.get(arrival) if refusal is Refusal.CANCELLED else None
        error = _error(refusal, asked or REASONS[refusal])
        stream = self._streams.get(arrival)
        if stream is not None:
            stream.fail(error)
        granted = self._grants.get(arrival)
        if granted is not None and not granted.done():
            granted.set_exception(error)
        self._forget(arrival)

    def _forget(self, arrival: int) -> None:
        self._streams.pop(arrival, None)
        self._reasons.pop(arrival, None)


def _error(refusal: Refusal, reason: Reason) -> KvasirError:
    return KvasirError(reason, MESSAGES.get(refusal, "the request was refused"))
