"""Native work that is no step: pieces of it run in the step thread, one after every step.

Invariant: an errand's end is told once, and after that none of it runs. It never keeps a step
waiting for more than one piece; several errands take turns. Lives in two threads: added and
cancelled in the event loop's, run in the engine's, under whose lock the queue is touched.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterator

log = logging.getLogger(__name__)


class Errand:
    """Pieces of work, and who waits for their end."""

    def __init__(self, pieces: Iterator[None], loop: asyncio.AbstractEventLoop) -> None:
        self._pieces = pieces
        self._loop = loop
        self._ended: asyncio.Future[bool] = loop.create_future()
        self._is_cancelled = False

    async def wait(self) -> bool:
        """Waits for the end; False: a piece failed, or the engine stopped.

        A caller that is cancelled goes only when nothing runs any more.
        """
        is_cancelled = False
        while not self._ended.done():
            try:
                await asyncio.shield(self._ended)
            except asyncio.CancelledError:
                self._is_cancelled = is_cancelled = True
        if is_cancelled:
            raise asyncio.CancelledError
        return self._ended.result()

    def run_piece(self) -> bool:
        """Runs the next piece; False: there is none any more."""
        if self._is_cancelled:
            self.end(is_done=False)
            return False
        try:
            next(self._pieces)
        except StopIteration:
            self.end(is_done=True)
            return False
        except Exception:
            log.exception("work between steps failed")
            self.end(is_done=False)
            return False
        return True

    def end(self, *, is_done: bool) -> None:
        """Tells whoever waits."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._tell, is_done)

    def _tell(self, is_done: bool) -> None:
        if not self._ended.done():
            self._ended.set_result(is_done)


class Errands:
    """Those of one engine."""

    def __init__(self) -> None:
        self._queue: deque[Errand] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, errand: Errand) -> None:
        """Its pieces run from now on."""
        self._queue.append(errand)

    def take(self) -> Errand | None:
        """The one whose turn it is; put it back if it has more."""
        return self._queue.popleft() if self._queue else None

    def end_all(self) -> None:
        """None of them runs any more."""
        while self._queue:
            self._queue.popleft().end(is_done=False)
