"""What is computed in the next step, and who gets memory.

There are no phases of prefill and decode: every running request has known tokens that are not yet
computed, and each step lets computed tokens catch up. Requests with one token to go come first in
the step's token budget, then short prompts in up to half of the rest, so that they do not queue
behind a long one (LAPS, arXiv 2601.11589), then the others by age; waiting requests are admitted in
order of arrival. When memory runs out, the youngest request that may lose its blocks is put back,
to be computed again.

Invariants: a step never exceeds the budget; blocks of a request that is in flight, or that others
write or read, are not given away. Nothing deadlocks: no younger request takes from an older one,
so the oldest always gets on as soon as reservations and hand-offs, which their owners bound in
time, let go. Running the step, sessions and streams are left to the engine, which calls these
methods one at a time and carries out the decisions in order.
"""

from collections.abc import Iterable, Sequence

from kvasir_kvstore.core.block import BLOCK_TOKENS, root

from kvasir_engine.core.blocks import BlockRegistry
from kvasir_engine.core.decisions import Decision, Granted, Slice, Step
from kvasir_engine.core.requests import check_request, num_blocks_for
from kvasir_engine.core.roster import Roster, by_arrival
from kvasir_engine.core.sequence import Phase, SequenceState
from kvasir_engine.core.types import (
    EngineLimits,
    EngineRequest,
    FinishReason,
    Refusal,
    RefusedError,
)

SHORT_PART = 4
"""A prompt of at most this part of a step's budget is short."""
SHORT_SHARE = 2
"""Short prompts get at most this part of what a step has left, while long ones want it too."""


class Plan:
    """Tokens that requests get in the step being planned."""

    def __init__(self, budget: int) -> None:
        self.num_left = budget
        self.counts: dict[str, int] = {}

    def add(self, sequence: SequenceState, count: int) -> None:
        """The request computes this many tokens."""
        self.counts[sequence.request_id] = count
        self.num_left -= count

    def drop(self, sequence: SequenceState) -> None:
        """The request computes nothing after all."""
        self.num_left += self.counts.pop(sequence.request_id, 0)


