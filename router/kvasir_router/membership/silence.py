"""How long a peer may be silent before it is taken for dead.

A process that was itself held up has not read what came meanwhile, and would take every peer for
dead at once: a timer that goes off late is such a hold-up, and then the time begins anew, once for
each silence.
"""

import asyncio
from types import TracebackType

HELD_UP_S = 0.1
"""A timer so late tells of a hold-up of this process; on an idle loop it is a millisecond late."""


class Silence:
    """Around the reading of a stream: a silence of `limit_s` ends it with TimeoutError."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._is_over = self._was_held_up = False
        self._heard_s = 0.0
        self._due_s = 0.0

    def heard(self) -> None:
        """The peer has said something."""
        self._heard_s = self._loop.time()
        self._was_held_up = False

    async def __aenter__(self) -> "Silence":
        task = asyncio.current_task()
        assert task is not None
        self._task, self._num_cancelled = task, task.cancelling()
        self.heard()
        self._look_at(self._heard_s + self._limit_s)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        is_ours = self._is_over and self._task.uncancel() <= self._num_cancelled
        if is_ours and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def _look_at(self, due_s: float) -> None:
        self._due_s = due_s
        self._timer = self._loop.call_at(due_s, self._look)

    def _look(self) -> None:
        now_s = self._loop.time()
        if now_s - self._due_s > HELD_UP_S and not self._was_held_up:
            self._was_held_up = True
            self._look_at(now_s + self._limit_s)
        elif now_s < self._heard_s + self._limit_s:
            self._look_at(self._heard_s + self._limit_s)
        else:
            self._is_over = True
            self._task.cancel()
