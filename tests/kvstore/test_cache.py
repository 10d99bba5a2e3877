"""What a KV node keeps and gives up: the pure core."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvasir_kvstore.core.cache import BlockCache


def names_of(text: str) -> list[bytes]:
    return [letter.encode() for letter in text]


def fill(cache: BlockCache, text: str, *, uses: Callable[[int], int] = lambda _: 0) -> list[bytes]:
    """Reserves and commits the missing ones of the names; returns what was evicted."""
    taken = cache.reserve(cache.missing(names_of(text)), evict=lambda _: True, uses=uses)
    for name, slot in zip(taken.names, taken.slots, strict=True):
        cache.commit(name, uses=uses(slot))
    cache.touch(names_of(text))
    return list(taken.evicted)


def held(cache: BlockCache) -> str:
    return "".join(sorted(name.decode() for name in cache.names()))


def test_blocks_are_reserved_before_they_are_held() -> None:
    cache = BlockCache(4)
    taken = cache.reserve(names_of("abc"), evict=lambda _: True, uses=lambda _: 0)
    assert (cache.num_reserved, cache.num_held) == (3, 0)
    assert cache.missing(names_of("abcd")) == [b"d"]
    cache.commit(b"a", uses=0)
    cache.abandon(b"b")
    assert (cache.num_reserved, cache.num_held) == (1, 1)
    assert cache.missing(names_of("abcd")) == [b"b", b"d"]
    assert len(set(taken.slots)) == 3


def test_the_least_recently_used_chain_goes_first() -> None:
    cache = BlockCache(4)
    fill(cache, "ab")
    fill(cache, "cd")
    cache.touch(names_of("ab"))
    assert fill(cache, "ef") == [b"d", b"c"]
    assert held(cache) == "abef"


def test_children_go_before_their_parents() -> None:
    cache = BlockCache(4)
    fill(cache, "abcd")
    assert fill(cache, "xy") == [b"d", b"c"]
    assert held(cache) == "abxy"


def test_a_pinned_block_stays_and_another_goes() -> None:
    cache = BlockCache(3)
    fill(cache, "abc")
    taken = cache.reserve(names_of("x"), evict=lambda name: name != b"c", uses=lambda _: 0)
    assert taken.evicted == (b"b",)


def test_with_everything_pinned_nothing_is_reserved() -> None:
    cache = BlockCache(2)
    fill(cache, "ab")
    taken = cache.reserve(names_of("xy"), evict=lambda _: False, uses=lambda _: 0)
    assert taken.names == taken.evicted == ()
    assert held(cache) == "ab"


def test_a_block_that_was_pulled_gets_a_second_chance() -> None:
    cache = BlockCache(3)
    uses = [0, 0, 0]
    fill(cache, "a", uses=lambda slot: uses[slot])
    fill(cache, "b", uses=lambda slot: uses[slot])
    fill(cache, "c", uses=lambda slot: uses[slot])
    first = cache.reserve([], evict=lambda _: True, uses=lambda slot: uses[slot])
    assert first.slots == ()
    uses[0] = 5  # slots are handed out in order, so this is the block "a"
    assert fill(cache, "x", uses=lambda slot: uses[slot]) == [b"b"]
    assert held(cache) == "acx"
    assert fill(cache, "y", uses=lambda slot: uses[slot]) == [b"c"]
    assert fill(cache, "z", uses=lambda slot: uses[slot]) == [b"a"]


def test_more_names_than_slots_fill_the_leading_part() -> None:
    cache = BlockCache(3)
    fill(cache, "ab")
    taken = cache.reserve(names_of("vwxyz"), evict=lambda _: True, uses=lambda _: 0)
    assert taken.names == tuple(names_of("vwx"))


@given(
    st.lists(
        st.tuples(st.text("abcdefgh", min_size=1, max_size=5), st.text("abcdefgh", max_size=3)),
        max_size=40,
    ),
    st.integers(1, 6),
)
def test_every_slot_is_in_one_state(steps: list[tuple[str, str]], num_slots: int) -> None:
    cache = BlockCache(num_slots)
    slot_of: dict[bytes, int] = {}
    for wanted, pinned in steps:
        taken = cache.reserve(
            cache.missing(names_of(wanted)),
            evict=lambda name, pins=pinned: name.decode() not in pins,  # type: ignore[misc]
            uses=lambda _: 0,
        )
        for name in taken.evicted:
            del slot_of[name]
        for i, (name, slot) in enumerate(zip(taken.names, taken.slots, strict=True)):
            assert slot not in slot_of.values()
            if i % 2:
                cache.abandon(name)
            else:
                cache.commit(name, uses=0)
                slot_of[name] = slot
        assert set(cache.names()) == set(slot_of)
        assert len(set(slot_of.values())) == len(slot_of) <= num_slots
        assert cache.num_reserved == 0


@pytest.mark.parametrize("call", ["commit", "abandon"])
def test_a_name_that_is_not_reserved_is_a_bug(call: str) -> None:
    cache = BlockCache(1)
    with pytest.raises(KeyError):
        cache.commit(b"a", uses=0) if call == "commit" else cache.abandon(b"a")
