"""Single choices of the scheduler."""

import pytest
from core_builders import FakeRegistry, make_request, make_scheduler
from kvasir_engine.core.decisions import Emitted, Ended, Granted, SessionHeld, SessionOpened, Step
from kvasir_engine.core.scheduler import Scheduler
from kvasir_engine.core.types import EngineRequest, FinishReason, Refusal, RefusedError, Sampling


def submit(
    scheduler: Scheduler, *requests: EngineRequest, reserve: bool = False, now_ms: float = 0.0
) -> None:
    for request in requests:
        sequence = scheduler.prepare(request, wants_reservation=reserve)
        scheduler.submit(sequence, now_ms=now_ms)


def advance(scheduler: Scheduler, *, token: int = 1, now_ms: float = 0.0) -> Step:
    """One whole step that draws `token` everywhere."""
    step = scheduler.schedule(now_ms=now_ms)
    assert step is not None
    scheduler.complete(step, [token] * len(step.sampled), now_ms=now_ms)
    return step


def counts(step: Step | None) -> dict[str, int]:
    assert step is not None
    return {part.request_id: len(part.token_ids) for part in step.slices}


def phase(scheduler: Scheduler, request_id: str) -> str:
    return scheduler.roster.sequences[request_id].phase.name


def ends(scheduler: Scheduler) -> dict[str, object]:
    """How requests ended since the last look."""
    found: dict[str, object] = {}
    for decision in scheduler.take_decisions():
        match decision:
            case Emitted(request_id, event, _) if event.finish_reason is not None:
                found[request_id] = event.finish_reason
            case Ended(request_id, refusal, _):
                found[request_id] = refusal
    return found


def test_running_requests_come_before_prompts_in_the_budget() -> None:
    scheduler = make_scheduler(max_batch_tokens=50)
    submit(scheduler, make_request("old", 10))
    advance(scheduler)
    submit(scheduler, make_request("new", 100, first=1), make_request("newer", 20, first=2))
    assert counts(advance(scheduler)) == {"old": 1, "new": 49}
    assert counts(advance(scheduler)) == {"old": 1, "new": 49}
    assert counts(advance(scheduler)) == {"old": 1, "new": 2, "newer": 20}


def test_a_short_prompt_does_not_queue_behind_a_long_one() -> None:
    scheduler = make_scheduler(max_batch_tokens=64, num_blocks=20, max_running=8, max_waiting=8)
    submit(scheduler, make_request("long", 200))
    advance(scheduler)
    submit(scheduler, *(make_request(f"s{i}", 12, first=i) for i in range(4)))
    assert counts(advance(scheduler)) == {"s0": 12, "s1": 12, "long": 40}
    # the third and fourth follow, and the first ones go on; the long one has half at least
    step = counts(advance(scheduler))
    assert step["long"] >= 31
    assert step["s2"] == step["s3"] == 12


def test_a_prompt_that_is_cached_counts_as_short() -> None:
    scheduler = make_scheduler(max_batch_tokens=64, num_blocks=20)
    submit(scheduler, make_request("first", 70, first=5, max_tokens=1))
    advance(scheduler)
    advance(scheduler)
    submit(scheduler, make_request("long", 250))
    advance(scheduler)
    submit(scheduler, make_request("again", 70, first=5, max_tokens=1))
    assert counts(advance(scheduler)) == {"again": 6, "long": 58}


def test_an_older_chunk_goes_on_before_a_younger_prompt_begins() -> None:
    scheduler = make_scheduler(max_batch_tokens=64)
    submit(scheduler, make_request("a", 90), make_request("b", 20, first=1))
    assert counts(advance(scheduler)) == {"a": 64}
    assert counts(advance(scheduler)) == {"a": 26, "b": 20}


