"""The routing decision: rings, key length, prefix knowledge and the choice itself."""

from hypothesis import given, settings
from hypothesis import strategies as st
from kvasir_router.core.choose import Rejected, RejectReason, Route, RouteReason, excluding, pick
from kvasir_router.core.keys import KeyLimits, KeyTree
from kvasir_router.core.ledger import Ledger
from kvasir_router.core.prefix import PrefixView
from kvasir_router.core.ring import RingPair
from router_builders import make_names, make_request, make_view, make_worker

names_of_workers = st.sets(st.text("abcdefgh0123-", min_size=1, max_size=8), min_size=1, max_size=9)
keys = st.binary(min_size=16, max_size=16)


@given(names_of_workers, keys)
def test_a_pair_is_two_distinct_members_if_two_exist(workers: set[str], key: bytes) -> None:
    pair = RingPair.build(workers).candidates(key)
    assert len(set(pair)) == len(pair) == min(2, len(workers))
    assert set(pair) <= workers


@given(names_of_workers, keys, st.randoms())
def test_replicas_with_equal_members_agree(workers: set[str], key: bytes, rnd) -> None:
    shuffled = list(workers) * 2
    rnd.shuffle(shuffled)
    mine, theirs = RingPair.build(workers), RingPair.build(shuffled)
    assert mine.candidates(key) == theirs.candidates(key)
    assert mine.version == theirs.version


@settings(max_examples=20)
@given(names_of_workers, names_of_workers, names_of_workers)
def test_rings_changed_step_by_step_equal_rings_built_anew(
    one: set[str], two: set[str], three: set[str]
) -> None:
    stepwise = RingPair.build(one).changed(two).changed(three).changed(one | three)
    assert stepwise == RingPair.build(one | three)


@settings(max_examples=20)
@given(st.sets(st.text("abcdefgh", min_size=1), min_size=3, max_size=8), st.data())
def test_removal_remaps_only_the_removed_workers_keys(workers: set[str], data) -> None:
    gone = data.draw(st.sampled_from(sorted(workers)))
    before, after = RingPair.build(workers), RingPair.build(workers - {gone})
    for key in data.draw(st.lists(keys, min_size=20, max_size=40)):
        old = before.candidates(key)
        if gone not in old:
            assert after.candidates(key) == old
        else:
            assert set(old) - {gone} <= set(after.candidates(key))


@given(names_of_workers, keys, st.data())
def test_avoided_workers_are_never_candidates(workers: set[str], key: bytes, data) -> None:
    avoid = frozenset(data.draw(st.sets(st.sampled_from(sorted(workers)))))
    pair = RingPair.build(workers).candidates(key, avoid)
    assert not set(pair) & avoid
    assert len(pair) == min(2, len(workers) - len(avoid))


def test_ring_shares_are_even() -> None:
    rings = RingPair.build(f"w{i}" for i in range(8))
    counts = dict.fromkeys(rings.members, 0)
    for name in make_names("even", 8_000):
        for worker in rings.candidates(name):
            counts[worker] += 1
    assert max(counts.values()) < 1.35 * min(counts.values())


def test_hot_prefix_is_extended_until_its_children_spread_and_shortened_when_cold() -> None:
    tree = KeyTree(KeyLimits(window_requests=100, dwell_ms=1_000))
    shared = make_names("system", 3)
    chats = [shared + make_names(f"chat-{i}", 4) for i in range(40)]
    for i in range(100):
        tree.observe(chats[i % 40], num_workers=8, now_ms=i)
    assert [tree.depth(c) for c in chats] == [4] * 40
    for i in range(200):
        tree.observe(make_names(f"other-{i}", 2), num_workers=8, now_ms=5_000 + i)
    assert tree.depth(chats[0]) == 1
    assert tree.num_extended == 0


