"""Second thoughts: hand-backs, moves between the two candidates, and the warm-up of new workers."""

from hypothesis import given, settings
from hypothesis import strategies as st
from kvasir_router.core.choose import (
    Rejected,
    RejectReason,
    Route,
    excluding,
    pick,
    prefill_pair,
)
from kvasir_router.core.fleet import FleetView
from kvasir_router.core.rebalance import LOOKED_AT_MAX, Queued, hand_back, rebalance
from router_builders import make_names, make_request, make_view, make_worker


def make_fleet(queued: dict[str, int], **policy) -> FleetView:
    workers = [make_worker(name, prefill_tokens_queued=n) for name, n in queued.items()]
    return make_view(*workers, make_worker("d", "decode"), **policy)


def waiting_at(view: FleetView, worker: str, count: int, **request) -> list[Queued]:
    """Requests of whose pair `worker` is one."""
    found: list[Queued] = []
    for i in range(10_000):
        wanted = make_request(f"r{i}", names=make_names(f"p{i}", 10), **request)
        if worker in prefill_pair(view, wanted, now_ms=0):
            found.append(Queued(wanted, worker, sent_ms=0))
        if len(found) == count:
            break
    return found


def test_a_handed_back_request_goes_to_the_other_candidate_if_that_makes_it() -> None:
    view = make_fleet({f"w{i}": 0 for i in range(8)})
    [queued] = waiting_at(view, "w3", 1)
    other = set(prefill_pair(view, queued.request, now_ms=0)) - {"w3"}
    route = hand_back(view, queued.request, refused_by="w3", now_ms=0)
    assert isinstance(route, Route)
    assert {route.computes} == other


def test_a_request_that_nobody_can_serve_in_time_is_refused_with_a_time_to_retry() -> None:
    view = make_fleet({f"w{i}": 40_000 for i in range(8)})  # 4 s of work each
    [queued] = waiting_at(view, "w3", 1, waited_ms=4_990)
    refused = hand_back(view, queued.request, refused_by="w3", now_ms=0)
    assert isinstance(refused, Rejected)
    assert refused.reason is RejectReason.NO_TIME
    assert 4_000 <= refused.retry_after_ms <= 4_100


def test_a_busy_candidate_is_asked_as_it_alone_knows_what_is_due_before() -> None:
    view = make_fleet({f"w{i}": 60_000 for i in range(8)})
    [queued] = waiting_at(view, "w3", 1)
    assert isinstance(hand_back(view, queued.request, refused_by="w3", now_ms=0), Route)


def test_what_both_candidates_handed_back_goes_to_a_third_worker() -> None:
    view = make_fleet({f"w{i}": 0 for i in range(8)})
    [queued] = waiting_at(view, "w3", 1)
    (other,) = set(prefill_pair(view, queued.request, now_ms=0)) - {"w3"}
    route = hand_back(view, excluding(queued.request, "w3"), refused_by=other, now_ms=0)
    assert isinstance(route, Route)
    assert route.computes not in {"w3", other}


def test_requests_leave_a_hot_worker_until_it_is_no_hotter_than_the_others() -> None:
    view = make_fleet({"hot": 60_000, "b": 0, "c": 0, "d2": 0})
    moves = rebalance(view, waiting_at(view, "hot", 200, num_tokens=2_000), now_ms=100)
    assert 10 < len(moves) < LOOKED_AT_MAX
    assert {move.source for move in moves} == {"hot"}
    assert len({move.request_id for move in moves}) == len(moves)
    computed_ms = 2_000 * 0.1
    waits = dict.fromkeys("bcd", 0.0)
    for move in moves:
        waits[move.target[0]] += computed_ms
    left_ms = 6_000 - len(moves) * computed_ms
    assert max(waits.values()) <= max(left_ms, 2_500) + computed_ms


def test_nothing_moves_from_calm_workers_or_to_hot_ones() -> None:
    calm = make_fleet({"a": 10_000, "b": 0, "c": 0})
    assert rebalance(calm, waiting_at(calm, "a", 20), now_ms=100) == []
    hot = make_fleet({"a": 80_000, "b": 70_000})
    queued = waiting_at(hot, "a", 20) + waiting_at(hot, "b", 20)
    assert rebalance(hot, queued, now_ms=100) == []


def test_a_long_wait_makes_a_worker_hot() -> None:
    view = make_fleet({"a": 30_000, "b": 0})
    queued = waiting_at(view, "a", 3)
    assert rebalance(view, queued, now_ms=1_000) == []
    assert {move.target for move in rebalance(view, queued, now_ms=3_500)} == {"b"}
    assert rebalance(view, queued, now_ms=5_000) == []  # too late for the SLO anyway


