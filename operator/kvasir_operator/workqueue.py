"""A queue of objects to reconcile: each at most once, never two at a time for one object.

Its length is bounded by the number of objects, because a key that waits is not added again.
Failures back off exponentially per key.
"""

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress

from kvasir_operator.core.manifests import Ref

BACKOFF_MS_MIN = 500
BACKOFF_MS_MAX = 60_000


class WorkQueue:
    """Keys in order of arrival; `get` waits, `done` must follow each `get`."""

    def __init__(
        self,
        *,
        on_depth: Callable[[int], None] = lambda _: None,
        on_wait: Callable[[float], None] = lambda _: None,
    ) -> None:
        """`on_wait` is told how long each key has waited, in seconds."""
        self._ready: asyncio.Queue[Ref] = asyncio.Queue()  # bounded: holds each key once
        self._waiting: dict[Ref, float] = {}  # since when
        self._on_wait = on_wait
        self._running: set[Ref] = set()
        self._timers: dict[Ref, asyncio.TimerHandle] = {}
        self._failures: dict[Ref, int] = {}
        self._on_depth = on_depth

    def add(self, key: Ref) -> None:
        """Reconcile the object soon."""
        if key in self._waiting:
            return
        self._waiting[key] = time.monotonic()
        if key not in self._running:
            self._ready.put_nowait(key)
        self._on_depth(len(self._waiting))

    def add_after(self, key: Ref, delay_ms: int) -> None:
        """Reconcile the object after a delay; the earliest of several times counts."""
        loop = asyncio.get_running_loop()
        at_s = loop.time() + delay_ms / 1000
        timer = self._timers.get(key)
        if timer is not None and timer.when() <= at_s:
            return
        if timer is not None:
            timer.cancel()
        self._timers[key] = loop.call_at(at_s, self._fire, key)

    def _fire(self, key: Ref) -> None:
        self._timers.pop(key, None)
        self.add(key)

    async def get(self) -> Ref:
        """The next key; it is not handed out again before `done`."""
        key = await self._ready.get()
        self._on_wait(time.monotonic() - self._waiting.pop(key))
        self._running.add(key)
        self._on_depth(len(self._waiting))
        return key

    def done(self, key: Ref) -> None:
        """The reconcile of this key has ended; changes that arrived meanwhile follow."""
        self._running.discard(key)
        if key in self._waiting:
            self._ready.put_nowait(key)

    def succeeded(self, key: Ref) -> None:
        """Forget earlier failures of this key."""
        self._failures.pop(key, None)

    def failed(self, key: Ref) -> int:
        """Try again later; the delay in milliseconds, up to a quarter more by chance."""
        count = self._failures.get(key, 0)
        self._failures[key] = count + 1
        limit_ms = min(BACKOFF_MS_MIN << min(count, 16), BACKOFF_MS_MAX)
        delay_ms = limit_ms + random.randrange(limit_ms // 4)
        self.add_after(key, delay_ms)
        return delay_ms

    def forget(self, key: Ref) -> None:
        """The object is gone."""
        self._failures.pop(key, None)
        with suppress(KeyError):
            self._timers.pop(key).cancel()
