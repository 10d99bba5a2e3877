"""A KV node's background work: what raises is told of and begun again, never lost in silence.

Decides how soon work that failed begins anew and for how long its failure is shown. What was being
done when it failed is left to the work itself.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

BACKOFF_S_MIN = 0.1
BACKOFF_S_MAX = 10.0
SHOWN_S = 30.0
"""Work that has run so long since it failed is taken for mended."""


class Upkeep:
    """The tasks that a node cannot be without, and those of them that failed lately."""

    def __init__(self, on_failed: Callable[[str], None]) -> None:
        """`on_failed`: told of the name of what failed, each time."""
        self._on_failed = on_failed
        self._failed: dict[str, tuple[float, str]] = {}

    def start(self, work: Callable[[], Awaitable[None]], *, name: str) -> asyncio.Task[None]:
        """Does work that has no end until the task is cancelled."""
        return asyncio.create_task(self._keep(work, name), name=name)

    def failed(self, name: str, error: Exception) -> None:
        """Tells of a failure. Belongs into the handler of the exception."""
        log.exception("%s failed", name)
        self._failed[name] = (time.monotonic(), f"{name} failed: {type(error).__name__}")
        self._on_failed(name)

    @property
    def problems(self) -> list[str]:
        """What failed lately."""
        shown_since_s = time.monotonic() - SHOWN_S
        return [problem for at_s, problem in self._failed.values() if at_s > shown_since_s]

    async def _keep(self, work: Callable[[], Awaitable[None]], name: str) -> None:
        backoff_s = BACKOFF_S_MIN
        while True:
            started_s = time.monotonic()
            try:
                await work()
            except Exception as error:  # noqa: BLE001 - logged; the node goes on
                self.failed(name, error)
            if time.monotonic() - started_s > SHOWN_S:
                backoff_s = BACKOFF_S_MIN
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_S_MAX)