def test_a_move_that_gains_nothing_is_not_made() -> None:
    view = make_fleet({"a": 26_000, "b": 30_000})
    old, *fresh = waiting_at(view, "a", 5)
    old = Queued(old.request, "a", sent_ms=0)
    fresh = [Queued(item.request, "a", sent_ms=3_500) for item in fresh]
    assert rebalance(view, [old, *fresh], now_ms=3_600) == []


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 90_000), min_size=2, max_size=6),
    st.integers(0, 4_000),
    st.integers(1, 30),
)
def test_every_move_stays_in_the_pair_gains_and_makes_the_slo(
    loads: list[int], now_ms: int, count: int
) -> None:
    view = make_fleet({f"w{i}": load for i, load in enumerate(loads)})
    queued = [item for i in range(len(loads)) for item in waiting_at(view, f"w{i}", count)]
    queued = list({item.request.request_id: item for item in queued}.values())
    by_id = {item.request.request_id: item for item in queued}
    moves = rebalance(view, queued, now_ms=now_ms)
    assert len({move.request_id for move in moves}) == len(moves)
    for move in moves:
        item = by_id[move.request_id]
        pair = prefill_pair(view, item.request, now_ms=now_ms)
        assert {move.source, move.target} == set(pair)
        assert move.source == item.worker
        assert move.gain_ms > 0
        assert view.wait_ms(move.target) + 32.8 + now_ms <= 5_000 + 1e-6


def test_a_new_worker_takes_its_keys_over_one_by_one_and_keeps_them() -> None:
    view = make_view(*(make_worker(f"w{i}") for i in range(8)), make_worker("d", "decode"))
    requests = [make_request(f"r{i}", names=make_names(f"p{i}", 4)) for i in range(2_000)]
    start_ms = 100_000
    before = {r.request_id: prefill_pair(view, r, now_ms=start_ms) for r in requests}
    view.put(make_worker("new"), now_ms=start_ms)

    def taken(now_ms: int) -> set[str]:
        pairs = {r.request_id: prefill_pair(view, r, now_ms=now_ms) for r in requests}
        assert all("new" in pair or pair == before[key] for key, pair in pairs.items())
        assert all(len(set(pair)) == 2 for pair in pairs.values())
        return {key for key, pair in pairs.items() if "new" in pair}

    steps = [taken(start_ms + share * 200) for share in (0, 25, 50, 100)]
    assert steps[0] == set()
    assert steps[0] < steps[1] < steps[2] < steps[3]
    assert len(steps[1]) / len(steps[3]) < 0.35
    assert len(steps[3]) < 1.3 * 2_000 * 2 / 9


def test_workers_that_start_together_or_return_with_their_cache_are_not_held_back() -> None:
    view = make_view(*(make_worker(f"w{i}") for i in range(4)))
    view.prefix.stored("back", make_names("cache", 10))
    for name in ("w4", "w5", "w6", "w7"):
        view.put(make_worker(name), now_ms=30_000)
    assert not view.is_any_warming(30_000)
    old = make_view(*(make_worker(f"w{i}") for i in range(4)))
    old.prefix.stored("back", make_names("cache", 10))
    old.put(make_worker("back"), now_ms=30_000)
    assert not old.is_any_warming(30_000)
    assert old.share_taken("back", 30_000) == 1.0


@settings(max_examples=30)
@given(st.data())
def test_a_view_kept_up_to_date_decides_like_a_new_one(data) -> None:
    """Whatever joined, reported, changed and left before."""
    worker = st.builds(
        make_worker,
        st.sampled_from([f"w{i}" for i in range(6)]),
        st.sampled_from(["prefill", "decode", "both"]),
        transfer_healthy=st.booleans(),
        num_running=st.integers(0, 20),
        blocks_free=st.integers(0, 40),
        prefill_us_per_token=st.sampled_from([0.0, 100.0, 300.0]),
        prefill_tokens_queued=st.integers(0, 5_000),
    )
    kept = make_view()
    for state in data.draw(st.lists(worker, max_size=25)):
        kept.put(state)
        if data.draw(st.integers(0, 4)) == 0:
            kept.remove(state.name)
        if state.can_decode and state.name in kept.workers and data.draw(st.booleans()):
            kept.ledger.opened(state.name)
            kept.running(state.name)
            kept.ledger.closed(state.name)
    new = make_view(*kept.workers.values())
    for i in range(10):
        request = make_request(f"r{i}", names=make_names(f"p{i}", i))
        assert pick(kept, request, now_ms=10**9) == pick(new, request, now_ms=10**9)


@settings(max_examples=60)
@given(st.data())
def test_a_pair_is_two_distinct_able_workers_whenever_two_exist(data) -> None:
    """Whatever is new, mute or excluded; and replicas that see the same agree."""
    names = data.draw(st.sets(st.sampled_from("abcdefgh"), min_size=1))
    mute = data.draw(st.sets(st.sampled_from(sorted(names))))
    new = data.draw(st.sets(st.sampled_from(sorted(names))))
    exclude = frozenset(data.draw(st.sets(st.sampled_from(sorted(names)))))
    views = []
    for order in (sorted(names), sorted(names, reverse=True)):
        view = make_view()
        for name in [*(n for n in order if n not in new), *(n for n in order if n in new)]:
            worker = make_worker(name, transfer_healthy=name not in mute)
            view.put(worker, now_ms=100_000 if name in new else 0)
        views.append(view)
    for i in range(20):
        request = make_request(f"r{i}", names=make_names(f"p{i}", i % 3), exclude=exclude)
        now_ms = 100_000 + 1_000 * i
        pair = prefill_pair(views[0], request, now_ms=now_ms)
        assert pair == prefill_pair(views[1], request, now_ms=now_ms)
        assert len(set(pair)) == len(pair)
        assert set(pair) <= names - mute - exclude
        assert bool(pair) == bool(names - mute - exclude)
        if not exclude and not mute:
            assert len(pair) == min(2, len(names))
