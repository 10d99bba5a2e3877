"""Threads of a pool over memory nodes, from files as the kernel writes them."""

from pathlib import Path

import pytest
from kvasir_engine import _native


def spread(folder: Path, nodes: dict[int, str], allowed: range, threads: int) -> list[list[int]]:
    (folder / "online").write_text(",".join(map(str, nodes)) + "\n")
    for node, cpus in nodes.items():
        (folder / f"node{node}").mkdir()
        (folder / f"node{node}" / "cpulist").write_text(cpus + "\n")
    return _native.spread_threads(folder=str(folder), allowed=list(allowed), num_threads=threads)


def test_neighbours_share_a_node_and_nodes_are_filled_evenly(tmp_path: Path) -> None:
    bound = spread(tmp_path, {0: "0-2,6", 2: "3-5"}, range(7), 4)
    assert bound == [[0, 1, 2, 6]] * 2 + [[3, 4, 5]] * 2


def test_processors_that_the_process_may_not_use_do_not_count(tmp_path: Path) -> None:
    assert spread(tmp_path, {0: "0-3", 1: "4-7"}, range(3, 6), 2) == [[3], [4, 5]]


@pytest.mark.parametrize(
    "nodes",
    [{0: "0-7"}, {0: "0-3", 1: ""}, {0: "0-3", 1: "8-11"}, {}],
    ids=["one node", "a node without processors", "a node that may not be used", "none listed"],
)
def test_nothing_is_bound_on_one_node(tmp_path: Path, nodes: dict[int, str]) -> None:
    assert spread(tmp_path, nodes, range(8), 4) == []


@pytest.mark.parametrize("text", ["x", "1-", "3-1", "1,", ",1", "1 2", "-1", "99999999999"])
def test_anything_else_than_a_list_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="not a list of processors"):
        spread(tmp_path, {0: text, 1: "4"}, range(8), 2)