def test_nobody_overtakes_a_request_that_does_not_fit_yet() -> None:
    scheduler = make_scheduler(num_blocks=4)
    submit(scheduler, make_request("a", 90), make_request("big", 60, first=1))
    submit(scheduler, make_request("small", 5, first=2))
    advance(scheduler)
    assert counts(advance(scheduler)) == {"a": 26}
    assert [phase(scheduler, key) for key in ("big", "small")] == ["WAITING", "WAITING"]


def test_a_newcomer_leaves_a_block_for_each_running_request() -> None:
    scheduler = make_scheduler(num_blocks=4)
    submit(scheduler, make_request("a", 32, max_tokens=60))
    advance(scheduler)
    submit(scheduler, make_request("b", 90, first=1))
    assert set(counts(advance(scheduler))) == {"a"}
    submit(scheduler, make_request("c", 5, first=2))
    assert phase(scheduler, "b") == "WAITING"
    scheduler.cancel("b", now_ms=0)
    assert set(counts(advance(scheduler))) == {"a", "c"}


def test_cached_blocks_that_nobody_uses_count_as_taken_when_they_are_taken() -> None:
    scheduler = make_scheduler(num_blocks=4, max_batch_tokens=500)
    submit(scheduler, make_request("a", 65, max_tokens=1))
    advance(scheduler)
    submit(scheduler, make_request("b", 20, first=5, max_tokens=60))
    advance(scheduler)
    submit(scheduler, make_request("again", 65))  # needs two cached blocks, a fresh one, and one
    assert set(counts(scheduler.schedule(now_ms=0))) == {"b"}  # is left for "b": there are three


def test_a_preempted_request_tells_what_it_found_in_the_cache_at_first() -> None:
    scheduler = make_scheduler(num_blocks=4, max_batch_tokens=500)
    submit(scheduler, make_request("a", 40, max_tokens=3))
    advance(scheduler)
    scheduler.roster.preempt(scheduler.roster.sequences["a"])
    scheduler.take_decisions()
    advance(scheduler)
    advance(scheduler)
    emitted = [d.event for d in scheduler.take_decisions() if isinstance(d, Emitted)]
    timing = emitted[-1].timing
    assert timing is not None
    assert (timing.tokens_cached, timing.tokens_computed, timing.num_preemptions) == (0, 40, 1)


def test_the_youngest_is_put_back_when_memory_runs_out_and_keeps_its_place() -> None:
    scheduler = make_scheduler(num_blocks=6, max_batch_tokens=500, max_running=6)
    requests = [make_request(f"r{i}", 32, first=i, max_tokens=60) for i in range(3)]
    submit(scheduler, *requests)
    advance(scheduler)  # each has one whole block, and three are left
    submit(scheduler, make_request("last", 2, first=9))
    for _ in range(32):
        advance(scheduler)
    step = scheduler.schedule(now_ms=0)
    assert set(counts(step)) == {"r0", "r1"}
    assert phase(scheduler, "r2") == "WAITING"
    assert scheduler.roster.waiting[0].request_id == "r2"


def test_a_request_put_back_after_it_was_planned_is_not_computed() -> None:
    scheduler = make_scheduler(num_blocks=4, max_batch_tokens=500)
    submit(scheduler, make_request("old", 64, max_tokens=60), reserve=True)
    submit(scheduler, make_request("young", 33, first=1, max_tokens=60))
    advance(scheduler)
    # Two tokens to go: it is planned after those with one, and needs a third block.
    scheduler.activate("old", computed_tokens=63, extra_tokens=[1], now_ms=0)
    assert counts(scheduler.schedule(now_ms=0)) == {"old": 2}
    assert phase(scheduler, "young") == "WAITING"


def test_blocks_that_a_puller_reads_are_not_taken() -> None:
    scheduler = make_scheduler(num_blocks=5, max_batch_tokens=500)
    submit(scheduler, make_request("old", 64, max_tokens=90))
    advance(scheduler)
    submit(scheduler, make_request("pulled", 30, first=1, session=5))
    assert counts(advance(scheduler)) == {"old": 1, "pulled": 30}
    for _ in range(63):
        advance(scheduler)
    assert scheduler.schedule(now_ms=0) is None  # put back itself: there is nobody else
    assert [phase(scheduler, key) for key in ("old", "pulled")] == ["WAITING", "HELD"]
    scheduler.free_held("pulled")
    assert counts(scheduler.schedule(now_ms=0)).keys() == {"old"}


