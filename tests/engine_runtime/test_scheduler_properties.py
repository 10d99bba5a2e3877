"""The scheduler under random histories: what must hold after every event, and at the end."""

from collections import Counter

from core_builders import FINGERPRINT, FakeRegistry, make_limits, make_request
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from kvasir_engine.core.decisions import Emitted, Ended, Granted, SessionHeld, SessionOpened, Step
from kvasir_engine.core.scheduler import Scheduler
from kvasir_engine.core.sequence import Phase
from kvasir_engine.core.types import RefusedError
from kvasir_kvstore.core.block import BLOCK_TOKENS

EOS = 99


class Histories(RuleBasedStateMachine):
    """Arrivals, cancels, reservations, steps, failures, pins and time, in any order."""

    ids = Bundle("ids")

    @initialize(
        num_blocks=st.integers(3, 12),
        budget=st.integers(1, 70),
        max_running=st.integers(1, 5),
    )
    def start(self, num_blocks: int, budget: int, max_running: int) -> None:
        self.registry = FakeRegistry()
        self.limits = make_limits(
            num_blocks=num_blocks, max_batch_tokens=budget, max_running=max_running, max_waiting=5
        )
        self.scheduler = Scheduler(
            self.limits, self.registry, fingerprint=FINGERPRINT, eos_token_ids=[EOS]
        )
        self.now_ms = 0.0
        self.step: Step | None = None
        self.accepted: set[str] = set()
        self.ended: Counter[str] = Counter()
        self.tokens_out: Counter[str] = Counter()
        self.max_tokens: dict[str, int] = {}
        self.opened: set[str] = set()
        self.held: set[str] = set()
        self.reserved: set[str] = set()
        self.num_requests = 0

    @rule(
        target=ids,
        num_tokens=st.integers(1, 200),
        first=st.integers(0, 2),
        max_tokens=st.integers(1, 70),
        timeout_ms=st.none() | st.integers(1, 50),
        kind=st.sampled_from(["plain", "plain", "reserve", "prefill_only", "reserve_prefill"]),
    )
    def submit(
        self, num_tokens: int, first: int, max_tokens: int, timeout_ms: int | None, kind: str
    ) -> str:
        self.num_requests += 1
        request_id = f"r{self.num_requests}"
        request = make_request(
            request_id,
            num_tokens,
            first=first,
            max_tokens=max_tokens,
            deadline_ms=None if timeout_ms is None else self.now_ms + timeout_ms,
            session=self.num_requests if "prefill" in kind else None,
        )
        try:
            sequence = self.scheduler.prepare(request, wants_reservation="reserve" in kind)
            self.scheduler.submit(sequence, now_ms=self.now_ms)
        except RefusedError:
            return request_id
        self.accepted.add(request_id)
        self.max_tokens[request_id] = max_tokens
        self.take_decisions()
        return request_id

    @rule(request_id=ids)
    def cancel(self, request_id: str) -> None:
        self.scheduler.cancel(request_id, now_ms=self.now_ms)
        self.take_decisions()

    @rule(request_id=ids)
    def release(self, request_id: str) -> None:
        self.scheduler.release(request_id, now_ms=self.now_ms)
        self.reserved.discard(request_id)
        self.take_decisions()

    @precondition(lambda self: self.reserved)
    @rule(share=st.floats(0, 1), num_extra=st.integers(0, 2), token=st.sampled_from([1, EOS]))
    def activate(self, share: float, num_extra: int, token: int) -> None:
        request_id = min(self.reserved)
        self.reserved.discard(request_id)
        sequence = self.scheduler.roster.sequences[request_id]
        try:
            self.scheduler.activate(
                request_id,
                computed_tokens=int(share * sequence.num_initial),
                extra_tokens=[token] * num_extra,
                now_ms=self.now_ms,
            )
        except RefusedError:
            assert sequence.end_refusal is not None or self.now_ms >= sequence.request.deadline_ms
        self.take_decisions()

    @precondition(lambda self: self.step is None)
    @rule()
    def schedule(self) -> None:
        self.step = self.scheduler.schedule(now_ms=self.now_ms)
        self.take_decisions()
        if self.step is not None:
            self.check_step(self.step)

    @precondition(lambda self: self.step is not None)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        drawn = [data.draw(st.sampled_from([1, 2, 3, EOS])) for _ in self.step.sampled]
        self.scheduler.complete(self.step, drawn, now_ms=self.now_ms)
        self.step = None
        self.take_decisions()

    @precondition(lambda self: self.step is not None)
    @rule()
    def fail(self) -> None:
        self.scheduler.fail(self.step, now_ms=self.now_ms)
        self.step = None
        self.take_decisions()

    @rule(elapsed_ms=st.integers(1, 20))
    def wait(self, elapsed_ms: int) -> None:
        self.now_ms += elapsed_ms

    @precondition(lambda self: self.held)
    @rule()
    def close_session(self) -> None:
        self.scheduler.free_held(self.held.pop())

    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        names = sorted(self.registry.published)
        self.registry.pinned = set(data.draw(st.lists(st.sampled_from(names)))) if names else set()

    def take_decisions(self) -> None:
        for decision in self.scheduler.take_decisions():
            match decision:
                case Emitted(request_id, event):
                    assert self.ended[request_id] == 0, "tokens after the end"
                    self.tokens_out[request_id] += len(event.token_ids)
                    self.ended[request_id] += event.finish_reason is not None
                case Ended(request_id, _):
                    self.ended[request_id] += 1
                    self.reserved.discard(request_id)
                case Granted(request_id, _):
                    self.reserved.add(request_id)
                case SessionOpened(request_id, _, _):
                    assert request_id not in self.opened, "a session opens once"
                    self.opened.add(request_id)
                case SessionHeld(request_id, _, _):
                    assert self.ended[request_id] == 1
                    self.held.add(request_id)

    def check_step(self, step: Step) -> None:
        assert 0 < step.num_tokens <= self.limits.max_batch_tokens
        assert len({part.request_id for part in step.slices}) == len(step.slices)
        for part in step.slices:
            sequence = self.scheduler.roster.sequences[part.request_id]
            assert part.start == sequence.num_computed
            assert len(part.block_table) * BLOCK_TOKENS >= part.end
            shared = self.registry.published.values()
            written = part.block_table[part.start // BLOCK_TOKENS :].tolist()
            assert not set(written) & set(shared), "a published block is written"
            assert (part.sampling is not None) == (part.end == sequence.num_known)

    @invariant()
    def blocks_are_conserved(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        blocks = self.scheduler.blocks
        owners = Counter[int]()
        for sequence in self.scheduler.roster.sequences.values():
            owned = sequence.blocks.view().tolist()
            assert len(set(owned)) == len(owned), "a block twice in one request"
            owners.update(owned)
            assert sequence.phase is not Phase.WAITING or not owned
        assert [owners[block] for block in range(blocks.num_blocks)] == blocks._num_refs
        free = set(blocks._free)
        evictable = set(blocks._evictable)
        assert len(free) == len(blocks._free)
        assert not free & evictable
        assert not (free | evictable) & set(owners)
        assert free | evictable | set(owners) == set(range(blocks.num_blocks))

    @invariant()
    def names_are_consistent(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        blocks = self.scheduler.blocks
        assert blocks._by_name == self.registry.published
        assert all(blocks._names[block] == name for name, block in blocks._by_name.items())
        for block in range(blocks.num_blocks):
            if blocks._num_refs[block] > 1:
                assert blocks._names[block] is not None, "only named blocks are shared"

    @invariant()
    def limits_are_kept(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        roster = self.scheduler.roster
        assert roster.num_placed <= self.limits.max_running
        assert set(self.ended.values()) <= {0, 1}, "a request ended twice"
        for request_id, count in self.tokens_out.items():
            assert count <= self.max_tokens[request_id]
        arrivals = [sequence.arrival for sequence in roster.waiting]
        assert arrivals == sorted(arrivals)

    def teardown(self) -> None:
        """Whatever happened: once owners let go, everything ends and all memory is free."""
        if not hasattr(self, "scheduler"):
            return
        self.registry.pinned = set()
        for request_id in list(self.reserved):
            self.scheduler.release(request_id, now_ms=self.now_ms)
        for _ in range(20_000):
            if self.step is None:
                self.step = self.scheduler.schedule(now_ms=self.now_ms)
            self.take_decisions()
            for request_id in list(self.reserved):
                self.scheduler.release(request_id, now_ms=self.now_ms)
            self.reserved.clear()
            while self.held:
                self.scheduler.free_held(self.held.pop())
            if not self.scheduler.roster.sequences:
                break
            if self.step is not None:
                drawn = [1] * len(self.step.sampled)
                self.scheduler.complete(self.step, drawn, now_ms=self.now_ms)
                self.step = None
        assert not self.scheduler.roster.sequences, "a request never ends"
        assert self.scheduler.blocks.num_available == self.limits.num_blocks
        self.take_decisions()
        assert {key for key, count in self.ended.items() if count} == self.accepted


Histories.TestCase.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)
TestHistories = Histories.TestCase
