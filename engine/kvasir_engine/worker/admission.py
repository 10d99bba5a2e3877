"""The queue of prompts in front of the engine: when whose turn is, and who is handed back.

A request that waits here holds tokens and a deadline, no KV memory, neither on this worker nor on
the one that decodes it. Its turn comes when the engine is about to run out of prompt tokens: until
then the order is open, and whoever cannot be served in time is given up at once. The order, and who
is given up, is `kvasir_engine.core.admission`'s choice. Lives in the event loop's thread.

Invariant: a request that waits is called, given up with BUSY, or leaves by its own task's end.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from kvasir_kvstore.core.block import BLOCK_TOKENS
from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import worker_pb2

from kvasir_engine.core.admission import AdmissionQueue, Dismissed, Waiting
from kvasir_engine.core.types import EngineLoad

CALL_GRACE_MS = 100.0
"""A request whose turn has come counts as work ahead this long; after it its decode worker waits
for memory, and others need not wait for that."""
PAUSE_S_MIN = 0.002
PAUSE_S_MAX = 0.05
RECALLED = "recalled"
"""Given up because a router asked for it; the other reasons are the queue's verdicts."""


def _now_ms() -> float:
    return time.monotonic() * 1000


@dataclass(frozen=True, slots=True)
class Asked:
    """What of a request matters to its place in the queue."""

    request_id: str
    tenant: bytes
    num_tokens: int
    names: tuple[bytes, ...]
    """Of its blocks, but for that of its last token: those held here need no computing."""
    ttft_left_ms: int
    """0: it has no objective, and is never given up."""
    priority: int
    weight: float
    may_move: bool


def asked_of(
    message: worker_pb2.GenerateRequest | worker_pb2.PrefillRequest,
    *,
    num_tokens: int,
    names: Iterable[bytes],
) -> Asked:
    """A request for the KV of `num_tokens`, as the queue sees it."""
    terms = message.terms
    return Asked(
        request_id=message.request_id,
        tenant=message.tenant_salt,
        num_tokens=num_tokens,
        names=tuple(names),
        ttft_left_ms=terms.ttft_left_ms,
        priority=terms.priority,
        weight=terms.tenant_weight or 1.0,
        may_move=terms.may_move,
    )


class Turn:
    """A request whose turn has come."""

    def __init__(
        self,
        *,
        num_tokens: int,
        waited_ms: float,
        on_entered: Callable[[], None],
        on_computed: Callable[[], None],
    ) -> None:
        self.num_tokens = num_tokens
        self.waited_ms = waited_ms
        self.called_ms = _now_ms()
        self._on_entered = on_entered
        self._on_computed = on_computed

    def entered(self) -> None:
        """The engine has it: from now on it counts in the engine's load."""
        self._on_entered()

    def part(self) -> "Turn":
        """The turn of a part of it that is computed first."""
        return Turn(
            num_tokens=0,
            waited_ms=self.waited_ms,
            on_entered=self._on_entered,
            on_computed=lambda: None,
        )

    def computed(self) -> None:
        """Its prompt is computed: its first token is there."""
        self._on_computed()


@dataclass(slots=True)
class _Place:
    asked: Asked
    came_ms: float
    turn: "asyncio.Future[Turn]"
    num_tokens: int = 0
    """Left to compute, as far as is known."""
    lacking: bytes | None = None
    """The first of its blocks that is not held."""


