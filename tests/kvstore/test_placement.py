"""Where a chain is kept, and how answers of several nodes are joined."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvasir_kvstore.core.placement import (
    SLOW_START_MS,
    Run,
    leading_runs,
    node_weight,
    rank_nodes,
)

NODES = [f"10.0.0.{i}:7000" for i in range(8)]
EQUAL = dict.fromkeys(NODES, 1.0)
WEIGHTS = st.dictionaries(st.sampled_from(NODES), st.floats(0.01, 100), min_size=1)
HEADS = [i.to_bytes(16, "big") for i in range(64)]


def test_every_worker_ranks_alike() -> None:
    head = os.urandom(16)
    assert rank_nodes(head, EQUAL) == rank_nodes(head, dict(reversed(EQUAL.items())))
    assert sorted(rank_nodes(head, EQUAL)) == sorted(NODES)
    assert rank_nodes(head, {}) == []


def test_chains_spread_by_weight() -> None:
    weights = EQUAL | {NODES[0]: 2.0, NODES[1]: 0.5, NODES[2]: 0.0}
    counts = dict.fromkeys(NODES, 0)
    for i in range(6000):
        counts[rank_nodes(i.to_bytes(16, "big"), weights)[0]] += 1
    share = 6000 / sum(weights.values())
    for node, count in counts.items():
        assert abs(count - share * weights[node]) < 0.15 * share + 1


@given(weights=WEIGHTS, gone=st.sampled_from(NODES), replicas=st.integers(1, 3))
def test_a_node_that_goes_moves_only_its_own_chains(
    weights: dict[str, float], gone: str, replicas: int
) -> None:
    rest = {node: weight for node, weight in weights.items() if node != gone}
    for head in HEADS:
        before = rank_nodes(head, weights)
        after = rank_nodes(head, rest)
        assert after == [node for node in before if node != gone]
        if gone not in before[:replicas]:
            assert after[:replicas] == before[:replicas]


@given(weights=WEIGHTS, node=st.sampled_from(NODES), factor=st.floats(1, 10))
def test_a_node_that_grows_gains_chains_and_no_other_does(
    weights: dict[str, float], node: str, factor: float
) -> None:
    grown = weights | {node: weights.get(node, 0.01) * factor}
    for head in HEADS:
        before = rank_nodes(head, weights | {node: weights.get(node, 0.01)})
        after = rank_nodes(head, grown)
        assert after.index(node) <= before.index(node)
        assert [n for n in after if n != node] == [n for n in before if n != node]


def test_a_new_node_starts_with_a_part_and_ends_with_its_whole_weight() -> None:
    old = 10 * SLOW_START_MS
    ages = range(0, 2 * SLOW_START_MS, 500)
    weights = [node_weight(800, age_ms=age, oldest_age_ms=old + age) for age in ages]
    assert weights[0] == 100
    assert weights == sorted(weights)
    assert len(set(weights)) == 8
    assert node_weight(800, age_ms=SLOW_START_MS, oldest_age_ms=old) == 800
    assert node_weight(800, age_ms=-5, oldest_age_ms=old) == 100, "a clock that is behind"


def test_nodes_that_started_together_begin_with_all_they_have() -> None:
    assert node_weight(800, age_ms=10, oldest_age_ms=20_000) == 800


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([], []),
        ([[]], []),
        ([[Run("a", 0, 5)]], [("a", 0, 5)]),
        ([[Run("a", 0, 2), Run("a", 3, 2)]], [("a", 0, 2)]),
        ([[Run("a", 1, 4)]], []),
        ([[Run("a", 0, 2)], [Run("b", 0, 4)]], [("b", 0, 4)]),
        ([[Run("a", 0, 3)], [Run("b", 2, 3)]], [("a", 0, 3), ("b", 3, 2)]),
        ([[Run("a", 0, 9)]], [("a", 0, 6)]),
        ([[Run("a", 0, 0)]], []),
    ],
    ids=[
        "no answers",
        "empty",
        "whole",
        "gap",
        "no head",
        "longest",
        "joined",
        "beyond the names",
        "empty run",
    ],
)
def test_leading_runs(answers: list[list[Run[str]]], expected: list[tuple[str, int, int]]) -> None:
    runs = leading_runs(answers, num_names=6)
    assert [(run.holder, run.first, run.count) for run in runs] == expected
