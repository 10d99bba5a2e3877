"""The queue of prompts in front of the engine: who is computed next, and who is handed back.

A request that waits here holds tokens and a deadline, no KV memory, neither on this worker nor on
the one that decodes it. Its turn comes when the engine is about to run out of prompt tokens: until
then the order is open, and whoever cannot be served in time can be handed back. The order itself
is `kvasir_engine.core.admission`'s. Lives in the event loop's thread.
"""

import asyncio
import itertools
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import worker_pb2

from kvasir_engine.core.types import EngineLoad

CALL_GRACE_MS = 100.0
"""A request whose turn has come counts as work ahead this long; after it its decode worker waits
for memory, and others need not wait for that."""
PAUSE_S_MIN = 0.002
PAUSE_S_MAX = 0.05


def _now_ms() -> float:
    return time.monotonic() * 1000


@dataclass(frozen=True, slots=True)
class Asked:
    """What of a request matters to its place in the queue."""

    request_id: str
    num_tokens: int
    """To be computed here, as far as is known."""
    deadline_ms: float | None
    may_move: bool


def asked_of(
    message: worker_pb2.GenerateRequest | worker_pb2.PrefillRequest, *, num_tokens: int
) -> Asked:
    """A request of which `num_tokens` are to be computed, as the queue sees it."""
    terms = message.terms
    return Asked(
        request_id=message.request_id,
        num_tokens=num_tokens,
        deadline_ms=_now_ms() + terms.ttft_left_ms if terms.ttft_left_ms else None,
        may_move=terms.may_move,
    )


class Turn:
    """A request whose turn has come."""

    def __init__(self, asked: Asked, *, waited_ms: float, on_entered: Callable[[], None]) -> None:
        self.asked = asked
        self.waited_ms = waited_ms
        self.called_ms = _now_ms()
        self._on_entered = on_entered

    def entered(self) -> None:
        """The engine has it: from now on it counts in the engine's load."""
        self._on_entered()


@dataclass(frozen=True, slots=True)
class _Place:
    asked: Asked
    came_ms: float
    turn: "asyncio.Future[Turn]"


class Admission:
    """One worker's queue."""

    def __init__(self, engine_load: Callable[[], EngineLoad], *, lookahead_tokens: int) -> None:
        """`lookahead_tokens`: prompt tokens that the engine has in hand before it gets more."""
        self._engine_load = engine_load
        self._lookahead_tokens = lookahead_tokens
        self._waiting: OrderedDict[int, _Place] = OrderedDict()
        self._called: dict[int, Turn] = {}
        self._keys = itertools.count(1)
        self._timer: asyncio.TimerHandle | None = None

    @property
    def num_waiting(self) -> int:
        """Requests that the engine does not have yet."""
        return len(self._waiting) + len(self._called)

    @property
    def tokens_waiting(self) -> int:
        """Their tokens."""
        waiting = sum(place.asked.num_tokens for place in self._waiting.values())
        return waiting + sum(turn.asked.num_tokens for turn in self._called.values())

    @asynccontextmanager
    async def turn(self, asked: Asked) -> AsyncIterator[Turn]:
        """Waits for this request's turn.

        Raises:
            KvasirError: BUSY: it cannot be served in time here, or was handed back.
        """
        key = next(self._keys)
        self._refuse_if_late(asked)
        turn: asyncio.Future[Turn] = asyncio.get_running_loop().create_future()
        self._waiting[key] = _Place(asked, _now_ms(), turn)
        try:
            self._advance()
            yield await turn
        finally:
            self._waiting.pop(key, None)
            self._forget(key)

    def hand_back(self, request_ids: Iterable[str]) -> int:
        """Ends those of these requests that still wait; returns how many did."""
        wanted = frozenset(request_ids)
        found = [k for k, place in self._waiting.items() if place.asked.request_id in wanted]
        for key in found:
            place = self._waiting.pop(key)
            if not place.turn.done():
                place.turn.set_exception(_busy(0))
        return len(found)

    def _refuse_if_late(self, asked: Asked) -> None:
        load = self._engine_load()
        tokens_ahead = load.prefill_tokens_queued + self.tokens_waiting
        if asked.deadline_ms is None or not tokens_ahead:
            return
        work_ms = (tokens_ahead + asked.num_tokens) * load.prefill_us_per_token / 1000
        late_ms = _now_ms() + work_ms - asked.deadline_ms
        if late_ms > 0:
            raise _busy(int(late_ms) + 1)

    def _advance(self) -> None:
        """Calls those whose turn it is, and looks again when the next one may be due."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            load = self._engine_load()
            excess_tokens = self._tokens_ahead(load) - self._lookahead_tokens
            if excess_tokens >= 0:
                pause_s = excess_tokens * load.prefill_us_per_token / 1e6
                pause_s = min(max(pause_s, PAUSE_S_MIN), PAUSE_S_MAX)
                self._timer = asyncio.get_running_loop().call_later(pause_s, self._advance)
                return
            self._call_next()

    def _tokens_ahead(self, load: EngineLoad) -> int:
        """What the engine computes before it needs more, with those who are on their way to it."""
        since_ms = _now_ms() - CALL_GRACE_MS
        called = (t.asked.num_tokens for t in self._called.values() if t.called_ms > since_ms)
        return load.prefill_tokens_queued + sum(called)

    def _call_next(self) -> None:
        key, place = self._waiting.popitem(last=False)
        if place.turn.done():  # its task was cancelled and has yet to leave
            return
        waited_ms = _now_ms() - place.came_ms
        turn = Turn(place.asked, waited_ms=waited_ms, on_entered=lambda: self._forget(key))
        self._called[key] = turn
        place.turn.set_result(turn)

    def _forget(self, key: int) -> None:
        if self._called.pop(key, None) is not None:
            self._advance()


def _busy(retry_after_ms: int) -> KvasirError:
    message = "the prompt cannot be computed here in time"
    return KvasirError(Reason.BUSY, message, retry_after_ms=retry_after_ms)
