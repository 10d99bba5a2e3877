"""What a tier of a KV node keeps and gives up: the pure core."""

import math
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st
from kvasir_kvstore.core.cache import BlockCache, Held, Limits, Origin

NOBODY = Origin()


def names_of(text: str) -> list[bytes]:
    return [letter.encode() for letter in text]


def make_cache(num_slots: int, *, tenant_share_max: float = 1.0, ttl_ms: int = 0) -> BlockCache:
    return BlockCache(Limits.of(num_slots, tenant_share_max=tenant_share_max, ttl_ms=ttl_ms))


def fill(
    cache: BlockCache,
    text: str,
    *,
    origin: Origin = NOBODY,
    now_ms: int = 0,
    evict: Callable[[bytes], bool] = lambda _: True,
) -> list[bytes]:
    """Reserves and commits the missing ones of the names; returns what was evicted."""
    cache.touch(names_of(text))
    taken = cache.reserve(cache.missing(names_of(text)), origin, now_ms=now_ms, evict=evict)
    for name in reversed(taken.names):
        cache.commit(name)
    return list(taken.evicted)


def held(cache: BlockCache) -> str:
    return "".join(sorted(name.decode() for name in cache.names()))


def test_blocks_are_reserved_before_they_are_held() -> None:
    cache = make_cache(4)
    taken = cache.reserve(names_of("abc"), NOBODY, now_ms=0)
    assert (cache.num_reserved, cache.num_held) == (3, 0)
    assert cache.missing(names_of("abcd")) == [b"d"]
    cache.commit(b"a")
    cache.abandon(b"b")
    assert (cache.num_reserved, cache.num_held) == (1, 1)
    assert cache.missing(names_of("abcd")) == [b"b", b"d"]
    assert len(set(taken.slots)) == 3


def test_blocks_that_came_unwanted_go_first_until_they_are_wanted() -> None:
    cache = make_cache(4)
    fill(cache, "ab")
    for name in cache.reserve(names_of("cd"), NOBODY, now_ms=0, is_cold=True).names:
        cache.commit(name)
    cache.touch(names_of("d"))
    assert fill(cache, "e") == [b"c"]
    assert fill(cache, "f") == [b"b"]
    assert held(cache) == "adef"


def test_what_was_wanted_more_often_stays() -> None:
    cache = make_cache(4)
    fill(cache, "ab")
    fill(cache, "cd")
    cache.touch(names_of("ab"))
    assert fill(cache, "ef") == [b"d", b"c"]
    assert held(cache) == "abef"


def test_what_peers_pulled_stays() -> None:
    cache = make_cache(4)
    fill(cache, "ab")
    slots = [cache.find(name, now_ms=0) for name in names_of("ab")]
    fill(cache, "cd")
    cache.touch_slots([found.slot for found in slots if found])
    assert fill(cache, "ef") == [b"d", b"c"]


def test_above_the_high_watermark_the_least_valuable_go_down_to_the_low_one() -> None:
    cache = BlockCache(Limits.of(8, watermarks=(0.75, 0.5)))
    fill(cache, "abcdef")
    assert cache.num_surplus == 0, "not above it"
    fill(cache, "g")
    assert cache.num_surplus == 3
    cache.touch(names_of("f"))
    cache.pin(b"e")
    assert cache.trim(3, evict=lambda name: name != b"d") == names_of("cba")
    assert (cache.num_surplus, held(cache)) == (0, "defg")


def test_of_few_slots_none_is_kept_free() -> None:
    cache = BlockCache(Limits.of(4, watermarks=(0.9, 0.8)))
    fill(cache, "abcd")
    assert cache.num_surplus == 0


@given(
    num_slots=st.integers(1, 30),
    marks=st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)),
    numbers=st.lists(st.integers(0, 40), max_size=80),
    pinned=st.sets(st.integers(0, 40), max_size=4),
)
def test_surplus_is_what_trimming_takes_and_what_stays_is_worth_more(
    num_slots: int, marks: tuple[float, float], numbers: list[int], pinned: set[int]
) -> None:
    high, low = max(marks), min(marks)
    trimmed = BlockCache(Limits.of(num_slots, watermarks=(high, low)))
    whole = make_cache(num_slots)
    for number in numbers:
        for cache in (trimmed, whole):
            fill(cache, chr(number + 48))
    for number in pinned:
        for cache in (trimmed, whole):
            if (name := chr(number + 48).encode()) in cache.names():
                cache.pin(name)
    num_before, count = trimmed.num_held, trimmed.num_surplus
    assert (count > 0) is (num_before > math.ceil(num_slots * high))
    gone = trimmed.trim(count, evict=lambda _: True)
    assert len(gone) == min(count, num_before - len(trimmed._pins))
    assert gone == whole.trim(len(gone), evict=lambda _: True), "in the order of value"
    assert trimmed.num_surplus == 0 or trimmed.num_held == len(trimmed._pins)


def test_a_block_that_was_stored_elsewhere_keeps_its_time() -> None:
    cache = make_cache(4, ttl_ms=100)
    taken = cache.reserve(names_of("ab"), NOBODY, now_ms=1_000, stored_ms={b"a": 950})
    for name in taken.names:
        cache.commit(name)
    assert sorted(cache.blocks(now_ms=1_049)) == names_of("ab")
    assert sorted(cache.blocks(now_ms=1_050)) == names_of("b")


def test_children_go_before_their_parents() -> None:
    cache = make_cache(4)
    fill(cache, "abcd")
    assert fill(cache, "xy") == [b"d", b"c"]
    assert held(cache) == "abxy"


