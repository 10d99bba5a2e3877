"""Work in the order in which it is due, with sums: is all of it in time, and if not, whose fault.

A treap ordered by (due, number). Each node carries, for its subtree, the total of compute, the
latest end relative to what is due, and the entry with the greatest blame. All operations are
O(log n) in expectation; the shape depends on the numbers alone: equal histories, equal trees.
"""

from dataclasses import dataclass, field

Blame = tuple[int, int, float]
"""Who goes first when not all can be in time; the greatest goes."""

NEVER_LATE = float("-inf")


@dataclass(slots=True, eq=False)
class Node:
    """An entry. `late_ms` and the like are those of its subtree, were its work to start at 0."""

    request_id: str | int
    number: int
    due_ms: float
    compute_ms: float
    blame: Blame
    heap: int = field(init=False)
    left: "Node | None" = field(init=False)
    right: "Node | None" = field(init=False)
    sum_ms: float = field(init=False)
    late_ms: float = field(init=False)
    worst: "Node | None" = field(init=False)

    def __post_init__(self) -> None:
        self.heap = _mixed(self.number)
        self.left = self.right = None
        _pull(self)


class DueTree:
    """The entries of one queue."""

    def __init__(self) -> None:
        self._root: Node | None = None

    @property
    def sum_ms(self) -> float:
        """Compute of all entries."""
        return self._root.sum_ms if self._root else 0.0

    def insert(self, node: Node) -> None:
        """Adds a node that is in no tree."""
        self._root = _insert(self._root, node)

    def remove(self, node: Node) -> None:
        """Takes out a node that is in this tree."""
        self._root = _remove(self._root, node)
        node.left = node.right = None
        _pull(node)

    def first(self) -> Node | None:
        """The node that is due first."""
        node = self._root
        while node is not None and node.left is not None:
            node = node.left
        return node

    def late_ms(self, start_ms: float) -> float:
        """By how much the worst entry misses what it is due, if work starts then; below 0: none."""
        return start_ms + self._root.late_ms if self._root else NEVER_LATE

    def late_before(self, node: Node, start_ms: float) -> float:
        """As `late_ms`, of the entries due before `node` alone."""
        at, ahead_ms, late_ms = self._root, start_ms, NEVER_LATE
        while at is not None and at is not node:
            if _is_before(node, at):
                at = at.left
                continue
            left_ms = at.left.sum_ms if at.left else 0.0
            if at.left is not None:
                late_ms = max(late_ms, ahead_ms + at.left.late_ms)
            ahead_ms += left_ms + at.compute_ms
            late_ms = max(late_ms, ahead_ms - at.due_ms)
            at = at.right
        if at is not None and at.left is not None:
            late_ms = max(late_ms, ahead_ms + at.left.late_ms)
        return late_ms

    def victim(self, start_ms: float) -> Node | None:
        """Moore-Hodgson's step: of the entries up to the first late one, the most to blame."""
        node, ahead_ms, worst = self._root, start_ms, None
        if node is None or start_ms + node.late_ms <= 0:
            return None
        while node is not None:
            left = node.left
            if left is not None and ahead_ms + left.late_ms > 0:
                node = left
                continue
            worst = _worse(_worse(worst, left.worst if left else None), node)
            ahead_ms += (left.sum_ms if left else 0.0) + node.compute_ms
            if ahead_ms > node.due_ms:
                return worst
            node = node.right
        return None  # late by rounding alone: the sums are added in another order here


def _mixed(number: int) -> int:
    mixed = number * 0x9E3779B97F4A7C15 & (1 << 64) - 1
    return (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1


def _is_before(one: Node, two: Node) -> bool:
    return (one.due_ms, one.number) < (two.due_ms, two.number)


def _worse(one: Node | None, two: Node | None) -> Node | None:
    if one is None or two is None:
        return one or two
    return two if (two.blame, two.number) > (one.blame, one.number) else one


def _pull(node: Node) -> None:
    """Sums of a node from those of its children."""
    left, right = node.left, node.right
    end_ms = node.compute_ms + (left.sum_ms if left else 0.0)
    late_ms = end_ms - node.due_ms
    worst: Node | None = node
    if left is not None:
        late_ms = max(late_ms, left.late_ms)
        worst = _worse(worst, left.worst)
    if right is not None:
        late_ms = max(late_ms, end_ms + right.late_ms)
        end_ms += right.sum_ms
        worst = _worse(worst, right.worst)
    node.sum_ms, node.late_ms, node.worst = end_ms, late_ms, worst


def _insert(root: Node | None, node: Node) -> Node:
    if root is None:
        return node
    if node.heap > root.heap:
        node.left, node.right = _split(root, node)
        root = node
    elif _is_before(node, root):
        root.left = _insert(root.left, node)
    else:
        root.right = _insert(root.right, node)
    _pull(root)
    return root


def _split(root: Node | None, at: Node) -> tuple[Node | None, Node | None]:
    """What is due before `at`, and what after."""
    if root is None:
        return None, None
    if _is_before(root, at):
        root.right, after = _split(root.right, at)
        _pull(root)
        return root, after
    before, root.left = _split(root.left, at)
    _pull(root)
    return before, root


def _remove(root: Node | None, node: Node) -> Node | None:
    assert root is not None, "the node is in the tree"
    if root is node:
        return _merge(root.left, root.right)
    if _is_before(node, root):
        root.left = _remove(root.left, node)
    else:
        root.right = _remove(root.right, node)
    _pull(root)
    return root


def _merge(left: Node | None, right: Node | None) -> Node | None:
    if left is None or right is None:
        return left or right
    if left.heap > right.heap:
        left.right = _merge(left.right, right)
        _pull(left)
        return left
    right.left = _merge(left, right.left)
    _pull(right)
    return right
