"""Random histories of a scheduler: what may happen to it, and what must hold after every event."""

import random
from collections import Counter

from core_builders import FINGERPRINT, FakeRegistry, make_limits, make_request
from kvasir_engine.core.decisions import (
    Decision,
    Emitted,
    Ended,
    Granted,
    SessionHeld,
    SessionOpened,
    Step,
)
from kvasir_engine.core.scheduler import Scheduler
from kvasir_engine.core.sequence import Phase
from kvasir_engine.core.types import RefusedError
from kvasir_kvstore.core.block import BLOCK_TOKENS

EOS = 99
KINDS = ("plain", "plain", "plain", "reserve", "prefill_only", "reserve_prefill_only")


class History:
    """Arrivals, cancels, reservations, steps, failures, pins and time; checked at every turn."""

    def __init__(self, seed: int, *, num_blocks: int, budget: int, max_running: int) -> None:
        self.random = random.Random(seed)
        self.registry = FakeRegistry()
        self.limits = make_limits(
            num_blocks=num_blocks, max_batch_tokens=budget, max_running=max_running, max_waiting=5
        )
        self.scheduler = Scheduler(
            self.limits, self.registry, fingerprint=FINGERPRINT, eos_token_ids=[EOS]
        )
        self.now_ms = 0.0
        self.step: Step | None = None
        self.accepted: list[str] = []
        self.ends: Counter[str] = Counter()
        self.num_tokens_out: Counter[str] = Counter()
        self.max_tokens: dict[str, int] = {}
        self.opened: set[str] = set()
        self.held: set[str] = set()
        self.reserved: dict[str, None] = {}
        self.stored: set[bytes] = set()

    def run(self, num_events: int) -> None:
        """Lets things happen."""
        events = {
            self.advance: 60,
            self.submit: 14,
            self.activate: 6,
            self.close_session: 5,
            self.wait: 5,
            self.cancel: 3,
            self.release: 2,
            self.pin: 3,
            self.fail: 1,
        }
        for event in self.random.choices([*events], [*events.values()], k=num_events):
            event()
            self.check()

    # What may happen

    def advance(self) -> None:
        if self.step is None:
            self.step = self.scheduler.schedule(now_ms=self.now_ms)
            if self.step is not None:
                self.check_step(self.step)
            return
        drawn = [EOS if self.random.random() < 0.01 else 1 for _ in self.step.sampled]
        self.scheduler.complete(self.step, drawn, now_ms=self.now_ms)
        self.step = None

    def fail(self) -> None:
        if self.step is not None:
            self.scheduler.fail(self.step, now_ms=self.now_ms)
            self.step = None

    def submit(self) -> None:
        number = len(self.max_tokens) + 1
        request_id, kind = f"r{number}", self.random.choice(KINDS)
        request = make_request(
            request_id,
            self.random.choice([1, 31, 32, 33, 64, self.random.randint(1, 150)]),
            first=self.random.randint(0, 2),
            max_tokens=self.random.randint(1, 80),
            deadline_ms=self.now_ms + 400 if self.random.random() < 0.2 else None,
            session=number if "prefill_only" in kind else None,
        )
        self.max_tokens[request_id] = request.sampling.max_tokens
        try:
            sequence = self.scheduler.prepare(request, wants_reservation="reserve" in kind)
            self.scheduler.submit(sequence, now_ms=self.now_ms)
        except RefusedError:
            return
        self.accepted.append(request_id)

    def cancel(self) -> None:
        if self.accepted:
            self.scheduler.cancel(self.random.choice(self.accepted[-8:]), now_ms=self.now_ms)

    def release(self) -> None:
        if self.accepted:
            self.scheduler.release(self.random.choice(self.accepted[-8:]), now_ms=self.now_ms)

    def activate(self) -> None:
        if not self.reserved:
            return
        request_id = next(iter(self.reserved))
        del self.reserved[request_id]
        sequence = self.scheduler.roster.sequences[request_id]
        try:
            self.scheduler.activate(
                request_id,
                computed_tokens=self.random.choice(
                    [0, sequence.num_initial, self.random.randint(0, sequence.num_initial)]
                ),
                extra_tokens=self.random.choice([[], [1], [1], [EOS]]),
                now_ms=self.now_ms,
            )
        except RefusedError:
            deadline_ms = sequence.request.deadline_ms
            is_late = deadline_ms is not None and self.now_ms >= deadline_ms
            assert sequence.end_refusal is not None or is_late

    def close_session(self) -> None:
        if self.held:
            self.scheduler.free_held(self.held.pop())

    def wait(self) -> None:
        self.now_ms += self.random.randint(1, 60)

    def pin(self) -> None:
        names = sorted(self.registry.published)
        self.registry.pinned = set(self.random.sample(names, k=min(len(names), 2)))

    # What must hold

    def check(self) -> None:
        """After every event."""
        for decision in self.scheduler.take_decisions():
            self.check_decision(decision)
        self.check_blocks()
        self.check_names()
        roster = self.scheduler.roster
        assert roster.num_placed <= self.limits.max_running
        assert set(self.ends.values()) <= {0, 1}, "a request ended twice"
        for request_id, count in self.num_tokens_out.items():
            assert count <= self.max_tokens[request_id]
        for queue in (roster.waiting, roster.running):
            arrivals = [sequence.arrival for sequence in queue]
            assert arrivals == sorted(arrivals)

    def check_decision(self, decision: Decision) -> None:
        match decision:
            case Emitted(request_id, event, _):
                assert self.ends[request_id] == 0, "tokens after the end"
                self.num_tokens_out[request_id] += len(event.token_ids)
                self.ends[request_id] += event.finish_reason is not None
            case Ended(request_id, _, _):
                self.ends[request_id] += 1
                self.reserved.pop(request_id, None)
            case Granted(request_id, reservation, _):
                assert self.scheduler.roster.sequences[request_id].phase is Phase.RESERVED
                assert reservation.tokens_cached == 32 * reservation.num_blocks_cached
                self.reserved[request_id] = None
            case SessionOpened(request_id, _, _):
                assert request_id not in self.opened, "a session opens once"
                self.opened.add(request_id)
            case SessionHeld(request_id, _, _):
                assert self.ends[request_id] == 1
                self.held.add(request_id)

    def check_step(self, step: Step) -> None:
        assert 0 < step.num_tokens <= self.limits.max_batch_tokens
        assert len({part.request_id for part in step.slices}) == len(step.slices)
        shared = set(self.registry.published.values())
        for part in step.slices:
            sequence = self.scheduler.roster.sequences[part.request_id]
            assert sequence.phase is Phase.RUNNING
            assert part.start == sequence.num_computed
            assert part.block_table.tolist() == sequence.blocks.view(0, -(-part.end // 32)).tolist()
            written = part.block_table[part.start // BLOCK_TOKENS :].tolist()
            assert not set(written) & shared, "a published block is written"
            assert (part.sampling is not None) == (part.end == sequence.num_known)

    def check_blocks(self) -> None:
        """Every block is free, evictable or owned, and as often as references say."""
        blocks = self.scheduler.blocks
        owners = Counter[int]()
        for sequence in self.scheduler.roster.sequences.values():
            owned = sequence.blocks.view().tolist()
            assert len(set(owned)) == len(owned), "a block twice in one request"
            assert sequence.phase is not Phase.WAITING or not owned
            owners.update(owned)
        assert [owners[block] for block in range(blocks.num_blocks)] == blocks._num_refs
        free, evictable = set(blocks._free), set(blocks._evictable)
        assert len(free) + len(evictable) + len(owners) == blocks.num_blocks
        assert free | evictable | set(owners) == set(range(blocks.num_blocks))

    def check_names(self) -> None:
        """A name stands for one block, and what listeners were told is so."""
        blocks = self.scheduler.blocks
        assert blocks._by_name == self.registry.published
        assert all(blocks._names[block] == name for name, block in blocks._by_name.items())
        for block in range(blocks.num_blocks):
            is_shared = blocks._num_refs[block] > 1
            assert not is_shared or blocks._names[block] is not None, "only named ones are shared"
        change = blocks.take_changes()
        if change is not None:
            assert self.stored >= set(change.removed)
            assert not self.stored & set(change.stored)
            self.stored = self.stored - set(change.removed) | set(change.stored)
        assert self.stored == set(blocks.names())

    def finish(self) -> None:
        """Once owners let go, everything ends, each once, and all memory is back."""
        self.registry.pinned = set()
        for _ in range(20_000):
            self.check()
            for request_id in list(self.reserved):
                self.scheduler.release(request_id, now_ms=self.now_ms)
            self.close_session()
            if not self.scheduler.roster.sequences:
                break
            self.advance()
        assert not self.scheduler.roster.sequences, "a request never ends"
        assert self.scheduler.blocks.num_available == self.limits.num_blocks
        self.check()
        assert {key for key, count in self.ends.items() if count} == set(self.accepted)