def test_a_cached_prefix_is_not_computed_again_but_its_last_token_is() -> None:
    scheduler = make_scheduler()
    submit(scheduler, make_request("a", 64, max_tokens=1))
    advance(scheduler)
    submit(scheduler, make_request("b", 64, max_tokens=1))
    step = scheduler.schedule(now_ms=0)
    assert counts(step) == {"b": 32}


def test_names_appear_when_their_blocks_are_computed() -> None:
    scheduler = make_scheduler(max_batch_tokens=40)
    submit(scheduler, make_request("a", 70, max_tokens=40))
    step = scheduler.schedule(now_ms=0)
    assert step is not None
    assert scheduler.blocks.names() == ()
    scheduler.complete(step, [], now_ms=0)
    assert len(scheduler.blocks.names()) == 1
    assert step.slices[0].completes == (step.slices[0].block_table[0],)
    for _ in range(27):
        advance(scheduler)
    assert len(scheduler.blocks.names()) == 3  # with output tokens in the third


def test_a_pinned_block_is_passed_over_by_eviction() -> None:
    registry = FakeRegistry()
    scheduler = make_scheduler(registry=registry, num_blocks=2)
    for first, request_id in enumerate(("a", "b")):
        submit(scheduler, make_request(request_id, 32, first=first, max_tokens=1))
        advance(scheduler)
    pinned, other = scheduler.blocks.names()
    registry.pinned = {pinned}
    submit(scheduler, make_request("c", 20, first=2, max_tokens=1))
    advance(scheduler)
    assert scheduler.blocks.names() == (pinned,)
    assert not scheduler.blocks.holds(other)
    submit(scheduler, make_request("d", 40, first=3, max_tokens=1))
    assert scheduler.schedule(now_ms=0) is None
    registry.pinned = set()
    assert counts(scheduler.schedule(now_ms=0)) == {"d": 40}


def test_the_end_of_a_chain_is_evicted_before_its_beginning() -> None:
    scheduler = make_scheduler(num_blocks=4, max_batch_tokens=500)
    submit(scheduler, make_request("a", 65, max_tokens=1))
    advance(scheduler)
    first, second = scheduler.blocks.names()
    submit(scheduler, make_request("b", 70, first=5, max_tokens=1))
    advance(scheduler)
    assert scheduler.blocks.holds(first)
    assert not scheduler.blocks.holds(second)


def test_a_reservation_holds_memory_until_it_is_activated() -> None:
    scheduler = make_scheduler()
    submit(scheduler, make_request("a", 70), reserve=True)
    (granted,) = scheduler.take_decisions()
    assert isinstance(granted, Granted)
    assert len(granted.reservation.blocks) == 3
    assert len(granted.reservation.names) == 2
    assert scheduler.schedule(now_ms=0) is None
    scheduler.activate("a", computed_tokens=70, extra_tokens=[7], now_ms=0)
    assert scheduler.blocks.names() == granted.reservation.names
    step = advance(scheduler)
    assert (step.slices[0].start, counts(step)) == (70, {"a": 1})
    first, second = (
        d.event.token_ids for d in scheduler.take_decisions() if isinstance(d, Emitted)
    )
    assert (first, second) == ((7,), (1,))


def test_an_activated_request_computes_what_did_not_come() -> None:
    scheduler = make_scheduler()
    submit(scheduler, make_request("a", 70), reserve=True)
    scheduler.activate("a", computed_tokens=32, now_ms=0)
    step = scheduler.schedule(now_ms=0)
    assert step is not None
    assert (step.slices[0].start, counts(step)) == (32, {"a": 38})


