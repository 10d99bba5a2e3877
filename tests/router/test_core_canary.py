"""Canaries: who needs one, who is tried with whom, what outcomes mean, and the bounds."""

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvasir_router.core.canary import (
    CHECKS_MAX,
    FAILURES_MAX,
    PEERS_MAX,
    RECHECK_MS,
    RETRY_MS_MAX,
    Canaries,
    Check,
    Outcome,
    Result,
    Seat,
    Standing,
)

CROSSED = Result(Outcome.CROSSED)
FAILED = Result(Outcome.FAILED, "unreachable")
BUSY = Result(Outcome.BUSY, "no memory")


def make_seat(name: str, *, crossed: bool = False, life: int = 1, role: str = "") -> Seat:
    """Named by its role: p1 prefills, d1 decodes, b1 does both."""
    role = role or name[0]
    return Seat(name, (b"u", life), role == "p", role == "d", crossed)


def seated(*names: str) -> Canaries:
    canaries = Canaries()
    canaries.seat([make_seat(name) for name in names], now_ms=0)
    return canaries


def stands(canaries: Canaries, *names: str) -> list[Standing]:
    return [canaries.standing(name)[0] for name in names]


def test_who_serves_alone_or_in_both_roles_needs_none() -> None:
    for names in (("d1", "d2"), ("p1",), ("b1", "d1"), ("b1", "p1", "b2")):
        canaries = seated(*names)
        assert set(stands(canaries, *names)) == {Standing.NOT_NEEDED}
        assert canaries.due(0) == []


def test_a_new_pair_is_pending_until_a_canary_has_crossed() -> None:
    canaries = seated("p1", "d1")
    assert canaries.standing("p1")[1] == (
        "no KV block has crossed yet between it and a decode worker"
    )
    assert stands(canaries, "p1", "d1") == [Standing.PENDING] * 2
    (check,) = canaries.due(0)
    assert check == Check("d1", ("p1",))
    assert canaries.due(0) == [], "it runs already"
    canaries.ended(check, [CROSSED], now_ms=10)
    assert Standing.PENDING not in stands(canaries, "p1", "d1")
    canaries.seat([make_seat("p1", crossed=True), make_seat("d1", crossed=True)], now_ms=20)
    assert stands(canaries, "p1", "d1") == [Standing.CROSSED] * 2
    assert canaries.due(10 + RECHECK_MS - 1) == []
    assert canaries.due(10 + RECHECK_MS) == [check]


def test_the_first_failure_of_a_new_pair_is_believed_and_tried_again_soon() -> None:
    canaries = seated("p1", "d1")
    (check,) = canaries.due(0)
    canaries.ended(check, [FAILED], now_ms=0)
    assert canaries.standing("d1") == (Standing.FAILED, "unreachable")
    assert canaries.standing("p1") == (Standing.FAILED, "unreachable")
    (check,) = canaries.due(RETRY_MS_MAX)
    canaries.ended(check, [CROSSED], now_ms=RETRY_MS_MAX)
    assert Standing.FAILED not in stands(canaries, "p1", "d1")


def test_a_path_that_worked_is_given_up_after_some_failures_in_a_row() -> None:
    canaries = Canaries()
    canaries.seat([make_seat("p1", crossed=True), make_seat("d1", crossed=True)], now_ms=0)
    now_ms = RECHECK_MS
    for num in range(1, FAILURES_MAX + 1):
        (check,) = canaries.due(now_ms)
        canaries.ended(check, [FAILED], now_ms=now_ms)
        expected = Standing.FAILED if num == FAILURES_MAX else Standing.CROSSED
        assert stands(canaries, "p1", "d1") == [expected] * 2
        now_ms += RETRY_MS_MAX


def test_a_worker_that_was_ready_alone_does_not_become_unready_by_company() -> None:
    canaries = seated("d1")
    canaries.seat([make_seat("d1"), make_seat("p1")], now_ms=5)
    assert stands(canaries, "d1", "p1") == [Standing.NOT_NEEDED, Standing.PENDING]


def test_a_busy_peer_proves_nothing() -> None:
    canaries = seated("p1", "d1")
    (check,) = canaries.due(0)
    canaries.ended(check, [BUSY], now_ms=0)
    assert canaries.standing("d1") == (Standing.PENDING, "no memory")


def test_one_bad_lender_is_not_the_pullers_fault_and_shows() -> None:
    canaries = seated("p1", "p2", "d1")
    outcomes = {"p1": FAILED, "p2": CROSSED}
    run_until(canaries, lambda check: answers(check, outcomes), end_ms=60_000)
    assert stands(canaries, "p1", "p2", "d1") == [
        Standing.FAILED,
        Standing.NOT_NEEDED,
        Standing.NOT_NEEDED,
    ]


