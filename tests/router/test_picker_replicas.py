"""Which replica a gateway is told: affinity, bounded load, and what the gateway would take."""

import os
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from kvasir_router.core.replicas import SLACK, choose_replica
from kvasir_router.core.ring import RingPair

KEYS = st.binary(min_size=16, max_size=16)
NAMES = st.sets(st.text("abcdef", min_size=1, max_size=3), min_size=1, max_size=8)


@settings(max_examples=25)
@given(NAMES, KEYS)
def test_idle_replicas_get_a_key_always_at_the_same_place(names: set[str], key: bytes) -> None:
    rings = RingPair.build(names)
    assert choose_replica(rings, key, {}) == rings.candidates(key)[0]


@settings(max_examples=25)
@given(NAMES, KEYS, st.integers(1, 200))
def test_one_hot_key_never_overloads_its_home(names: set[str], key: bytes, num: int) -> None:
    rings, held = RingPair.build(names), Counter[str]()
    for _ in range(num):
        chosen = choose_replica(rings, key, held)
        assert chosen is not None
        held[chosen] += 1
    assert max(held.values()) <= SLACK + num / len(names) + 1


@settings(max_examples=25)
@given(NAMES, NAMES, KEYS, st.dictionaries(st.text("abcdef", max_size=3), st.integers(0, 99)))
def test_choice_is_never_one_that_is_to_be_avoided(
    names: set[str], avoid: set[str], key: bytes, held: dict[str, int]
) -> None:
    chosen = choose_replica(RingPair.build(names), key, held, avoid=frozenset(avoid))
    assert chosen in names - avoid or (chosen is None and names <= avoid)


def test_different_keys_use_all_replicas() -> None:
    rings = RingPair.build(("a", "b", "c"))
    shares = Counter(choose_replica(rings, os.urandom(16), {}) for _ in range(600))
    assert min(shares[name] for name in "abc") > 100
