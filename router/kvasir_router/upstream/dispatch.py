"""Brings one request to its end, over as many workers as it takes.

    1. route         the core picks workers, or refuses
    2. stream        frames go to the sink as they come
    3. after failure another pair of workers; once output has begun, from the tokens already sent

Invariants: the sink sees every byte once and in order; a request ends by DONE, by one KvasirError
or by cancellation; whoever leaves early closes the worker's connection.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import replace

from kvasir_kvstore.core import block
from kvasir_proto.errors import PEER_PARAM, KvasirError, Reason
from kvasir_proto.frames import Frame, FrameKind
from kvasir_proto.v1 import common_pb2, worker_pb2

from kvasir_router.core.blended import blended_of
from kvasir_router.core.choose import Rejected, RejectReason, Route, excluding, pick
from kvasir_router.core.fleet import Blended, FleetView, Request
from kvasir_router.core.rebalance import hand_back
from kvasir_router.membership.fleet import Fleet, now_ms
from kvasir_router.metrics import RouterMetrics
from kvasir_router.settings import RouterSettings
from kvasir_router.telemetry import Telemetry
from kvasir_router.upstream.account import accounted, first_token
from kvasir_router.upstream.call import Call, Progress, Sink, generate_request
from kvasir_router.upstream.client import Patience, WorkerClient, WorkerLostError
from kvasir_router.upstream.moves import Moves
from kvasir_router.upstream.retry import REFUSALS, Attempts, after_failure, last_word

log = logging.getLogger(__name__)

RETRY_PAUSE_MS = 100
"""Before going back to a worker that failed, for want of another; doubles each time."""

LOSS_CHECK_MS = 500
"""How often a request looks whether its workers are still there."""

REASON_OF = {
    RejectReason.NO_DECODE_WORKER: Reason.NO_WORKER,
    RejectReason.NO_MEMORY: Reason.CONTEXT_LENGTH,
    RejectReason.NO_TIME: Reason.OVERLOADED,
}

Choose = Callable[[FleetView, Request, int], Route | Rejected]


def pick_now(view: FleetView, request: Request, now_ms: int) -> Route | Rejected:
    """The core's rule."""
    return pick(view, request, now_ms=now_ms)