class Scheduler:
    """The decisions of one engine."""

    def __init__(
        self,
        limits: EngineLimits,
        registry: BlockRegistry,
        *,
        fingerprint: bytes,
        eos_token_ids: Iterable[int],
    ) -> None:
        self.limits = limits
        self.roster = Roster(limits, registry)
        self.blocks = self.roster.blocks
        self._fingerprint = fingerprint
        self._eos_token_ids = frozenset(eos_token_ids)
        self._arrived: list[
            int
        ] = []  # blocks filled from elsewhere, until a step has taken them in
        self._short_max = limits.max_batch_tokens // SHORT_PART

    # Requests

    def prepare(self, request: EngineRequest, *, wants_reservation: bool = False) -> SequenceState:
        """The state of a new request, its blocks named. Reads nothing that changes.

        Raises:
            RefusedError: INVALID or NEVER_FITS.
        """
        check_request(request, self.limits)
        parent = root(self._fingerprint, request.tenant_salt)
        return SequenceState(request, root=parent, wants_reservation=wants_reservation)

    def submit(self, sequence: SequenceState, *, now_ms: float) -> None:
        """Takes a prepared request; a wish for a reservation is granted at once if it can be.

        Raises:
            RefusedError: DUPLICATE, QUEUE_FULL or EXPIRED.
        """
        request = sequence.request
        if request.request_id in self.roster.sequences:
            message = f"request {request.request_id} exists already"
            raise RefusedError(Refusal.DUPLICATE, message, param="request_id")
        if request.deadline_ms is not None and now_ms >= request.deadline_ms:
            raise RefusedError(Refusal.EXPIRED, "the deadline has passed already")
        if len(self.roster.waiting) >= self.limits.max_waiting:
            raise RefusedError(Refusal.QUEUE_FULL, "too many requests wait here already")
        self.roster.add(sequence, now_ms=now_ms)
        reason = sequence.finish_reason(self._eos_token_ids)
        if sequence.wants_reservation:
            self.grant()
        elif reason is not None:
            self.roster.emit(sequence, (), reason, now_ms=now_ms)

    def activate(
        self,
        request_id: str,
        *,
        computed_tokens: int,
        extra_tokens: Sequence[int] = (),
        now_ms: float,
    ) -> None:
        """Lets a reservation run: the KV of its leading `computed_tokens` is in its blocks.

        Raises:
            RefusedError: INVALID, EXPIRED or CANCELLED; the reservation is gone.
        """
        sequence = self.roster.reserved(request_id)
        self._check_activation(sequence, computed_tokens, extra_tokens, now_ms)
        num_valid = max(sequence.num_cached, computed_tokens)
        sequence.num_fetched = num_valid - sequence.num_cached
        first, end = sequence.num_cached // BLOCK_TOKENS, -(-num_valid // BLOCK_TOKENS)
        self._arrived += sequence.blocks.view(first, end).tolist()
        sequence.queued_ms = now_ms
        sequence.wants_reservation = False
        self.roster.start(sequence)
        reason = sequence.finish_reason(self._eos_token_ids)
        if reason is None:
            reason = self._extend(sequence, extra_tokens)
        # One token is computed here: its block is written again, so it has no name before.
        sequence.num_computed = min(num_valid, sequence.num_known - 1)
        self.roster.name_blocks(sequence)
        if reason is not None or sequence.num_known > sequence.num_initial:
            new = tuple(sequence.tokens.view(sequence.num_initial).tolist())
            self.roster.emit(sequence, new, reason, now_ms=now_ms)

    def release(self, request_id: str, *, now_ms: float) -> None:
        """Gives up a reservation into which nobody writes any more. Idempotent."""
        sequence = self.roster.sequences.get(request_id)
        if sequence is None:
            return
        if sequence.phase is Phase.RESERVED:
            self.roster.end(sequence, sequence.end_refusal or Refusal.CANCELLED, now_ms=now_ms)
        elif sequence.wants_reservation:
            self.cancel(request_id, now_ms=now_ms)

    def cancel(
        self, request_id: str, refusal: Refusal = Refusal.CANCELLED, *, now_ms: float
    ) -> None:
        """Ends a request as soon as that is safe, whatever its phase. Idempotent.

        A reservation stays until its owner lets go of it: a transfer may be writing to its blocks.
        """
        sequence = self.roster.sequences.get(request_id)
        if sequence is None or sequence.end_refusal is not None:
            return
        if sequence.phase is Phase.HELD:
            self.roster.abort_held(sequence)
        elif sequence.is_in_flight or sequence.phase is Phase.RESERVED:
            sequence.end_refusal = refusal
        else:
            self.roster.end(sequence, refusal, now_ms=now_ms)

    def free_held(self, request_id: str) -> None:
        """The session of an ended request is closed: its blocks are free. Idempotent."""
        sequence = self.roster.sequences.get(request_id)
        if sequence is not None and sequence.phase is Phase.HELD:
            self.roster.free(sequence)

    def is_computed(self, request_id: str) -> bool:
        """Whether the request waits, runs or is held here; a reservation is its owner's."""
        sequence = self.roster.sequences.get(request_id)
        return sequence is not None and sequence.phase is not Phase.RESERVED

    def take_decisions(self) -> list[Decision]:
        """What was decided since the last call, in order."""
        return self.roster.take_decisions()

    # Steps

    def schedule(self, *, now_ms: float) -> Step | None:
        """The next step, if there is anything to compute; `complete` or `fail` must follow."""
        self.expire(now_ms=now_ms)
        plan = Plan(self.limits.max_batch_tokens)
        by_need = sorted(self.roster.running, key=_by_need)
        # 1. Running requests with one token to go.
        for sequence in by_need:
            if sequence.num_pending == 1:
                self._advance(sequence, plan)
        # 2. Short rests, those of waiting requests too.
        left_for_long = plan.num_left - plan.num_left // SHORT_SHARE
        for sequence in by_need:
            if 1 < sequence.num_pending <= self._short_left(plan, left_for_long):
                self._advance(sequence, plan)
        self._admit(plan, left_for_long=left_for_long)
        # 3. The others, the oldest first; waiting requests as long as budget and memory last.
        for sequence in by_need:
            if sequence.request_id not in plan.counts:
                self._advance(sequence, plan)
        self._admit(plan)
        # 4. Their slices.
        slices = [self._slice(key, count, now_ms) for key, count in plan.counts.items()]
        return Step(tuple(slices), tuple(self._arrived)) if slices else None

    def grant(self) -> None:
        """Makes reservations for the first in the queue; harmless while a step runs."""
        self._admit(None)

    def complete(self, step: Step, token_ids: Sequence[int], *, now_ms: float) -> None:
        """The step was computed, and `token_ids` were drawn after its sampled slices."""
        del self._arrived[: len(step.arrived)]
        drawn = iter(token_ids)
        for part in step.slices:
            sequence = self._land(part)
            sequence.num_computed = part.end
            self.roster.name_blocks(sequence)
            new = [next(drawn)] if part.sampling is not None else []
            if sequence.end_refusal is not None:
                self.roster.end(sequence, sequence.end_refusal, now_ms=now_ms)
            elif new:
                reason = self._extend(sequence, new)
                self.roster.emit(sequence, tuple(new), reason, now_ms=now_ms)

    def fail(self, step: Step, *, now_ms: float) -> None:
        """The step was not computed: its requests end."""
        for part in step.slices:
            sequence = self._land(part)
            self.roster.end(sequence, sequence.end_refusal or Refusal.FAILED, now_ms=now_ms)

    def expire(self, *, now_ms: float) -> None:
        """Ends what has passed its deadline; not while a step runs."""
        for sequence in list(self.roster.sequences.values()):
            if now_ms < _deadline_ms(sequence):
                continue
            if sequence.phase is Phase.HELD:
                self.roster.abort_held(sequence)
            else:
                self.cancel(sequence.request_id, Refusal.EXPIRED, now_ms=now_ms)

    def wakeup_ms(self) -> float | None:
        """When `expire` has something to do next."""
        deadlines = [
            deadline_ms
            for sequence in self.roster.sequences.values()
            if not sequence.is_session_aborted
            and sequence.end_refusal is None
            and (deadline_ms := _deadline_ms(sequence)) != float("inf")
        ]
        return min(deadlines, default=None)

    # Choices

    def _advance(self, sequence: SequenceState, plan: Plan) -> None:
        """As much of a running request as the budget has left, if there is memory for it."""
        count = min(sequence.num_pending, plan.num_left)
        if count and sequence.phase is Phase.RUNNING and self._grow(sequence, count, plan):
            plan.add(sequence, count)

    def _short_left(self, plan: Plan, left_for_long: int) -> int:
        """Tokens of the longest rest that still counts, and has room, as short."""
        return min(self._short_max, plan.num_left - left_for_long)

    def _admit(self, plan: Plan | None, *, left_for_long: int = 0) -> None:
        """Places the first in the queue; without a plan, only those who wish for a reservation.

        Nobody overtakes a request that does not fit yet: it would wait for ever. With tokens
        `left_for_long` only short prompts are placed.
        """
        roster = self.roster
        while roster.waiting and roster.num_placed < self.limits.num_running_max:
            sequence = roster.waiting[0]
            can_run = plan is not None and plan.num_left > 0
            if not (sequence.wants_reservation or can_run):
                return
            if plan is not None and left_for_long:
                short_left = self._short_left(plan, left_for_long)
                if roster.num_uncached(sequence) > short_left:
                    return
            # A block for each running request, or the newcomer would soon be put back.
            if not roster.place(sequence, headroom=len(roster.running)):
                return
            if sequence.wants_reservation:
                roster.reserve(sequence)
                reservation = sequence.reservation()
                roster.decide(Granted(sequence.request_id, reservation, sequence.arrival))
            elif plan is not None:
                roster.start(sequence)
                plan.add(sequence, min(sequence.num_pending, plan.num_left))

    def _grow(self, sequence: SequenceState, count: int, plan: Plan) -> bool:
        """Blocks for `count` more tokens, taken from the youngest if there are none.

        False: there are none; the request was put back itself.
        """
        num_missing = num_blocks_for(sequence.num_computed + count) - len(sequence.blocks)
        while num_missing > 0:
            fresh = self.blocks.allocate(num_missing)
            if fresh is not None:
                sequence.blocks.extend(fresh)
                break
            victim = self._youngest_from(sequence)
            self.roster.preempt(victim)
            plan.drop(victim)
            if victim is sequence:
                return False
        return True

    def _youngest_from(self, sequence: SequenceState) -> SequenceState:
        """The youngest running request that is not older; a puller's blocks are not taken."""
        candidates = [
            other
            for other in self.roster.running
            if other.arrival >= sequence.arrival and not other.is_prefill_only
        ]
        return max(candidates, key=by_arrival)

    def _slice(self, request_id: str, count: int, now_ms: float) -> Slice:
        sequence = self.roster.sequences[request_id]
        sequence.is_in_flight = True
        if sequence.started_ms is None:
            sequence.started_ms = now_ms
        start, end = sequence.num_computed, sequence.num_computed + count
        is_last = end == sequence.num_known
        return Slice(
            request_id=request_id,
            start=start,
            token_ids=sequence.tokens.view(start, end),
            block_table=sequence.blocks.view(0, num_blocks_for(end)),
            completes=_completed_blocks(sequence, start, end),
            sampling=sequence.request.sampling if is_last else None,
        )

    def _land(self, part: Slice) -> SequenceState:
        sequence = self.roster.sequences[part.request_id]
        sequence.is_in_flight = False
        return sequence

    def _extend(self, sequence: SequenceState, token_ids: Sequence[int]) -> FinishReason | None:
        """Appends tokens until the output ends, and says why it does."""
        for token_id in token_ids:
            sequence.tokens.extend([token_id])
            reason = sequence.finish_reason(self._eos_token_ids)
            if reason is not None:
                return reason
        return FinishReason.LENGTH if sequence.is_prefill_only and token_ids else None

    def _check_activation(
        self,
        sequence: SequenceState,
        computed_tokens: int,
        extra_tokens: Sequence[int],
        now_ms: float,
    ) -> None:
        """Extra tokens come from a peer: ids beyond the vocabulary would fail a whole step."""
        refusal = sequence.end_refusal
        if refusal is None and now_ms >= _deadline_ms(sequence):
            refusal = Refusal.EXPIRED
        is_known = all(0 <= token_id < self.limits.vocab_size for token_id in extra_tokens)
        if refusal is None and not (is_known and 0 <= computed_tokens <= sequence.num_initial):
            refusal = Refusal.INVALID
        if refusal is not None:
            self.roster.end(sequence, refusal, now_ms=now_ms)
            raise RefusedError(refusal, f"the reservation cannot be activated: {refusal}")


def _by_need(sequence: SequenceState) -> tuple[bool, int]:
    return sequence.num_pending > 1, sequence.arrival


def _deadline_ms(sequence: SequenceState) -> float:
    if sequence.phase is Phase.HELD:
        return float("inf") if sequence.is_session_aborted else sequence.hold_until_ms
    deadline_ms = sequence.request.deadline_ms
    return float("inf") if deadline_ms is None else deadline_ms


def _completed_blocks(sequence: SequenceState, start: int, end: int) -> tuple[int, ...]:
    """Full blocks, and a puller's last one, which is not going to be filled."""
    first, last = start // BLOCK_TOKENS, end // BLOCK_TOKENS
    if sequence.is_prefill_only and end == sequence.num_known:
        last = num_blocks_for(end)
    return tuple(sequence.blocks.view(first, last).tolist())
