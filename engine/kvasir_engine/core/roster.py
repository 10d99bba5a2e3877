"""All requests of one engine and what they hold: every change of phase happens here.

    WAITING -> RUNNING            place, start
    WAITING -> RESERVED           place, reserve        RESERVED -> RUNNING   start
    RUNNING -> WAITING            preempt
    RUNNING -> HELD               finish, end of a prefill-only request with an open session
    any     -> gone               finish, end, free

Invariants: a request ends exactly once (`Emitted` with a finish reason, or `Ended`); its blocks
are given back exactly once; those of an open session only after the session is closed. Which
request gets what, and when, is the scheduler's choice.
"""

from bisect import insort

from kvasir_kvstore.core.block import BLOCK_TOKENS

from kvasir_engine.core.blocks import BlockManager, BlockRegistry
from kvasir_engine.core.decisions import Decision, Emitted, Ended, SessionHeld, SessionOpened
from kvasir_engine.core.requests import num_blocks_for
from kvasir_engine.core.sequence import Phase, SequenceState
from kvasir_engine.core.types import (
    EngineLimits,
    FinishReason,
    Refusal,
    RefusedError,
    TokenEvent,
)


def by_arrival(sequence: SequenceState) -> int:
    """Sort key: the oldest first, whatever happened to it since."""
    return sequence.arrival