class Dispatcher:
    """Requests in flight, and the way to the workers."""

    def __init__(
        self,
        settings: RouterSettings,
        fleet: Fleet,
        client: WorkerClient,
        metrics: RouterMetrics,
        *,
        choose: Choose = pick_now,
    ) -> None:
        """`choose`: another policy's rule, for comparisons."""
        self._settings, self._choose = settings, choose
        self._fleet, self._client, self._metrics = fleet, client, metrics
        self.moves = Moves(fleet, metrics)
        self.telemetry = Telemetry(tpot_slo_ms=settings.tpot_slo_ms)
        self._in_flight = 0

    async def run(self, call: Call, sink: Sink, progress: Progress) -> worker_pb2.GenerateChunk:
        """Serves a call. The result holds finish reason, usage and stats.

        Raises:
            KvasirError: nobody could; the sink may have part of the output.
        """
        request = self.describe(call)
        self._fleet.observe(request)
        with self.telemetry.watched(call, progress), self._admitted():
            try:
                async with asyncio.timeout((call.deadline_ms - now_ms()) / 1_000):
                    done = await self._attempt_all(call, request, sink, progress)
            except TimeoutError:
                raise KvasirError(Reason.TIMEOUT, "the request's deadline has passed") from None
            finally:
                self.moves.forget(call.request_id)
        if done.finish_reason == common_pb2.FINISH_REASON_STOP:
            self._fleet.view().output.observe(done.usage.completion_tokens)
        self._metrics.served(call, progress)
        self.telemetry.served(call, progress, done)
        return done

    def describe(self, call: Call) -> Request:
        """What the core wants to know of a call."""
        view = self._fleet.view()
        root = block.root(self._fleet.fingerprint or b"", call.tenant_salt)
        names = tuple(block.chain(root, call.token_ids, view.block_tokens))
        short = b"" if names else b"".join(t.to_bytes(4, "little") for t in call.token_ids)
        return Request(
            request_id=call.request_id,
            num_tokens=len(call.token_ids),
            names=names,
            short_key=block.child(root, short),
            max_tokens=call.sampling.max_tokens,
            ttft_slo_ms=call.ttft_slo_ms,
            tpot_slo_ms=call.tpot_slo_ms,
            timeout_ms=max(call.deadline_ms - now_ms(), 0),
            blended=self._blended(call),
        )

    def _blended(self, call: Call) -> Blended | None:
        if call.chunks is None:
            return None
        return blended_of(
            call.token_ids,
            [(span.start, span.end) for span in call.chunks.spans],
            recompute_permille=call.chunks.recompute_permille,
            fingerprint=self._fleet.fingerprint or b"",
            tenant_salt=call.tenant_salt,
        )

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[None]:
        if self._in_flight >= self._settings.requests_in_flight_max:
            message = "the router has too many requests in flight"
            raise KvasirError(Reason.OVERLOADED, message, retry_after_ms=1_000)
        self._in_flight += 1
        self._metrics.in_flight.set(self._in_flight)
        try:
            yield
        finally:
            self._in_flight -= 1
            self._metrics.in_flight.set(self._in_flight)

    async def _attempt_all(
        self, call: Call, request: Request, sink: Sink, progress: Progress
    ) -> worker_pb2.GenerateChunk:
        tried, last = Attempts(self._settings.attempts_max), None
        while True:
            request = replace(request, waited_ms=now_ms() - call.arrived_ms)
            route, tried = await self._route(request, tried, last, progress)
            try:
                return await self._attempt(call, request, route, sink, progress)
            except KvasirError as failure:
                if failure.reason is Reason.BUSY and self.moves.take_moved(call.request_id):
                    tried = replace(tried, exclude=tried.exclude | {route.computes})
                    continue
                self._note(call, failure, progress)
                last = failure
            outcome = after_failure(tried, last, route, has_output=progress.has_output)
            if isinstance(outcome, KvasirError):
                if last.reason in REFUSALS:
                    self._metrics.handed_back.labels("refused").inc()
                raise outcome
            tried = outcome

    async def _route(
        self, request: Request, tried: Attempts, last: KvasirError | None, progress: Progress
    ) -> tuple[Route, Attempts]:
        """The next route. When only workers that have failed are left, they get another chance."""
        if tried.refused_by is not None:
            assert last is not None, "it was handed back by an error"
            return self._other_candidate(request, tried, last), tried
        asked = excluding(request, *tried.exclude)
        if tried.exclude and isinstance(self.pick(asked), Rejected):
            await asyncio.sleep(RETRY_PAUSE_MS * 2**tried.num_failed / 1_000)
            tried, asked = replace(tried, exclude=frozenset()), request
        decision = await self.decide(asked, has_output=progress.has_output)
        if isinstance(decision, Rejected):
            self._metrics.rejected(decision)
            raise last or error_of(decision)
        self._metrics.routed(decision)
        return decision, tried

    def _other_candidate(self, request: Request, tried: Attempts, last: KvasirError) -> Route:
        """Where a request goes that was handed back, if that is in time; else its client hears."""
        assert tried.refused_by is not None
        decision = hand_back(
            self._fleet.view(),
            excluding(request, *tried.exclude),
            refused_by=tried.refused_by,
            now_ms=now_ms(),
        )
        if isinstance(decision, Rejected):
            self._metrics.rejected(decision)
            self._metrics.handed_back.labels("refused").inc()
            raise last_word(last)
        self._metrics.routed(decision)
        self._metrics.handed_back.labels("forwarded").inc()
        return decision

    def pick(self, request: Request) -> Route | Rejected:
        """The decision as of now."""
        return self._choose(self._fleet.view(), request, now_ms())

    async def decide(self, request: Request, *, has_output: bool = False) -> Route | Rejected:
        """The decision; while all workers are away, it waits for one."""
        decision = self.pick(request)
        if isinstance(decision, Rejected) and decision.reason is RejectReason.NO_DECODE_WORKER:
            await self._wait_for_worker(has_output=has_output)
            decision = self.pick(request)
        return decision

    async def _wait_for_worker(self, *, has_output: bool) -> None:
        """Until a worker can decode; longer for a client that has half an answer."""
        settings = self._settings
        wait_ms = settings.stall_timeout_ms if has_output else settings.worker_wait_ms
        if not self._fleet.members():
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_ms / 1_000):
                while not any(w.can_decode for w in self._fleet.view().workers.values()):
                    await self._fleet.changed()

    async def _attempt(
        self, call: Call, request: Request, route: Route, sink: Sink, progress: Progress
    ) -> worker_pb2.GenerateChunk:
        progress.num_attempts += 1
        if not progress.has_output:
            progress.sent_ms = now_ms()
        with (
            self.moves.waiting(request, route),
            accounted(self._fleet, request, route),
            self._watched(route, progress) as lost,
        ):
            async with contextlib.aclosing(self._frames(call, route, progress, lost)) as batches:
                async for frames in batches:
                    is_done = bool(frames) and frames[-1].kind is FrameKind.DONE
                    tokens = frames[:-1] if is_done else frames
                    await self._forward(tokens, call, route, sink, progress)
                    if is_done:
                        return _finished(frames[-1])
        raise AssertionError("a stream ends by DONE or by an error")

    async def _forward(
        self, frames: Sequence[Frame], call: Call, route: Route, sink: Sink, progress: Progress
    ) -> None:
        if not frames:
            return
        is_first, at_ms = not progress.has_output, now_ms()
        for frame in frames:
            progress.add(frame, now_ms=at_ms)
        if is_first:
            progress.route = route
            self.moves.begun(call.request_id)
            took_ms = None if call.chunks else at_ms - progress.sent_ms
            first_token(self._fleet, route, call.request_id, took_ms=took_ms)
            await sink.begin(route)
        payloads = [frame.payload for frame in frames if frame.payload]
        if payloads:
            await sink.send(payloads)

    def _frames(
        self, call: Call, route: Route, progress: Progress, lost: "asyncio.Future[KvasirError]"
    ) -> AsyncGenerator[list[Frame], None]:
        peer = self._fleet.address(route.prefill) if route.prefill else None
        body = generate_request(call, progress, peer, now_ms=now_ms())
        patience = Patience(
            first_frame_ms=self._settings.first_token_timeout_ms,
            next_frame_ms=self._settings.stall_timeout_ms,
            lost_ms=self._settings.lost_timeout_ms,
        )
        return self._client.frames(self._fleet.address(route.decode), body, patience, lost)

    @contextlib.contextmanager
    def _watched(self, route: Route, progress: Progress) -> Iterator["asyncio.Future[KvasirError]"]:
        """Done when a worker of the route is lost while the stream needs it.

        A stopped machine resets no connection: only its events tell.
        """
        watch = asyncio.create_task(self._loss(route, progress))
        try:
            yield watch
        finally:
            watch.cancel()

    async def _loss(self, route: Route, progress: Progress) -> KvasirError:
        while True:
            await asyncio.sleep(LOSS_CHECK_MS / 1_000)
            if self._fleet.is_lost(route.decode):
                return WorkerLostError(f"{route.decode} is unreachable")
            prefill = None if progress.has_output else route.prefill
            if prefill and self._fleet.is_lost(prefill):
                message = f"prefill worker {prefill} is unreachable"
                return KvasirError(Reason.NO_WORKER, message, param=PEER_PARAM)

    def _note(self, call: Call, failure: KvasirError, progress: Progress) -> None:
        self._metrics.failed_attempt(failure, continued=progress.has_output)
        progress.num_continued += progress.has_output
        progress.num_refused += failure.reason in REFUSALS
        log.warning(
            "request %s: attempt %d failed (%s): %s",
            call.request_id,
            progress.num_attempts,
            failure.reason,
            failure.message,
        )


def error_of(rejected: Rejected) -> KvasirError:
    """A refusal of the core, as the client is told."""
    return KvasirError(
        REASON_OF[rejected.reason], rejected.message, retry_after_ms=rejected.retry_after_ms
    )


def _finished(frame: Frame) -> worker_pb2.GenerateChunk:
    done = worker_pb2.GenerateChunk.FromString(frame.payload)
    if done.finish_reason in (
        common_pb2.FINISH_REASON_CANCELLED,
        common_pb2.FINISH_REASON_ERROR,
    ):
        raise KvasirError(Reason.INTERNAL, "the worker ended the request early")
    return done