def test_a_block_that_is_written_again_has_no_name_before() -> None:
    scheduler = make_scheduler()
    submit(scheduler, make_request("a", 64), reserve=True)
    scheduler.activate("a", computed_tokens=64, now_ms=0)
    assert len(scheduler.blocks.names()) == 1
    assert counts(advance(scheduler)) == {"a": 1}
    assert len(scheduler.blocks.names()) == 2


def test_extra_tokens_can_end_a_request() -> None:
    scheduler = make_scheduler()
    submit(scheduler, make_request("a", 70, max_tokens=1), reserve=True)
    submit(scheduler, make_request("b", 20, first=1), reserve=True)
    scheduler.activate("a", computed_tokens=70, extra_tokens=[7], now_ms=0)
    scheduler.activate("b", computed_tokens=20, extra_tokens=[99, 5], now_ms=0)
    assert ends(scheduler) == {"a": FinishReason.LENGTH, "b": FinishReason.STOP}
    assert scheduler.blocks.num_available == 8


@pytest.mark.parametrize(
    ("computed_tokens", "extra_tokens"), [(71, []), (-1, []), (70, [100]), (70, [-1])]
)
def test_an_activation_that_cannot_be_right_ends_the_request(
    computed_tokens: int, extra_tokens: list[int]
) -> None:
    scheduler = make_scheduler()
    submit(scheduler, make_request("a", 70), reserve=True)
    with pytest.raises(RefusedError) as refused:
        scheduler.activate(
            "a", computed_tokens=computed_tokens, extra_tokens=extra_tokens, now_ms=0
        )
    assert refused.value.refusal is Refusal.INVALID
    assert scheduler.blocks.num_available == 8


def test_a_step_tells_the_device_which_blocks_came_from_elsewhere() -> None:
    """Whoever fetched them may be gone by then: the blocks have names, and others use them."""
    scheduler = make_scheduler()
    submit(scheduler, make_request("a", 70), reserve=True)
    scheduler.activate("a", computed_tokens=64, now_ms=0)
    blocks = scheduler.roster.sequences["a"].blocks.view().tolist()
    scheduler.cancel("a", now_ms=0)
    submit(scheduler, make_request("b", 70))
    step = scheduler.schedule(now_ms=0)
    assert step is not None
    assert step.slices[0].start == 64
    assert step.arrived == tuple(blocks[:2])
    scheduler.fail(step, now_ms=0)  # the device may not have seen them
    submit(scheduler, make_request("c", 70))
    assert advance(scheduler).arrived == tuple(blocks[:2])
    assert advance(scheduler).arrived == ()


def test_a_cancelled_reservation_stays_until_its_owner_lets_go() -> None:
    scheduler = make_scheduler()
    submit(scheduler, make_request("a", 70), make_request("b", 70, first=1), reserve=True)
    scheduler.cancel("a", now_ms=0)
    scheduler.cancel("b", now_ms=0)
    assert scheduler.blocks.num_available == 2
    scheduler.release("a", now_ms=0)
    with pytest.raises(RefusedError) as refused:
        scheduler.activate("b", computed_tokens=0, now_ms=0)
    assert refused.value.refusal is Refusal.CANCELLED
    assert scheduler.blocks.num_available == 8


def test_a_reservation_is_granted_while_a_step_runs() -> None:
    scheduler = make_scheduler()
    submit(scheduler, make_request("a", 40))
    assert scheduler.schedule(now_ms=0) is not None
    submit(scheduler, make_request("b", 70, first=1), reserve=True)
    assert phase(scheduler, "b") == "RESERVED"


def test_a_cancelled_request_in_flight_keeps_its_blocks_until_the_step_is_done() -> None:
    scheduler = make_scheduler()
    submit(scheduler, make_request("a", 40))
    step = scheduler.schedule(now_ms=0)
    assert step is not None
    scheduler.cancel("a", now_ms=0)
    assert scheduler.blocks.num_available == 6
    scheduler.complete(step, [1], now_ms=0)
    assert ends(scheduler) == {"a": Refusal.CANCELLED}
    assert scheduler.blocks.num_available == 8