class Admission:
    """One worker's queue."""

    def __init__(
        self,
        engine_load: Callable[[], EngineLoad],
        *,
        lookahead_tokens: int,
        num_leading_held: Callable[[Sequence[bytes]], int],
        on_given_up: Callable[[str], None],
    ) -> None:
        """Makes an empty queue.

        Args:
            engine_load: the engine's load as it is now.
            lookahead_tokens: prompt tokens that the engine has in hand before it gets more.
            num_leading_held: how many of these blocks, from the first on, need no computing.
            on_given_up: told why, each time.
        """
        self.engine_load = engine_load
        self.lookahead_tokens = lookahead_tokens
        self._short_tokens_max = lookahead_tokens // 4
        self._num_leading_held = num_leading_held
        self._on_given_up = on_given_up
        self._queue = AdmissionQueue()
        self._places: dict[int, _Place] = {}
        self._lacking: dict[bytes, set[int]] = {}
        self._called: dict[int, Turn] = {}
        self._beside: dict[int, int] = {}  # tokens of short ones that passed a long one
        self._keys = itertools.count(1)
        self._timer: asyncio.TimerHandle | None = None

    @property
    def num_waiting(self) -> int:
        """Requests that the engine does not have yet."""
        return len(self._queue) + len(self._called)

    @property
    def tokens_waiting(self) -> int:
        """Their tokens."""
        return self._queue.tokens + sum(turn.num_tokens for turn in self._called.values())

    @asynccontextmanager
    async def turn(self, asked: Asked) -> AsyncIterator[Turn]:
        """Waits for this request's turn.

        Raises:
            KvasirError: BUSY: it cannot be served in time here, or was handed back.
        """
        key = next(self._keys)
        place = _Place(asked, _now_ms(), asyncio.get_running_loop().create_future())
        self._places[key] = place
        try:
            self._push(key, place)
            yield await place.turn
        finally:
            self._queue.remove(key)
            self._unlist(key)
            del self._places[key]
            self._beside.pop(key, None)
            self._leave(key)

    def hand_back(self, request_ids: Iterable[str]) -> int:
        """Gives up those of these requests that still wait; returns how many did."""
        wanted = frozenset(request_ids)
        found = [
            key
            for key, place in self._places.items()
            if key in self._queue and place.asked.request_id in wanted
        ]
        for key in found:
            self._queue.remove(key)
            self._give_up(key, RECALLED, retry_after_ms=0)
        return len(found)

    def blocks_stored(self, names: Iterable[bytes]) -> None:
        """These blocks are held now: whoever waits for one of them has less to compute."""
        keys = [key for name in names if name in self._lacking for key in self._lacking[name]]
        us_per_token = self.engine_load().prefill_us_per_token if keys else 0.0
        for key in keys:
            self._estimate(key)
            if key in self._queue:
                num_tokens = self._places[key].num_tokens
                compute_ms = num_tokens * us_per_token / 1000
                self._queue.update(key, compute_ms=compute_ms, tokens=num_tokens)

    def _estimate(self, key: int) -> None:
        self._unlist(key)
        place = self._places[key]
        names = place.asked.names
        num_held = self._num_leading_held(names)
        place.num_tokens = place.asked.num_tokens - num_held * BLOCK_TOKENS
        if num_held < len(names):
            place.lacking = names[num_held]
            self._lacking.setdefault(place.lacking, set()).add(key)

    def _unlist(self, key: int) -> None:
        name, self._places[key].lacking = self._places[key].lacking, None
        if name is not None:
            self._lacking[name].discard(key)
            if not self._lacking[name]:
                del self._lacking[name]

    def _push(self, key: int, place: _Place) -> None:
        load, now_ms = self.engine_load(), place.came_ms
        asked = place.asked
        self._estimate(key)
        waiting = Waiting(
            request_id=key,
            arrived_ms=now_ms,
            deadline_ms=now_ms + asked.ttft_left_ms,
            compute_ms=place.num_tokens * load.prefill_us_per_token / 1000,
            tokens=place.num_tokens,
            tenant=asked.tenant,
            weight=asked.weight,
            priority=asked.priority,
            may_move=asked.may_move,
            may_refuse=asked.ttft_left_ms > 0,
        )
        self._dismiss(self._queue.push(waiting, now_ms=now_ms, busy_ms=self._busy_ms(load)))
        self._advance()

    def _advance(self) -> None:
        """Calls those whose turn it is, and looks again when the next one may be due."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while len(self._queue):
            load = self.engine_load()
            excess_tokens = self._tokens_ahead(load) - self.lookahead_tokens
            if excess_tokens >= 0:
                self._call_short(load)
                self._look_again(excess_tokens * load.prefill_us_per_token / 1e6)
                return
            waiting, given_up = self._queue.pop(now_ms=_now_ms())
            self._dismiss(given_up)
            if waiting is not None:
                self._call(_key(waiting))

    def _call_short(self, load: EngineLoad) -> None:
        """Short prompts do not queue behind a long one: a few go beside it."""
        while (room := self._short_tokens_max - sum(self._beside.values())) > 0:
            waiting = self._queue.pop_short(
                now_ms=_now_ms(),
                busy_ms=self._busy_ms(load),
                tokens_max=min(room, self._short_tokens_max // 2),
            )
            if waiting is None:
                return
            key = _key(waiting)
            self._beside[key] = waiting.tokens
            self._call(key)

    def _look_again(self, in_s: float) -> None:
        load = self.engine_load()
        self._dismiss(self._queue.review(now_ms=_now_ms(), busy_ms=self._busy_ms(load)))
        pause_s = min(max(in_s, PAUSE_S_MIN), PAUSE_S_MAX)
        self._timer = asyncio.get_running_loop().call_later(pause_s, self._advance)

    def _tokens_ahead(self, load: EngineLoad) -> int:
        """What the engine computes before it needs more, with those who are on their way to it."""
        since_ms = _now_ms() - CALL_GRACE_MS
        called = (t.num_tokens for t in self._called.values() if t.called_ms > since_ms)
        return load.prefill_tokens_queued + sum(called)

    def _busy_ms(self, load: EngineLoad) -> float:
        return self._tokens_ahead(load) * load.prefill_us_per_token / 1000

    def _call(self, key: int) -> None:
        place = self._places[key]
        if place.turn.done():  # its task is being cancelled and has yet to leave
            return
        waited_ms = _now_ms() - place.came_ms
        turn = Turn(
            num_tokens=place.num_tokens,
            waited_ms=waited_ms,
            on_entered=lambda: self._leave(key),
            on_computed=lambda: self._computed(key),
        )
        self._unlist(key)
        self._called[key] = turn
        place.turn.set_result(turn)

    def _dismiss(self, given_up: Iterable[Dismissed]) -> None:
        for each in given_up:
            key = _key(each.waiting)
            self._give_up(key, each.verdict.value, retry_after_ms=each.retry_after_ms)

    def _give_up(self, key: int, why: str, *, retry_after_ms: int) -> None:
        turn = self._places[key].turn
        if turn.done():
            return
        self._on_given_up(why)
        message = "the prompt cannot be computed here in time"
        turn.set_exception(KvasirError(Reason.BUSY, message, retry_after_ms=retry_after_ms))

    def _computed(self, key: int) -> None:
        if self._beside.pop(key, None) is not None:
            self._advance()

    def _leave(self, key: int) -> None:
        """The request is no longer on its way to the engine."""
        self._called.pop(key, None)
        self._advance()


def _key(waiting: Waiting) -> int:
    assert isinstance(waiting.request_id, int), "the queue knows requests by their keys"
    return waiting.request_id
