"""The scope of one request: admitted, bounded in time, endable from outside, counted when over.

    async with requests.scope(Work.GENERATE, request_id=..., timeout_ms=...) as scope:
        ...

Leaving the scope is the last thing a request does: what it held is freed by then. A deadline or a
drain cancels what runs inside and surfaces outside as a KvasirError.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from kvasir_proto.errors import KvasirError, Reason

from kvasir_engine.worker.metrics import WorkerMetrics
from kvasir_engine.worker.state import Work, WorkerState


@dataclass(slots=True)
class Scope:
    """What a request may know of its own time."""

    deadline_ms: int
    """Monotonic (time.monotonic), in ms."""
    outcome: str = ""
    """Finish reason, for the metric; the error's reason if it fails."""

    def left_ms(self) -> int:
        """Time until the deadline, at least 1."""
        return max(1, self.deadline_ms - int(time.monotonic() * 1000))


class InFlight:
    """Opens the scopes of one worker's requests."""

    def __init__(self, state: WorkerState, metrics: WorkerMetrics, *, timeout_ms_max: int) -> None:
        self.state = state
        self.metrics = metrics
        self.timeout_ms_max = timeout_ms_max

    @asynccontextmanager
    async def scope(self, work: Work, *, request_id: str, timeout_ms: int) -> AsyncIterator[Scope]:
        """Admits a request and bounds it; 0 ms means the worker's own bound.

        Raises:
            KvasirError: what `WorkerState.admit` raises; TIMEOUT; the error it was ended with.
        """
        timeout_ms = min(timeout_ms or self.timeout_ms_max, self.timeout_ms_max)
        timeout = asyncio.timeout(timeout_ms / 1000)
        ended_by: list[KvasirError] = []

        def end(error: KvasirError) -> None:
            if timeout.expired():
                return
            ended_by.append(error)
            timeout.reschedule(asyncio.get_running_loop().time())

        scope = Scope(deadline_ms=int(time.monotonic() * 1000) + timeout_ms)
        try:
            async with timeout:
                ticket = self.state.admit(work, request_id=request_id, end=end)
                try:
                    yield scope
                finally:
                    self.state.leave(ticket)
        except TimeoutError:
            if not timeout.expired():
                raise
            error = ended_by[0] if ended_by else _timed_out(timeout_ms)
            scope.outcome = error.reason.value
            raise error from None
        except KvasirError as error:
            scope.outcome = error.reason.value
            raise
        except (asyncio.CancelledError, GeneratorExit, ConnectionError):  # the client left
            scope.outcome = Reason.CANCELLED.value
            raise
        finally:
            self.metrics.requests.labels(work.value, scope.outcome or Reason.INTERNAL.value).inc()


def _timed_out(timeout_ms: int) -> KvasirError:
    return KvasirError(Reason.TIMEOUT, f"the request took longer than {timeout_ms} ms")