def test_a_failed_step_ends_its_requests_only() -> None:
    scheduler = make_scheduler(max_batch_tokens=64)
    submit(scheduler, make_request("a", 64), make_request("b", 64, first=1))
    step = scheduler.schedule(now_ms=0)
    assert step is not None
    scheduler.fail(step, now_ms=0)
    assert ends(scheduler) == {"a": Refusal.FAILED}
    assert scheduler.blocks.names() == ()
    assert counts(advance(scheduler)) == {"b": 64}


def test_deadlines_end_requests_that_wait_and_that_run() -> None:
    scheduler = make_scheduler(num_blocks=3)
    submit(scheduler, make_request("runs", 70, deadline_ms=50))
    submit(scheduler, make_request("waits", 70, first=1, deadline_ms=20))
    submit(scheduler, make_request("later", 70, first=2))
    advance(scheduler)
    assert scheduler.wakeup_ms() == 20
    scheduler.expire(now_ms=20)
    assert ends(scheduler) == {"waits": Refusal.EXPIRED}
    assert counts(scheduler.schedule(now_ms=50)) == {"later": 64}
    assert ends(scheduler) == {"runs": Refusal.EXPIRED}


def test_a_prefill_only_request_gives_one_token_and_holds_its_blocks_for_the_puller() -> None:
    scheduler = make_scheduler(max_batch_tokens=64)
    submit(scheduler, make_request("a", 70, max_tokens=9, session=5, skip_blocks=1))
    step = advance(scheduler)
    opened, *_ = scheduler.take_decisions()
    blocks = scheduler.roster.sequences["a"].blocks.view().tolist()
    assert opened == SessionOpened("a", 5, tuple(blocks[1:]))
    assert step.slices[0].completes == tuple(blocks[:2])
    last = advance(scheduler)
    assert last.slices[0].completes == (blocks[2],)  # its last block is not going to be filled
    emitted, held = scheduler.take_decisions()
    assert isinstance(emitted, Emitted)
    assert emitted.event.token_ids == (1,)
    assert emitted.event.finish_reason is FinishReason.LENGTH
    assert held == SessionHeld("a", 5, is_aborted=False)
    assert scheduler.blocks.num_available == 5
    scheduler.free_held("a")
    assert scheduler.blocks.num_available == 8


@pytest.mark.parametrize("timeout_ms", [None, 100], ids=["longest", "deadline"])
def test_a_puller_that_does_not_come_is_given_up(timeout_ms: int | None) -> None:
    scheduler = make_scheduler()
    submit(scheduler, make_request("a", 40, session=5, deadline_ms=timeout_ms))
    advance(scheduler)
    scheduler.take_decisions()
    wakeup_ms = scheduler.wakeup_ms()
    assert wakeup_ms == (timeout_ms or scheduler.limits.handoff_hold_ms_max)
    scheduler.expire(now_ms=wakeup_ms)
    assert scheduler.take_decisions() == [SessionHeld("a", 5, is_aborted=True)]
    assert scheduler.wakeup_ms() is None


