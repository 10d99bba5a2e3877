"""The exact search against enumeration, and its bounds."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvasir_operator.core.planner import cover
from kvasir_operator.core.planner.cover import Choice, Problem, cheapest

COVERS = st.sampled_from([0.0, 0.1, 0.25, 0.34, 0.5, 1.0])


@st.composite
def choices(draw: st.DrawFn) -> Choice:
    is_prefill = draw(st.booleans())
    cover_own, cover_other = draw(COVERS), draw(COVERS)
    low = draw(st.integers(0, 2))
    high = draw(st.integers(low, 4))
    prefill, decode = (1.0, cover_own, 0.0, 0.0), (0.0, 0.0, 1.0, cover_own)
    lent_prefill, lent_decode = (1.0, cover_other, 0.0, 0.0), (0.0, 0.0, 1.0, cover_other)
    lent_max = draw(st.integers(0, high))
    return Choice(
        low=low,
        high=high,
        cents=draw(st.integers(0, 5)),
        weights=(1, draw(st.integers(0, 3))),
        is_prefill=is_prefill,
        own=prefill if is_prefill else decode,
        other=lent_decode if is_prefill else lent_prefill,
        lent=draw(st.integers(0, lent_max)),
        lent_min=0,
        lent_max=lent_max,
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    low = draw(st.integers(0, 60))
    return Problem(
        choices=tuple(draw(st.lists(choices(), min_size=1, max_size=3))),
        groups=(range(2), range(2, 4)),
        needs=(1.0, draw(st.sampled_from([0.0, 0.5, 1.0])), 1.0, 1.0),
        budgets=(draw(st.integers(0, 12)), draw(st.integers(0, 20))),
        prefill_percent_min=low,
        prefill_percent_max=draw(st.integers(low, 100)),
    )


def enumerate_cheapest(problem: Problem) -> tuple[int, int, int] | None:
    """The least cost, by trying every mix."""
    options = [
        [
            (count, lent)
            for count in range(choice.low, choice.high + 1)
            for lent in range(choice.lent_min, min(choice.lent_max, count) + 1)
        ]
        for choice in problem.choices
    ]
    costs = [
        _cost(problem, mix) for mix in itertools.product(*options) if _is_allowed(problem, mix)
    ]
    return min(costs, default=None)


def _cost(problem: Problem, mix: tuple[tuple[int, int], ...]) -> tuple[int, int, int]:
    pairs = list(zip(problem.choices, mix, strict=True))
    return (
        sum(count * choice.cents for choice, (count, _) in pairs),
        sum(count for _, (count, _) in pairs),
        sum(abs(lent - choice.lent) for choice, (_, lent) in pairs),
    )


def _is_allowed(problem: Problem, mix: tuple[tuple[int, int], ...]) -> bool:
    pairs = list(zip(problem.choices, mix, strict=True))
    for k, need in enumerate(problem.needs):
        covered = sum((n - b) * c.own[k] + b * c.other[k] for c, (n, b) in pairs)
        if covered < need - 1e-9:
            return False
    for k, budget in enumerate(problem.budgets):
        if sum(n * choice.weights[k] for choice, (n, _) in pairs) > budget:
            return False
    prefill = sum(n - b if choice.is_prefill else b for choice, (n, b) in pairs)
    workers = sum(n for _, (n, _) in pairs)
    low, high = problem.prefill_percent_min, problem.prefill_percent_max
    return low * workers <= 100 * prefill <= high * workers


@given(problems())
def test_search_finds_the_cheapest_of_all_mixes(problem: Problem) -> None:
    found = cheapest(problem)
    assert (found.cost if found else None) == enumerate_cheapest(problem)
    if found:
        assert _is_allowed(problem, found.counts)
        assert found.cost == _cost(problem, found.counts)


def make_choice(*, is_prefill: bool, high: int = 1000, cents: int = 0) -> Choice:
    """A pool of workers of which 301 cover prefill and 421 decode."""
    prefill, decode = (1.0, 1 / 300.5, 0.0, 0.0), (0.0, 0.0, 1.0, 1 / 420.2)
    own, other = (prefill, decode) if is_prefill else (decode, prefill)
    return Choice(1, high, cents, (), is_prefill, own, other, 0, 0, 100)


def test_large_fleet_is_searched_within_the_node_bound() -> None:
    pools = (make_choice(is_prefill=True), make_choice(is_prefill=False))
    found = cheapest(Problem(pools, (range(2), range(2, 4)), (1.0,) * 4, ()))
    assert found is not None
    assert found.is_exact
    assert found.counts == ((301, 0), (421, 0))


def test_node_bound_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cover, "NODES_MAX", 3)
    pools = tuple(
        make_choice(is_prefill=p, high=600, cents=c) for p, c in [(True, 3), (False, 2), (True, 1)]
    )
    found = cheapest(Problem(pools, (range(2), range(2, 4)), (1.0,) * 4, ()))
    assert found is not None
    assert not found.is_exact