def test_key_length_stays_between_the_thresholds() -> None:
    tree = KeyTree(KeyLimits(window_requests=100, count_min=10, dwell_ms=0))
    warm = make_names("warm", 2)

    def observe_share(percent: int) -> int:
        for i in range(100):
            is_warm = i * 37 % 100 < percent
            names = warm + make_names(f"w{i}", 1) if is_warm else make_names(f"x{i}", 1)
            tree.observe(names, num_workers=10, now_ms=i)
        return tree.depth(warm + make_names("w", 1))

    assert observe_share(15) == 1  # between 1/n and 2/n: not extended
    assert observe_share(30) == 3
    assert observe_share(15) == 3  # between again: stays
    assert observe_share(5) == 1


def test_few_requests_never_extend_a_key() -> None:
    tree = KeyTree(KeyLimits(count_min=64))
    for i in range(63):
        tree.observe(make_names("only", 5) + make_names(f"{i}", 1), num_workers=8, now_ms=i)
    assert tree.depth(make_names("only", 5) + make_names("x", 1)) == 1
    for i in range(2):
        tree.observe(make_names("only", 5) + make_names(f"y{i}", 1), num_workers=8, now_ms=64)
    assert tree.depth(make_names("only", 5) + make_names("x", 1)) == 6


def test_a_long_shared_prompt_is_one_extension() -> None:
    tree = KeyTree(KeyLimits(start_blocks=1))
    shared = make_names("system", 200)
    for i in range(40):
        tree.observe(shared + make_names(f"chat-{i}", 30), num_workers=8, now_ms=i)
    assert tree.num_extended == 1
    assert tree.depth(shared + make_names("new", 1)) == 201
    assert tree.depth(shared[:50]) == 1
    assert tree.depth(shared[:50] + make_names("new", 300)) == 1


def test_long_prompts_start_with_a_long_key_and_short_ones_with_their_first_block() -> None:
    tree = KeyTree(KeyLimits(start_blocks=32))
    assert [tree.depth(make_names("p", n)) for n in (0, 1, 31, 32, 500)] == [0, 1, 1, 32, 32]


def test_a_second_hot_branch_shortens_the_extension_to_where_they_part() -> None:
    tree = KeyTree(KeyLimits(start_blocks=1, dwell_ms=100))
    root = make_names("root", 5)
    one, two = root + make_names("one", 50), root + make_names("two", 20)
    for i in range(100):
        tree.observe(one + make_names(f"a{i}", 2), num_workers=8, now_ms=i)
    for i in range(300):
        tree.observe(two + make_names(f"b{i}", 2), num_workers=8, now_ms=1_000 + i)
    assert tree.depth(one + make_names("x", 1)) in (6, 56)
    assert tree.depth(two + make_names("x", 1)) == 26


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["stored", "removed", "snapshot", "forget"]),
            st.sampled_from("abc"),
            st.lists(st.integers(0, 15), max_size=8),
        ),
        max_size=40,
    )
)
def test_prefix_view_agrees_with_plain_sets(events) -> None:
    view, truth = PrefixView(blocks_max=1_000), {}
    chain = make_names("chain", 16)
    for kind, worker, numbers in events:
        names = [chain[n] for n in numbers]
        held = truth.setdefault(worker, set())
        if kind == "forget":
            view.forget(worker)
            held.clear()
            continue
        getattr(view, kind)(worker, names)
        truth[worker] = {
            "stored": held | set(names),
            "removed": held - set(names),
            "snapshot": set(names),
        }[kind]
    expected = {
        w: next((i for i, n in enumerate(chain) if n not in held), 16) for w, held in truth.items()
    }
    assert view.leading(chain) == {w: n for w, n in expected.items() if n}
    assert {w: n for w, n in view.num_blocks.items() if n} == {
        w: len(h) for w, h in truth.items() if h
    }


def test_prefix_view_is_bounded_and_drops_the_oldest() -> None:
    view, names = PrefixView(blocks_max=10), make_names("n", 12)
    view.stored("a", names[:8])
    view.stored("b", names[8:])
    assert len(view) == 10
    assert view.num_blocks == {"a": 6, "b": 4}


