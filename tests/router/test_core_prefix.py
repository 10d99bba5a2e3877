"""Who holds what: workers that do not tell, bounds, memory, and the ledger's sums."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvasir_router._native import PrefixIndex
from kvasir_router.core.ledger import Ledger
from kvasir_router.core.order import Order
from kvasir_router.core.prefix import HOLDERS_MAX, PrefixView
from router_builders import make_names


def test_what_was_routed_to_a_silent_worker_is_taken_to_be_there_until_it_ages() -> None:
    view = PrefixView(blocks_max=1_000, routed_ttl_ms=1_000)
    one, two, three = (make_names(seed, 4) for seed in ("one", "two", "three"))
    view.routed("a", one, now_ms=0, blocks_max=10)
    view.routed("a", two, now_ms=100, blocks_max=10)
    assert view.leading(one) == {"a": 4}
    view.routed("a", one, now_ms=200, blocks_max=10)
    view.routed(
        "a", three, now_ms=300, blocks_max=10
    )  # no room for all: `two` was used longest ago
    assert [view.leading(names) for names in (one, two, three)] == [{"a": 4}, {"a": 2}, {"a": 4}]
    view.routed("a", three, now_ms=1_250, blocks_max=10)
    assert [view.leading(names) for names in (one, two, three)] == [{}, {}, {"a": 4}]
    view.forget("a")
    assert view.leading(three) == {}


@given(
    st.lists(st.lists(st.integers(0, 40), unique=True, max_size=8), max_size=40),
    st.integers(1, 20),
)
def test_an_imitated_cache_evicts_as_a_real_one(prompts: list[list[int]], size: int) -> None:
    names = make_names("n", 41)
    view, cache = PrefixView(blocks_max=1_000), dict[bytes, None]()
    for at_ms, prompt in enumerate(prompts):
        chosen = [names[n] for n in prompt]
        view.routed("a", chosen, now_ms=at_ms, blocks_max=size)
        for name in reversed(chosen):
            cache.pop(name, None)
            cache[name] = None
        while len(cache) > size:
            del cache[next(iter(cache))]
    assert {n for n in names if view.leading([n])} == set(cache)


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, 30))
def test_a_small_index_agrees_with_sets_and_drops_the_oldest(seed: int, blocks_max: int) -> None:
    rnd, names = random.Random(seed), make_names("n", 24)
    view, truth = PrefixView(blocks_max=blocks_max), dict[bytes, set[str]]()
    for _ in range(150):
        worker, some = f"w{rnd.randrange(9)}", rnd.sample(names, rnd.randrange(6))
        kind = rnd.choice(["stored", "stored", "removed", "forget"])
        if kind == "forget":
            view.forget(worker)
            for holders in truth.values():
                holders.discard(worker)
        elif kind == "removed":
            view.removed(worker, some)
            for name in some:
                truth.get(name, set()).discard(worker)
        else:
            view.stored(worker, some)
            for name in some:
                truth[name] = truth.pop(name, set()) | {worker}
        # a name that nobody holds may still take a place until it is swept out: skip full indexes
        if len(truth) > blocks_max or len(view) > blocks_max - 1:
            return
        for name in names:
            assert set(view.leading([name])) == truth.get(name, set())


def test_names_are_found_among_many_whatever_was_erased() -> None:
    rnd = random.Random(7)
    index = PrefixIndex(blocks_max=100_000)
    seat, held = index.take_seat(), dict[bytes, None]()

    def holds(name: bytes) -> bool:
        return index.match([name], ("a",), {"a": seat}, ["a"], 0)["a"] == 1

    for _ in range(60):
        new = [rnd.randbytes(16) for _ in range(500)]
        index.store(seat, new)
        held.update(dict.fromkeys(new))
        gone = rnd.sample(list(held), 300)
        index.remove(seat, gone)
        for name in gone:
            del held[name]
        assert not any(map(holds, gone))
    assert len(index) == index.num_blocks(seat) == len(held)
    assert all(map(holds, held))


def test_a_match_names_the_wanted_and_the_longest_holders() -> None:
    view, names = PrefixView(blocks_max=1_000), make_names("n", 100)
    for i in range(100):
        view.stored(f"w{i}", names[: i + 1])
    runs = view.match(names, ("w5", "nobody"))
    assert list(runs)[:HOLDERS_MAX] == [f"w{i}" for i in range(99, 99 - HOLDERS_MAX, -1)]
    assert (runs["w5"], runs["nobody"]) == (6, 0)
    assert view.match((), ("w5",)) == {"w5": 0}


def test_names_of_another_size_are_refused() -> None:
    view = PrefixView(blocks_max=10)
    for bad in ([b"short"], [b"x" * 17], ["x" * 16]):
        with pytest.raises(ValueError, match="16 bytes"):
            view.stored("a", bad)
    with pytest.raises(TypeError):
        PrefixIndex(blocks_max=10).store(0, 5)
    with pytest.raises(IndexError):
        PrefixIndex(blocks_max=10).store(3, [])


@pytest.mark.slow
def test_a_million_blocks_take_less_than_200_mb() -> None:
    rnd, view = random.Random(1), PrefixView(blocks_max=1_000_000)
    for start in range(0, 1_000_000, 10_000):
        names = [rnd.randbytes(16) for _ in range(10_000)]
        view.stored(f"w{start // 10_000 % 64}", names)
        view.routed(f"silent{start // 10_000 % 64}", names, now_ms=0, blocks_max=20_000)
    assert len(view) == 1_000_000
    assert view.num_bytes < 200 * 2**20


@given(
    st.lists(
        st.tuples(st.sampled_from(["sent", "reported", "prefilled"]), st.integers(0, 9)),
        max_size=80,
    )
)
def test_queue_totals_are_conserved(events) -> None:
    ledger, waiting = Ledger(), dict[str, tuple[int, int]]()
    for now_ms, (kind, number) in enumerate(events):
        if kind == "sent":
            ledger.sent("a", request_id=f"r{number}", tokens=number, now_ms=now_ms)
            waiting[f"r{number}"] = (number, now_ms)
        elif kind == "prefilled":
            ledger.prefilled("a", request_id=f"r{number}")
            waiting.pop(f"r{number}", None)
        else:
            ledger.reported("a", now_ms=now_ms)
            waiting = {r: e for r, e in waiting.items() if e[1] > now_ms - 20}
        assert ledger.tokens("a") == sum(tokens for tokens, _ in waiting.values())


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.one_of(st.none(), st.integers(0, 3)))))
def test_an_order_is_a_sorted_dictionary(changes) -> None:
    order, truth = Order(), dict[str, int]()
    for name, key in changes:
        if key is None:
            order.discard(name)
            truth.pop(name, None)
        else:
            order.put(name, (key,))
            truth[name] = key
        assert list(order) == sorted(truth, key=lambda n: (truth[n], n))
        assert order.least_key() == ((min(truth.values()),) if truth else None)
        assert len(order) == len(truth)
