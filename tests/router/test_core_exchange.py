"""Extended keys agreed between replicas: merging in any order, and what a tree does with it."""

from hypothesis import given
from hypothesis import strategies as st
from kvasir_router.core.exchange import Edge, EdgeMap, EdgeRecord
from kvasir_router.core.keys import KeyLimits, KeyTree
from router_builders import make_names

NAMES = make_names("n", 6)
records = st.lists(
    st.builds(
        EdgeRecord,
        name=st.sampled_from(NAMES),
        edge=st.one_of(
            st.none(), st.builds(Edge, depth=st.integers(2, 4), end=st.sampled_from(NAMES))
        ),
        version=st.integers(1, 5),
        origin=st.sampled_from([b"r1", b"r2", b"r3"]),
    ),
    max_size=20,
)


@given(records, st.randoms(), st.integers(1, 6))
def test_merging_does_not_depend_on_order_grouping_or_repetition(
    heard: list[EdgeRecord], rnd, records_max: int
) -> None:
    one, two = (EdgeMap(b"me", records_max=records_max) for _ in range(2))
    one.merge(heard)
    again = heard + [r for r in heard if rnd.random() < 0.5]
    rnd.shuffle(again)
    while again:
        size = rnd.randint(1, len(again))
        two.merge(again[:size])
        again = again[size:]
    assert set(one.records()) == set(two.records())
    assert len(one.records()) <= records_max
    changes = two.num_changes
    assert two.merge(heard) == []
    assert two.num_changes == changes


@given(records)
def test_an_own_decision_wins_over_all_that_was_heard(heard: list[EdgeRecord]) -> None:
    mine = EdgeMap(b"me")
    mine.merge(heard)
    edge = Edge(2, NAMES[0])
    mine.decide(NAMES[0], edge)
    other = EdgeMap(b"other")
    other.merge(mine.records())
    other.merge(heard)
    assert next(r.edge for r in other.records() if r.name == NAMES[0]) == edge


def make_hot_tree(replica: bytes, shared: tuple[bytes, ...]) -> KeyTree:
    tree = KeyTree(KeyLimits(start_blocks=1, dwell_ms=100), replica=replica)
    for i in range(40):
        tree.observe(shared + make_names(f"{i}", 3), num_workers=8, now_ms=i)
    return tree


def test_a_replica_that_has_seen_nothing_takes_over_the_keys_of_another() -> None:
    shared = make_names("system", 50)
    one, two = make_hot_tree(b"one", shared), KeyTree(KeyLimits(start_blocks=1), replica=b"two")
    prompt = shared + make_names("new", 5)
    assert (one.depth(prompt), two.depth(prompt)) == (51, 1)
    version = two.shared_version
    two.merge(one.shared(), now_ms=0)
    assert two.depth(prompt) == 51
    assert two.shared_version > version
    version = two.shared_version
    two.merge(one.shared(), now_ms=1)
    assert two.shared_version == version


def test_few_samples_do_not_undo_what_another_replica_knows() -> None:
    shared = make_names("system", 50)
    two = KeyTree(KeyLimits(start_blocks=1, dwell_ms=100), replica=b"two")
    two.merge(make_hot_tree(b"one", shared).shared(), now_ms=0)
    for i in range(60):
        two.observe(make_names(f"other-{i}", 2), num_workers=8, now_ms=1_000 + i)
    assert two.num_extended == 1
    for i in range(60):
        two.observe(make_names(f"more-{i}", 2), num_workers=8, now_ms=2_000 + i)
    assert two.num_extended == 0


def test_a_key_taken_back_is_taken_back_everywhere() -> None:
    shared = make_names("system", 50)
    one = make_hot_tree(b"one", shared)
    two = KeyTree(replica=b"two")
    two.merge(one.shared(), now_ms=0)
    for i in range(1_200):
        one.observe(make_names(f"other-{i}", 2), num_workers=8, now_ms=10_000 + i)
    assert one.num_extended == 0
    two.merge(one.shared(), now_ms=20_000)
    assert two.num_extended == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 9)), max_size=300))
def test_counts_are_conserved_and_memory_is_bounded_by_the_window(events) -> None:
    limits = KeyLimits(start_blocks=1, window_requests=50, count_min=5, dwell_ms=20)
    tree = KeyTree(limits)
    for at_ms, (family, member, length) in enumerate(events):
        family_names = make_names(f"f{family}", 4)
        names = (family_names + make_names(f"{family}/{member}", 5))[:length]
        tree.observe(names, num_workers=4, now_ms=at_ms)
        assert sum(tree._rested.values()) == len(tree._window) <= 50
        assert all(1 <= tree.depth(names[:n]) <= n for n in range(1, len(names) + 1))
        assert set(tree._turns) == set(tree._changed_ms)
        assert len(tree._turns) == len(tree._changed_ms)
    assert set(tree._edges) <= set(tree._changed_ms)