def test_prefix_view_survives_many_snapshots() -> None:
    view, names = PrefixView(blocks_max=100), make_names("n", 4)
    view.stored("b", names[:2])
    for _ in range(10_000):  # more than there are seats: given-up ones are swept out and reused
        view.snapshot("a", names)
    assert view.leading(names) == {"a": 4, "b": 2}


def test_ledger_counts_what_reports_do_not_show_yet() -> None:
    ledger = Ledger()
    ledger.sent("a", request_id="r1", tokens=100, now_ms=0)
    ledger.sent("a", request_id="r2", tokens=50, now_ms=90)
    ledger.reported("a", now_ms=100)
    assert ledger.tokens("a") == 50
    ledger.prefilled("a", request_id="r2")
    ledger.prefilled("a", request_id="r1")
    assert ledger.tokens("a") == 0


def test_longer_hit_wins_while_it_meets_the_slo() -> None:
    view = make_view(make_worker("a"), make_worker("b"), make_worker("d", "decode"))
    request = make_request(names=make_names("p", 40))
    holder = view.rings.candidates(request.key(view.keys))[1]
    view.prefix.stored(holder, request.names[:10])
    route = pick(view, request, now_ms=0)
    assert isinstance(route, Route)
    assert (route.prefill, route.decode) == (holder, "d")
    assert route.reason is RouteReason.LONGER_HIT
    assert route.hit_tokens == 320


def test_a_slow_holder_loses_to_the_faster_candidate() -> None:
    request = make_request(names=make_names("p", 40))
    for slow, fast in ("ab", "ba"):
        view = make_view(
            make_worker(slow, prefill_tokens_queued=9_000, prefill_us_per_token=1_000.0),
            make_worker(fast),
            make_worker("d", "decode"),
        )
        view.prefix.stored(slow, request.names[:10])
        route = pick(view, request, now_ms=0)
        assert isinstance(route, Route)
        assert route.prefill == fast
        assert route.reason is RouteReason.SMALLER_ESTIMATE


def test_equal_candidates_share_requests() -> None:
    view = make_view(make_worker("a"), make_worker("b"), make_worker("d", "decode"))
    taken = [
        pick(view, make_request(f"r{i}", names=make_names("same", 9)), now_ms=0).prefill
        for i in range(200)
    ]
    assert 60 < taken.count("a") < 140


def test_a_short_uncached_suffix_is_prefilled_where_it_is_decoded() -> None:
    view = make_view(make_worker("a"), make_worker("d", "decode"), make_worker("e", "decode"))
    request = make_request(names=make_names("turn", 10), num_tokens=350)
    view.prefix.stored("e", request.names[:9])
    route = pick(view, request, now_ms=0)
    assert isinstance(route, Route)
    assert (route.prefill, route.decode, route.hit_tokens) == (None, "e", 288)
    assert route.reason is RouteReason.SHORT_SUFFIX


def test_the_conversations_decode_worker_is_kept_until_it_is_much_busier() -> None:
    request = make_request(names=make_names("turn", 10))

    def decode_with(num_running: int) -> str:
        view = make_view(
            make_worker("a", "prefill"),
            make_worker("d", "decode"),
            make_worker("e", "decode", num_running=num_running),
        )
        view.prefix.stored("e", request.names[:6])
        return pick(view, request, now_ms=0).decode

    assert decode_with(num_running=5) == "e"
    assert decode_with(num_running=50) == "d"


def test_a_shared_system_prompt_does_not_bind_the_decode_worker() -> None:
    view = make_view(
        make_worker("a", "prefill"),
        make_worker("d", "decode"),
        make_worker("e", "decode", num_running=2),
    )
    request = make_request(names=make_names("p", 10))
    view.prefix.stored("e", request.names[:3])
    assert pick(view, request, now_ms=0).decode == "d"