REFUSED = {
    "empty prompt": (make_request("x", 0), Refusal.INVALID, "prompt"),
    "token beyond the vocabulary": (
        EngineRequest("x", (100,)),
        Refusal.INVALID,
        "prompt",
    ),
    "negative token": (EngineRequest("x", (-1,)), Refusal.INVALID, "prompt"),
    "negative temperature": (make_request("x", temperature=-1.0), Refusal.INVALID, "temperature"),
    "temperature not a number": (
        make_request("x", temperature=float("nan")),
        Refusal.INVALID,
        "temperature",
    ),
    "top_p of 0": (make_request("x", top_p=0.0), Refusal.INVALID, "top_p"),
    "negative top_k": (make_request("x", top_k=-1), Refusal.INVALID, "top_k"),
    "seed too large": (make_request("x", seed=1 << 64), Refusal.INVALID, "seed"),
    "temperature beyond float32": (
        make_request("x", temperature=1e300),
        Refusal.INVALID,
        "temperature",
    ),
    "top_k beyond int32": (make_request("x", top_k=1 << 31), Refusal.INVALID, "top_k"),
    "session beyond 64 bits": (make_request("x", session=1 << 64), Refusal.INVALID, "session_id"),
    "more skipped than there is": (
        make_request("x", session=1, skip_blocks=3),
        Refusal.INVALID,
        "skip_blocks",
    ),
    "no tokens wanted": (make_request("x", max_tokens=0), Refusal.INVALID, "max_tokens"),
    "prompt beyond the context": (make_request("x", 200), Refusal.NEVER_FITS, "prompt"),
    "output beyond the context": (
        make_request("x", 50, max_tokens=151),
        Refusal.NEVER_FITS,
        "max_tokens",
    ),
    "duplicate": (make_request("same"), Refusal.DUPLICATE, "request_id"),
    "late": (make_request("x", deadline_ms=5), Refusal.EXPIRED, None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_at_once(case: str) -> None:
    request, refusal, param = REFUSED[case]
    scheduler = make_scheduler(context_length=200)
    submit(scheduler, make_request("same"))
    with pytest.raises(RefusedError) as refused:
        submit(scheduler, request, now_ms=5)
    assert (refused.value.refusal, refused.value.param) == (refusal, param)
    assert len(scheduler.roster.sequences) == 1


def test_what_can_never_fit_into_memory_is_refused_and_what_just_fits_is_served() -> None:
    scheduler = make_scheduler(num_blocks=3)
    with pytest.raises(RefusedError) as refused:
        submit(scheduler, make_request("x", 90, max_tokens=8))
    assert refused.value.refusal is Refusal.NEVER_FITS
    submit(scheduler, make_request("y", 90, max_tokens=7))  # the last token needs no KV
    for _ in range(8):
        advance(scheduler)
    assert ends(scheduler) == {"y": FinishReason.LENGTH}


def test_the_queue_is_bounded() -> None:
    scheduler = make_scheduler(max_waiting=2)
    submit(scheduler, make_request("a"), make_request("b"))
    with pytest.raises(RefusedError) as refused:
        submit(scheduler, make_request("c"))
    assert refused.value.refusal is Refusal.QUEUE_FULL


def test_a_resumed_request_that_is_complete_ends_without_a_step() -> None:
    scheduler = make_scheduler()
    sampling = Sampling(max_tokens=2)
    done = EngineRequest("a", (1, 2), sampling, resume_tokens=(3, 4))
    stopped = EngineRequest("b", (1, 2), sampling, resume_tokens=(99,))
    submit(scheduler, done, stopped)
    assert ends(scheduler) == {"a": FinishReason.LENGTH, "b": FinishReason.STOP}
    assert scheduler.schedule(now_ms=0) is None


@pytest.mark.parametrize(
    ("token", "sampling", "reason"),
    [
        (99, {}, FinishReason.STOP),
        (99, {"ignore_eos": True}, None),
        (5, {"stop_token_ids": (5,)}, FinishReason.STOP),
        (5, {"stop_token_ids": (5,), "ignore_eos": True}, FinishReason.STOP),
        (5, {}, None),
        (5, {"max_tokens": 1}, FinishReason.LENGTH),
    ],
    ids=["eos", "eos ignored", "stop token", "stop token beside ignore_eos", "other", "length"],
)
def test_output_ends_with(token: int, sampling: dict, reason: FinishReason | None) -> None:
    scheduler = make_scheduler()
    submit(scheduler, make_request("a", **sampling))
    advance(scheduler, token=token)
    assert ends(scheduler).get("a") is reason
