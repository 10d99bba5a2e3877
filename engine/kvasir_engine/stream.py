"""What consumers of an engine hold: token streams and block watches, in the event loop's thread.

Invariant: the engine never waits for a consumer, and what waits for one is bounded: tokens of one
request are merged into one event (at most max_tokens of them), and block changes that cancel out
vanish (at most one entry per name that either side knows).
"""

import asyncio
from collections.abc import Callable
from typing import Self

from kvasir_proto.errors import KvasirError

from kvasir_engine.core.types import BlockChange, FinishReason, RequestTiming, TokenEvent


class TokenStream:
    """The events of one request: an async iterator that ends with the finish reason, or raises."""

    def __init__(
        self,
        request_id: str,
        *,
        on_close: Callable[[], None],
        on_drop: Callable[[], None],
    ) -> None:
        """Called before the end: `on_close` by `close`, `on_drop` by the collector."""
        self.request_id = request_id
        self._on_close = on_close
        self._on_drop = on_drop
        self._arrived = asyncio.Event()
        self._token_ids: list[int] = []
        self._finish_reason: FinishReason | None = None
        self._timing: RequestTiming | None = None
        self._error: KvasirError | None = None
        self._is_exhausted = False

    def put(self, event: TokenEvent) -> None:
        """The engine made tokens."""
        self._token_ids += event.token_ids
        self._finish_reason = event.finish_reason
        self._timing = event.timing or self._timing
        self._arrived.set()

    def fail(self, error: KvasirError) -> None:
        """The engine ended the request; tokens made before still come first."""
        self._error = error
        self._arrived.set()

    @property
    def is_ended(self) -> bool:
        """The engine is done with the request."""
        return self._finish_reason is not None or self._error is not None

    def close(self) -> None:
        """No more events are wanted: a request that still runs is cancelled. Idempotent."""
        self._is_exhausted = True
        if not self.is_ended:
            self._on_close()

    async def aclose(self) -> None:
        """As `close`, for contextlib.aclosing."""
        self.close()

    def __del__(self) -> None:
        if not (self._is_exhausted or self.is_ended):
            self._on_drop()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._is_exhausted:
            raise StopAsyncIteration
        await self._arrived.wait()
        if self._token_ids or self._finish_reason is not None:
            return self._take()
        self._is_exhausted = True
        assert self._error is not None, "woken for nothing"
        raise self._error

    def _take(self) -> TokenEvent:
        event = TokenEvent(tuple(self._token_ids), self._finish_reason, self._timing)
        self._token_ids = []
        self._timing = None
        self._is_exhausted = self._finish_reason is not None
        if self._error is None:
            self._arrived.clear()
        return event


class BlockWatch:
    """The blocks that an engine's prefix cache holds: a snapshot, then net changes."""

    def __init__(self, names: tuple[bytes, ...], on_close: Callable[["BlockWatch"], None]) -> None:
        self._on_close = on_close
        self._is_snapshot_due = True
        self._told: set[bytes] = set()
        self._stored = dict.fromkeys(names)
        self._removed: dict[bytes, None] = {}
        self._arrived = asyncio.Event()
        self._arrived.set()
        self._is_closed = False

    def put(self, change: BlockChange) -> None:
        """The cache changed: `removed` first, then `stored`."""
        for name in change.removed:
            self._stored.pop(name, None)
            if name in self._told:
                self._removed[name] = None
        for name in change.stored:
            self._removed.pop(name, None)
            if name not in self._told:
                self._stored[name] = None
        if self._stored or self._removed:
            self._arrived.set()

    def close(self) -> None:
        """Whoever waits stops. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._arrived.set()
            self._on_close(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> BlockChange:
        await self._arrived.wait()
        if self._is_closed:
            raise StopAsyncIteration
        change = BlockChange(tuple(self._stored), tuple(self._removed), self._is_snapshot_due)
        self._told.difference_update(self._removed)
        self._told.update(self._stored)
        self._stored, self._removed = {}, {}
        self._is_snapshot_due = False
        self._arrived.clear()
        return change