def test_a_full_decode_worker_is_passed_over() -> None:
    view = make_view(
        make_worker("a", "prefill"),
        make_worker("d", "decode", num_running=5),
        make_worker("e", "decode", blocks_free=1),
    )
    assert pick(view, make_request(names=make_names("p", 10)), now_ms=0).decode == "d"


def test_workers_of_both_roles_keep_a_request_in_one_place() -> None:
    view = make_view(make_worker("a", "both"), make_worker("b", "both"))
    for i in range(20):
        route = pick(view, make_request(f"r{i}", names=make_names(f"p{i}", 9)), now_ms=0)
        assert route.prefill is None
        assert route.decode in {c.worker for c in route.candidates}


def test_without_a_prefill_worker_the_decode_worker_prefills() -> None:
    route = pick(make_view(make_worker("d", "decode")), make_request(), now_ms=0)
    assert (route.prefill, route.decode, route.reason) == (None, "d", RouteReason.NO_PREFILL_WORKER)


def test_an_unhealthy_transfer_keeps_the_prompt_at_the_decode_worker() -> None:
    view = make_view(make_worker("a"), make_worker("d", "decode", transfer_healthy=False))
    route = pick(view, make_request(names=make_names("p", 9)), now_ms=0)
    assert (route.prefill, route.reason) == (None, RouteReason.TRANSFER_UNHEALTHY)


def test_a_prefill_worker_that_cannot_send_kv_is_passed_over() -> None:
    workers = [make_worker(name, transfer_healthy=name == "c") for name in "abc"]
    view = make_view(*workers, make_worker("d", "decode"))
    for i in range(10):
        route = pick(view, make_request(names=make_names(f"p{i}", 9)), now_ms=0)
        assert isinstance(route, Route)
        assert (route.prefill, route.decode) == ("c", "d")


def test_after_a_refusal_the_other_of_the_pair_is_asked_not_a_third() -> None:
    view = make_view(*(make_worker(f"w{i}") for i in range(8)), make_worker("d", "decode"))
    for i in range(50):
        request = make_request(names=make_names(f"p{i}", 9))
        first = pick(view, request, now_ms=0)
        assert isinstance(first, Route)
        pair = {c.worker for c in first.candidates}
        second = pick(view, excluding(request, first.computes), now_ms=0)
        assert isinstance(second, Route)
        assert second.prefill in pair - {first.prefill}


def test_refusals_name_their_reason() -> None:
    view = make_view(
        make_worker("a", "prefill"), make_worker("d", "decode", blocks_total=4, blocks_free=4)
    )
    nobody = pick(view, excluding(make_request(), "d"), now_ms=0)
    large = pick(view, make_request(num_tokens=200), now_ms=0)
    late = pick(view, make_request(num_tokens=100, timeout_ms=1), now_ms=0)
    assert isinstance(nobody, Rejected)
    assert [r.reason for r in (nobody, large, late)] == [
        RejectReason.NO_DECODE_WORKER,
        RejectReason.NO_MEMORY,
        RejectReason.NO_TIME,
    ]
    assert late.retry_after_ms > 0


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["prefill", "decode", "both"]), max_size=6), st.data())
def test_a_route_is_deterministic_and_names_able_workers(roles: list[str], data) -> None:
    workers = [make_worker(f"w{i}", role) for i, role in enumerate(roles)]
    exclude = data.draw(st.sets(st.sampled_from([w.name for w in workers] or ["none"])))
    view = make_view(*workers)
    request = excluding(make_request(names=make_names("x", data.draw(st.integers(0, 5)))), *exclude)
    route = pick(view, request, now_ms=0)
    assert route == pick(view, request, now_ms=99)
    if isinstance(route, Rejected):
        assert not any(w.can_decode and w.name not in exclude for w in workers)
        return
    assert view.workers[route.decode].can_decode
    assert route.prefill is None or view.workers[route.prefill].can_prefill
    assert not {route.prefill, route.decode} & exclude
