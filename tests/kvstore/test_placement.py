"""Where a chain is kept, and how answers of several nodes are joined."""

import os

import pytest
from kvasir_kvstore.core.placement import Run, leading_runs, rank_nodes

NODES = [f"10.0.0.{i}:7000" for i in range(8)]


def test_every_worker_ranks_alike() -> None:
    head = os.urandom(16)
    assert rank_nodes(head, NODES) == rank_nodes(head, reversed(NODES))
    assert sorted(rank_nodes(head, NODES)) == sorted(NODES)
    assert rank_nodes(head, []) == []


def test_chains_spread_evenly() -> None:
    counts = dict.fromkeys(NODES, 0)
    for i in range(4000):
        counts[rank_nodes(i.to_bytes(16, "big"), NODES)[0]] += 1
    assert all(400 < count < 600 for count in counts.values())


def test_a_node_that_goes_moves_only_its_own_chains() -> None:
    gone = NODES[3]
    rest = [node for node in NODES if node != gone]
    for i in range(500):
        head = i.to_bytes(16, "big")
        before = rank_nodes(head, NODES)
        assert rank_nodes(head, rest) == [node for node in before if node != gone]


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