class Roster:
    """Who is here, in which phase, with which blocks."""

    def __init__(self, limits: EngineLimits, registry: BlockRegistry) -> None:
        self.blocks = BlockManager(limits.num_blocks, registry)
        self.sequences: dict[str, SequenceState] = {}
        self.waiting: list[SequenceState] = []  # by arrival
        self.running: list[SequenceState] = []  # by arrival
        self.num_reserved = 0
        self.num_preemptions = 0
        self.num_ended = 0
        self.tokens_cached = 0
        self.tokens_generated = 0
        self._hold_ms_max = limits.handoff_hold_ms_max
        self._num_arrivals = 0
        self._decisions: list[Decision] = []

    @property
    def num_placed(self) -> int:
        """Requests that hold memory and are, or may soon be, computed."""
        return len(self.running) + self.num_reserved

    def take_decisions(self) -> list[Decision]:
        """What was decided since the last call, in order."""
        decisions, self._decisions = self._decisions, []
        return decisions

    def decide(self, decision: Decision) -> None:
        """Notes what the engine has to do."""
        self._decisions.append(decision)

    def add(self, sequence: SequenceState, *, now_ms: float) -> None:
        """A new request waits."""
        self._num_arrivals += 1
        sequence.arrival = self._num_arrivals
        sequence.queued_ms = now_ms
        self.sequences[sequence.request_id] = sequence
        self.waiting.append(sequence)

    def place(self, sequence: SequenceState, *, headroom: int) -> bool:
        """Gives a waiting request blocks for all its known tokens, cached ones first.

        At least one token is left to compute: without it there are no logits. `headroom` blocks
        must stay available.
        """
        cached = self._cached(sequence)
        num_fresh = num_blocks_for(sequence.num_known) - len(cached)
        num_taken = num_fresh + self.blocks.num_evictable(cached)
        if num_taken + headroom > self.blocks.num_available:
            return False
        self.blocks.acquire(cached)
        fresh = self.blocks.allocate(num_fresh)
        if fresh is None:
            self.blocks.release(cached)
            return False
        self._take_blocks(sequence, cached, fresh)
        return True

    def num_uncached(self, sequence: SequenceState) -> int:
        """Tokens that a waiting request would have to compute if it were placed now."""
        return sequence.num_known - BLOCK_TOKENS * len(self._cached(sequence))

    def reserve(self, sequence: SequenceState) -> None:
        """A placed request is filled from elsewhere."""
        sequence.phase = Phase.RESERVED
        self.num_reserved += 1
        self.waiting.remove(sequence)

    def start(self, sequence: SequenceState) -> None:
        """A placed or reserved request runs from now on."""
        if sequence.phase is Phase.RESERVED:
            self.num_reserved -= 1
        else:
            self.waiting.remove(sequence)
        sequence.phase = Phase.RUNNING
        insort(self.running, sequence, key=by_arrival)

    def preempt(self, sequence: SequenceState) -> None:
        """A running request loses its blocks and waits to be computed again."""
        assert not sequence.is_in_flight, "blocks of a running step"
        assert sequence.phase is Phase.RUNNING, "only running requests are preempted"
        self._give_back(sequence)
        self.running.remove(sequence)
        sequence.phase = Phase.WAITING
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        insort(self.waiting, sequence, key=by_arrival)

    def emit(
        self,
        sequence: SequenceState,
        token_ids: tuple[int, ...],
        reason: FinishReason | None,
        *,
        now_ms: float,
    ) -> None:
        """New tokens go out; with a reason, the request is finished."""
        is_first = sequence.first_token_ms is None
        if is_first:
            sequence.first_token_ms = now_ms
        self.tokens_generated += len(token_ids)
        timing = sequence.timing(now_ms) if is_first or reason is not None else None
        event = TokenEvent(token_ids, reason, timing)
        self.decide(Emitted(sequence.request_id, event, sequence.arrival))
        if reason is not None:
            self._leave(sequence, is_aborted=False, now_ms=now_ms)

    def end(self, sequence: SequenceState, refusal: Refusal, *, now_ms: float) -> None:
        """The request ends before its output does."""
        assert not sequence.is_in_flight, "blocks of a running step"
        self.decide(Ended(sequence.request_id, refusal, sequence.arrival))
        self._leave(sequence, is_aborted=True, now_ms=now_ms)

    def abort_held(self, sequence: SequenceState) -> None:
        """The puller of an ended request's blocks gets no more of them."""
        session_id = sequence.request.prefill_only_session
        if session_id is not None and not sequence.is_session_aborted:
            sequence.is_session_aborted = True
            self.decide(SessionHeld(sequence.request_id, session_id, is_aborted=True))

    def free(self, sequence: SequenceState) -> None:
        """The last trace of a request goes."""
        self._give_back(sequence)
        del self.sequences[sequence.request_id]

    def name_blocks(self, sequence: SequenceState) -> None:
        """Blocks that are whole now may be reused and pulled by name."""
        num_whole = sequence.num_computed // BLOCK_TOKENS
        if num_whole <= sequence.num_named:
            return
        names = sequence.names()
        for index in range(sequence.num_named, num_whole):
            self.blocks.name_block(int(sequence.blocks.view()[index]), names[index])
        sequence.num_named = num_whole

    def reserved(self, request_id: str) -> SequenceState:
        """The reservation of this id.

        Raises:
            RefusedError: INVALID, there is none.
        """
        sequence = self.sequences.get(request_id)
        if sequence is None or sequence.phase is not Phase.RESERVED:
            raise RefusedError(Refusal.INVALID, f"request {request_id} is not reserved")
        return sequence

    def _cached(self, sequence: SequenceState) -> list[int]:
        """Blocks with which a request can begin; its last token is computed in any case."""
        num_usable = (sequence.num_known - 1) // BLOCK_TOKENS
        return self.blocks.match(sequence.names()[:num_usable])

    def _take_blocks(self, sequence: SequenceState, cached: list[int], fresh: list[int]) -> None:
        sequence.blocks.extend(cached + fresh)
        sequence.num_named = len(cached)
        sequence.num_computed = len(cached) * BLOCK_TOKENS
        self.tokens_cached += sequence.num_computed
        if sequence.num_preemptions == 0:
            sequence.num_cached = sequence.num_computed
        self._open_session(sequence)

    def _open_session(self, sequence: SequenceState) -> None:
        request = sequence.request
        if request.prefill_only_session is not None:
            blocks = tuple(sequence.blocks.view(request.skip_blocks).tolist())
            session_id = request.prefill_only_session
            self.decide(SessionOpened(request.request_id, session_id, blocks))

    def _leave(self, sequence: SequenceState, *, is_aborted: bool, now_ms: float) -> None:
        self.num_ended += 1
        self._drop_from_phase(sequence)
        session_id = sequence.request.prefill_only_session
        if session_id is None or not len(sequence.blocks):
            self.free(sequence)
            return
        deadline_ms = sequence.request.deadline_ms
        latest_ms = now_ms + self._hold_ms_max
        sequence.phase = Phase.HELD
        sequence.hold_until_ms = latest_ms if deadline_ms is None else min(deadline_ms, latest_ms)
        sequence.is_session_aborted = is_aborted
        self.decide(SessionHeld(sequence.request_id, session_id, is_aborted))

    def _drop_from_phase(self, sequence: SequenceState) -> None:
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        elif sequence.phase is Phase.RUNNING:
            self.running.remove(sequence)
        elif sequence.phase is Phase.RESERVED:
            self.num_reserved -= 1

    def _give_back(self, sequence: SequenceState) -> None:
        self.blocks.release(sequence.blocks.view().tolist())
        sequence.blocks.clear()
        sequence.num_computed = 0
        sequence.num_named = 0