def test_a_restarted_worker_begins_anew_and_a_flipped_one_does_not() -> None:
    canaries = seated("p1", "d1")
    (check,) = canaries.due(0)
    canaries.ended(check, [CROSSED], now_ms=0)
    canaries.seat([make_seat("p1", life=2), make_seat("d1", role="p"), make_seat("d2")], now_ms=9)
    assert stands(canaries, "p1", "d1", "d2") == [
        Standing.PENDING,
        Standing.NOT_NEEDED,
        Standing.PENDING,
    ]


def answers(check: Check, outcomes: dict[str, Result]) -> list[Result]:
    """What a decode worker answers: it stops at the first that crosses."""
    found = []
    for lender in check.lenders:
        found.append(outcomes[lender])
        if found[-1] is CROSSED:
            break
    return found


def run_until(
    canaries: Canaries, answer: Callable[[Check], list[Result]], *, end_ms: int
) -> list[Check]:
    """Runs every check at once, until `end_ms`."""
    ran = []
    for now_ms in range(0, end_ms, 1000):
        for check in canaries.due(now_ms):
            canaries.ended(check, answer(check), now_ms=now_ms)
            ran.append(check)
    return ran


@settings(max_examples=60)
@given(
    num_prefill=st.integers(0, 9),
    num_decode=st.integers(0, 9),
    num_both=st.integers(0, 2),
    bad=st.sets(st.integers(0, 8)),
)
def test_every_worker_is_proven_and_only_bad_ones_fail(
    num_prefill: int, num_decode: int, num_both: int, bad: set[int]
) -> None:
    lenders = [f"p{i}" for i in range(num_prefill)]
    names = [*lenders, *(f"d{i}" for i in range(num_decode)), *(f"b{i}" for i in range(num_both))]
    canaries = seated(*names)
    outcomes = {name: FAILED if int(name[1:]) in bad else CROSSED for name in lenders}
    run_until(canaries, lambda check: answers(check, outcomes), end_ms=60_000)
    is_needed = num_prefill and num_decode
    all_bad = all(result is FAILED for result in outcomes.values())
    for name in names:
        fails = outcomes[name] is FAILED if name in outcomes else all_bad and name[0] == "d"
        found = canaries.standing(name)[0]
        assert found is (Standing.FAILED if is_needed and fails else Standing.NOT_NEEDED)


@settings(max_examples=40)
@given(data=st.data())
def test_checks_are_bounded_and_a_worker_pulls_once_at_a_time(data: st.DataObject) -> None:
    names = [f"{role}{i}" for role in "pd" for i in range(data.draw(st.integers(0, 9)))]
    canaries, running, now_ms = seated(*names), [], 0
    for _ in range(8):
        running += canaries.due(now_ms)
        assert len(running) <= CHECKS_MAX
        assert len({check.decode for check in running}) == len(running)
        assert all(0 < len(set(c.lenders)) == len(c.lenders) <= PEERS_MAX for c in running)
        for check in data.draw(
            st.lists(st.sampled_from(running), unique=True) if running else st.just([])
        ):
            running.remove(check)
            num = data.draw(st.integers(1, len(check.lenders)))
            results = data.draw(
                st.lists(st.sampled_from([CROSSED, FAILED, BUSY]), min_size=num, max_size=num)
            )
            canaries.ended(check, results, now_ms=now_ms)
        now_ms += data.draw(st.integers(0, 20_000))
        names = data.draw(st.lists(st.sampled_from(names), unique=True)) if names else []
        canaries.seat([make_seat(name) for name in names], now_ms=now_ms)


def test_failures_are_tried_less_and_less_often() -> None:
    canaries = seated("p1", "d1")
    times = []
    for now_ms in range(0, 60_000, 250):
        for check in canaries.due(now_ms):
            times.append(now_ms)
            canaries.ended(check, [FAILED], now_ms=now_ms)
    gaps = [b - a for a, b in pairwise(times)]
    assert gaps == sorted(gaps)
    assert gaps[-1] == RETRY_MS_MAX


@pytest.mark.parametrize("num_lenders", [1, 3])
def test_one_bad_puller_is_not_the_lenders_fault(num_lenders: int) -> None:
    """One that pulls well and one that cannot; the lenders' own word is good."""
    canaries = Canaries()
    lenders = [f"p{i}" for i in range(num_lenders)]
    seats = [make_seat(name, crossed=name != "d1") for name in ("d1", "d2", *lenders)]
    canaries.seat(seats, now_ms=0)
    checks: list[tuple[int, Check]] = []
    bad_ms = 0
    for now_ms in range(0, 180_000, 50):
        for check in [check for at_ms, check in checks if at_ms <= now_ms]:
            is_bad = check.decode == "d1"
            results = [FAILED] * len(check.lenders) if is_bad else [CROSSED]
            canaries.ended(check, results, now_ms=now_ms)
        checks = [(at_ms, check) for at_ms, check in checks if at_ms > now_ms]
        checks += [(now_ms + 50, check) for check in canaries.due(now_ms)]
        assert Standing.FAILED not in stands(canaries, "d2", *lenders)
        bad_ms += 50 * (stands(canaries, "d1") == [Standing.FAILED])
    assert bad_ms > 150_000