def test_what_comes_back_is_known_and_outlives_what_came_once() -> None:
    cache = make_cache(2)
    fill(cache, "ab")
    assert fill(cache, "x") == [b"b"]
    fill(cache, "b")
    assert fill(cache, "y") != [b"b"]
    assert b"b" in cache.names()


def test_a_block_that_is_read_stays_and_another_goes() -> None:
    cache = make_cache(3)
    fill(cache, "abc")
    assert fill(cache, "x", evict=lambda name: name != b"c") == [b"b"]


def test_a_full_cache_of_pinned_blocks_takes_nothing() -> None:
    cache = make_cache(2)
    fill(cache, "ab")
    cache.pin(b"a")
    cache.pin(b"b")
    assert cache.reserve(names_of("xy"), NOBODY, now_ms=0).names == ()
    cache.unpin(b"b")
    assert cache.reserve(names_of("xy"), NOBODY, now_ms=0).evicted == (b"b",)


def test_fewer_usable_slots_are_filled_again_and_no_others() -> None:
    cache = make_cache(4)
    fill(cache, "ab")
    slots = {found.slot for name in names_of("ab") if (found := cache.find(name, now_ms=0))}
    cache.slots_usable = 2
    taken = cache.reserve(names_of("cd"), NOBODY, now_ms=0)
    assert set(taken.slots) == slots


def test_a_tenant_at_its_quota_gives_up_its_own() -> None:
    cache = make_cache(4, tenant_share_max=0.5)
    a, b = Origin(tenant=b"a"), Origin(tenant=b"b")
    fill(cache, "uv", origin=a)
    fill(cache, "w", origin=b)
    assert fill(cache, "x", origin=a) == [b"v"]
    assert fill(cache, "y", origin=b) == []
    assert cache.tenant_slots(b"a") == cache.tenant_slots(b"b") == 2


def test_a_block_is_found_until_its_time_is_over() -> None:
    cache = make_cache(4, ttl_ms=100)
    fill(cache, "a", now_ms=1000)
    fill(cache, "b", now_ms=1050)
    assert cache.find(b"a", now_ms=1099)
    assert cache.find(b"a", now_ms=1100) is None
    assert cache.expire(now_ms=1100, evict=lambda _: False) == []
    assert cache.expire(now_ms=1100, evict=lambda _: True) == [b"a"]
    assert held(cache) == "b"


def test_what_is_restored_keeps_its_slots_and_its_age() -> None:
    cache = make_cache(4, tenant_share_max=0.5, ttl_ms=100)
    blocks = {name: Held(slot, NOBODY, 1000) for slot, name in enumerate(names_of("abc"), start=1)}
    assert cache.restore(blocks) == names_of("ab")
    taken = cache.reserve(names_of("xy"), Origin(tenant=b"t"), now_ms=1050)
    assert not {1, 2} & set(taken.slots)
    assert cache.expire(now_ms=1100, evict=lambda _: True) == names_of("ab")


CHAINS = st.text(alphabet="abcdefghij", min_size=1, max_size=8)
TENANTS = st.sampled_from([b"", b"t", b"u"])
STEPS = st.tuples(
    st.sampled_from(["fill", "abandon", "touch", "pin", "unpin", "expire", "drop"]), CHAINS, TENANTS
)


def _step(
    cache: BlockCache, step: tuple[str, str, bytes], *, now_ms: int, busy: set[bytes]
) -> None:
    what, text, tenant = step
    names = names_of(text)
    if what in ("fill", "abandon"):
        taken = cache.reserve(
            cache.missing(names),
            Origin(tenant=tenant),
            now_ms=now_ms,
            evict=lambda name: name not in busy,
        )
        assert not set(taken.evicted) & busy
        for name in taken.names:
            (cache.commit if what == "fill" else cache.abandon)(name)
    elif what == "touch":
        cache.touch(names)
    elif what == "expire":
        cache.expire(now_ms=now_ms, evict=lambda _: True)
    elif what == "drop" and names[0] in cache.names() and not cache.is_pinned(names[0]):
        cache.drop(names[0])


@given(
    num_slots=st.integers(1, 6),
    share=st.sampled_from([0.2, 0.5, 1.0]),
    ttl_ms=st.sampled_from([0, 5, 40]),
    steps=st.lists(STEPS, max_size=60),
    busy=st.sets(st.sampled_from(names_of("abcdefghij"))),
)
def test_whatever_happens_the_bounds_hold(
    num_slots: int,
    share: float,
    ttl_ms: int,
    steps: list[tuple[str, str, bytes]],
    busy: set[bytes],
) -> None:
    """Never over capacity or quota; slots are held once; pinned blocks stay; the expired do not."""
    cache = make_cache(num_slots, tenant_share_max=share, ttl_ms=ttl_ms)
    quota = max(1, int(num_slots * share))
    pinned: list[bytes] = []
    for now_ms, step in enumerate(steps):
        name = names_of(step[1])[0]
        if step[0] == "pin" and name in cache.names():
            cache.pin(name)
            pinned.append(name)
        elif step[0] == "unpin" and pinned:
            cache.unpin(pinned.pop())
        else:
            _step(cache, step, now_ms=now_ms, busy=busy)
        found = [cache.find(name, now_ms=now_ms) for name in cache.names()]
        assert cache.num_held <= num_slots
        assert cache.num_reserved == 0
        assert len({cache._held[name].slot for name in cache.names()}) == cache.num_held
        assert all(cache.tenant_slots(t) <= quota for t in (b"", b"t", b"u"))
        assert sum(cache.tenant_slots(t) for t in (b"", b"t", b"u")) == cache.num_held
        assert set(pinned) <= set(cache.names())
        assert all(not ttl_ms or now_ms - block.stored_ms < ttl_ms for block in found if block)
