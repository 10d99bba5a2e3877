"""The thread that computes step after step: schedule -> run -> postprocess.

Decides nothing about requests (the scheduler does) and nothing about numbers (the native model
does). Between steps it runs pieces of errands. Invariants: the scheduler is touched under one lock,
which is never held while a step runs, so callers do not wait for one; with nothing to compute the
thread sleeps; a step that fails ends its requests and nothing else.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvasir_engine.core.decisions import Decision, Ended, SessionHeld, SessionOpened, Step
from kvasir_engine.core.scheduler import Scheduler
from kvasir_engine.core.types import BlockChange, EngineCounters, EngineLoad, Refusal
from kvasir_engine.errands import Errand, Errands
from kvasir_engine.pace import Pace
from kvasir_engine.sessions import CLOSE_POLL_MS, SessionPool, Sessions
from kvasir_engine.step import StepRunner

log = logging.getLogger(__name__)

STEP_FAILURES_MAX = 3
"""Failures in a row after which the engine says that it is ill; a good step heals it."""

Deliver = Callable[[list[Decision], BlockChange | None], None]


def now_ms() -> float:
    """The engine's clock."""
    return time.monotonic() * 1000


class StepLoop:
    """Drives one scheduler."""

    def __init__(
        self, scheduler: Scheduler, runner: StepRunner, pool: SessionPool, deliver: Deliver
    ) -> None:
        """`deliver` takes what consumers are to know; called under the lock, it must not wait."""
        self.problem = ""
        """Why steps cannot be relied upon; empty: they can."""
        self.is_broken = False
        """The scheduler itself failed: nothing is served any more."""
        self._scheduler = scheduler
        self._runner = runner
        self._sessions = Sessions(pool)
        self._errands = Errands()
        self._deliver = deliver
        self._pace = Pace()
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._is_stopping = False
        self._num_steps = 0
        self._num_failures = 0
        self._num_failures_in_row = 0
        self._tokens_computed = 0

    def start(self) -> None:
        """Begins to compute."""
        self._thread.start()

    def stop(self) -> None:
        """Ends after the step that runs, and waits for that."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()
        with self._wake:
            self._errands.end_all()

    def add_errand(self, errand: Errand) -> None:
        """Its pieces run between steps from now on."""
        with self._wake:
            if self._is_stopping or self.is_broken:
                errand.end(is_done=False)
                return
            self._errands.add(errand)
            self._wake.notify()

    @contextmanager
    def changing(self) -> Iterator[Scheduler]:
        """The scheduler, to be told something; what it decides is carried out, and work resumes."""
        with self._wake:
            try:
                yield self._scheduler
            finally:
                self._carry_out()
                self._wake.notify()

    @contextmanager
    def reading(self) -> Iterator[Scheduler]:
        """The scheduler, to be asked something."""
        with self._wake:
            yield self._scheduler

    def let_go(self, request_id: str) -> bool:
        """The blocks of a prefill-only request are not needed any more. False: not yet free."""
        with self.changing() as scheduler:
            if not self._sessions.let_go(request_id):
                scheduler.cancel(request_id, now_ms=now_ms())
                self._carry_out()
            self._free_closed()
            is_over = self._is_stopping or self.is_broken
            return is_over or not scheduler.is_computed(request_id)

    def load(self) -> EngineLoad:
        """How busy it is, and how fast."""
        with self._wake:
            roster = self._scheduler.roster
            unfilled = [*roster.waiting, *(s for s in roster.running if s.num_pending > 1)]
            return EngineLoad(
                num_waiting=len(unfilled),
                num_running=roster.num_placed + self._sessions.num_held,
                num_reserved=roster.num_reserved,
                num_handoffs=self._sessions.num_held,
                prefill_tokens_queued=sum(sequence.num_pending for sequence in unfilled),
                blocks_total=roster.blocks.num_blocks,
                blocks_free=roster.blocks.num_available,
                prefill_us_per_token=self._pace.prefill_us_per_token,
                decode_ms_per_step=self._pace.decode_ms_per_step,
            )

    def counters(self) -> EngineCounters:
        """Totals since the start."""
        roster = self._scheduler.roster
        return EngineCounters(
            num_steps=self._num_steps,
            tokens_computed=self._tokens_computed,
            tokens_generated=roster.tokens_generated,
            tokens_cached=roster.tokens_cached,
            num_preemptions=roster.num_preemptions,
            num_step_failures=self._num_failures,
            num_requests_ended=roster.num_ended,
        )

    def _serve(self) -> None:
        try:
            while not self._is_stopping:
                step = self._next_step()
                if step is not None:
                    self._run(step)
                self._run_errand()
        except Exception:
            log.exception("the scheduler failed: this engine serves nothing any more")
            with self._wake:
                self.is_broken = True
                self.problem = "the scheduler failed, see the log"
                self._errands.end_all()
                left = self._scheduler.roster.sequences.values()
                self._deliver([Ended(s.request_id, Refusal.FAILED, s.arrival) for s in left], None)

    def _next_step(self) -> Step | None:
        """The next step; None after a sleep, since something may have changed."""
        with self._wake:
            self._free_closed()
            step = self._scheduler.schedule(now_ms=now_ms())
            self._carry_out()
            if step is None and not self._is_stopping and not self._errands:
                self._wake.wait(self._sleep_s())
        return step

    def _run_errand(self) -> None:
        """A piece of one errand; the others have their turn after the next steps."""
        with self._wake:
            errand = self._errands.take()
        if errand is not None and errand.run_piece():
            with self._wake:
                self._errands.add(errand)

    def _sleep_s(self) -> float | None:
        """Until a session may be closed or a deadline passes; else until someone notifies."""
        if self._sessions.is_closing:
            return CLOSE_POLL_MS / 1000
        wakeup_ms = self._scheduler.wakeup_ms()
        return None if wakeup_ms is None else max(0.0, wakeup_ms - now_ms()) / 1000

    def _run(self, step: Step) -> None:
        started_ms = now_ms()
        try:
            token_ids = self._runner.run(step)
        except Exception as error:
            log.exception("a step of %d tokens failed", step.num_tokens)
            self._note_failure(step, error)
            return
        with self._wake:
            self._num_steps += 1
            self._tokens_computed += step.num_tokens
            self._num_failures_in_row = 0
            self.problem = ""
            self._pace.note(step, now_ms() - started_ms)
            self._scheduler.complete(step, token_ids, now_ms=now_ms())
            self._carry_out()

    def _note_failure(self, step: Step, error: Exception) -> None:
        with self._wake:
            self._num_failures += 1
            self._num_failures_in_row += 1
            if self._num_failures_in_row >= STEP_FAILURES_MAX:
                self.problem = f"{self._num_failures_in_row} steps in a row failed: {error}"
            self._scheduler.fail(step, now_ms=now_ms())
            self._carry_out()

    def _carry_out(self) -> None:
        """Does what was decided: sessions here, the rest at the consumers."""
        outward: list[Decision] = []
        while decisions := self._scheduler.take_decisions():
            for decision in decisions:
                match decision:
                    case SessionOpened():
                        self._open_session(decision)
                    case SessionHeld():
                        self._sessions.hold(decision)
                    case _:
                        outward.append(decision)
        change = self._scheduler.blocks.take_changes()
        if outward or change is not None:
            self._deliver(outward, change)

    def _open_session(self, decision: SessionOpened) -> None:
        if not self._sessions.open(decision):
            log.warning("data-plane session %d is in use already", decision.session_id)
            self._scheduler.cancel(decision.request_id, Refusal.FAILED, now_ms=now_ms())

    def _free_closed(self) -> None:
        for request_id in self._sessions.closed():
            self._scheduler.free_held(request_id)
