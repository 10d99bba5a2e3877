"""The estimate of TTFT, what experience corrects of it, and the pace of decode workers."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvasir_router.core import calibrate
from kvasir_router.core.blended import blended_of
from kvasir_router.core.calibrate import Calibration, OutputLength
from kvasir_router.core.choose import Route, RouteReason, pick
from kvasir_router.core.estimate import Candidate, estimate
from kvasir_router.core.fleet import Blended, Chunk, FleetView, WorkerState
from router_builders import make_names, make_request, make_view, make_worker

PROMPT = make_names("prompt", 100)  # 3,208 tokens with the rest; 100 us each


def estimate_at(view: FleetView, worker: str, **request) -> Candidate:
    wanted = make_request(names=PROMPT, **request)
    runs = view.prefix.match(wanted.names, (worker, *view.stores))
    return estimate(view, wanted, worker, runs)


def test_wait_compute_and_reuse_add_up() -> None:
    view = make_view(make_worker("a", prefill_tokens_queued=1_000), reuse_us_per_token=10.0)
    view.prefix.stored("a", PROMPT[:50])
    view.ledger.sent("a", request_id="x", tokens=500, now_ms=0)
    assert estimate_at(view, "a").ttft_estimate_ms == pytest.approx(
        (1_000 + 500 + 3_208 - 1_600) * 0.1 + 1_600 * 0.01
    )


@pytest.mark.parametrize(
    ("peer_us", "store_us", "fetched", "ms"),
    [
        pytest.param(0.0, 0.0, 0, 320.8, id="nothing can be fetched"),
        pytest.param(50.0, 0.0, 1_280, 320.8 - 1_280 * 0.05, id="from the peer"),
        pytest.param(50.0, 10.0, 2_560, 320.8 - 2_560 * 0.09, id="from the KV node, longer"),
        pytest.param(1.0, 90.0, 1_280, 320.8 - 1_280 * 0.099, id="from the peer, faster"),
        pytest.param(200.0, 150.0, 0, 320.8, id="computing is faster"),
    ],
)
def test_blocks_held_elsewhere_are_fetched_where_that_is_faster(
    peer_us: float, store_us: float, fetched: int, ms: float
) -> None:
    worker = make_worker("a", peer_us_per_token=peer_us, store_us_per_token=store_us)
    view = make_view(worker, make_worker("b"), stores=("kv",))
    view.prefix.stored("b", PROMPT[:40])
    view.prefix.stored("kv", PROMPT[:80])
    candidate = estimate_at(view, "a")
    assert candidate.fetched_tokens == fetched
    assert candidate.hit_tokens == 0
    assert candidate.ttft_estimate_ms == pytest.approx(ms)


HEAD, ONE, TWO = (make_names(seed, 10) for seed in ("head", "one", "two"))
BLENDED = Blended(
    make_names("blended", 30),
    (Chunk(0, HEAD, 0), Chunk(320, ONE, 48), Chunk(640, TWO, 48)),
)
"""A head and two documents of 320 tokens; 968 with the question."""


def estimate_blended(view: FleetView, worker: str) -> Candidate:
    wanted = make_request(names=make_names("exact", 30), blended=BLENDED)
    runs = view.prefix.match(wanted.kv_names, (worker, *view.stores))
    return estimate(view, wanted, worker, runs)


@pytest.mark.parametrize(
    ("held", "at_store", "hit", "fetched", "computed"),
    [
        pytest.param((), (), 0, 0, 968 + 96, id="chunks are computed alone, then in part again"),
        pytest.param(HEAD, (), 320, 0, 648 + 96, id="what stands before them is exact"),
        pytest.param(ONE, (), 272, 0, 968 - 320 + 96, id="one is held"),
        pytest.param((*ONE, *TWO[:5]), (), 384, 0, 968 - 480 + 96, id="and half of the other"),
        pytest.param(TWO, (*ONE, *TWO), 272, 320, 968 - 640 + 96, id="one is fetched"),
        pytest.param(make_names("exact", 30), (), 0, 0, 968 + 96, id="exact KV is not used"),
        pytest.param(BLENDED.names, (), 960, 0, 8, id="the same prompt again"),
        pytest.param((*BLENDED.names[:20], *TWO), (), 912, 0, 8 + 48, id="its leading part"),
        pytest.param((*BLENDED.names[:25], *TWO), (), 936, 0, 8 + 24, id="half of a chunk"),
    ],
)
def test_chunks_that_are_held_are_not_computed_but_for_a_share(
    held: tuple[bytes, ...],
    at_store: tuple[bytes, ...],
    hit: int,
    fetched: int,
    computed: int,
) -> None:
    worker = make_worker("a", store_us_per_token=20.0)
    view = make_view(worker, stores=("kv",), reuse_us_per_token=0.0)
    view.prefix.stored("a", held)
    view.prefix.stored("kv", at_store)
    candidate = estimate_blended(view, "a")
    assert (candidate.hit_tokens, candidate.fetched_tokens) == (hit, fetched)
    expected_us = computed * 100 + fetched * 20
    assert candidate.ttft_estimate_ms == pytest.approx(expected_us / 1000)


@given(
    sizes=st.lists(st.integers(0, 200), min_size=2, max_size=6),
    held=st.lists(st.integers(0, 7), min_size=7, max_size=7),
    at_store=st.lists(st.integers(0, 7), min_size=7, max_size=7),
    permille=st.integers(1, 1000),
)
def test_no_prompt_saves_more_than_it_has(
    sizes: list[int], held: list[int], at_store: list[int], permille: int
) -> None:
    ends = list(itertools.accumulate(sizes))
    tokens = list(range(ends[-1] + 1))
    blended = blended_of(
        tokens,
        list(itertools.pairwise(ends)),
        recompute_permille=permille,
        fingerprint=bytes(16),
        tenant_salt=b"",
    )
    view = make_view(make_worker("a", store_us_per_token=20.0), stores=("kv",))
    chains = [blended.names, *(chunk.names for chunk in blended.chunks)]
    for chain, count, count_at_store in zip(chains, held, at_store, strict=False):
        view.prefix.stored("a", chain[: 3 * count])
        view.prefix.stored("kv", chain[: 3 * count_at_store])
    wanted = make_request(names=make_names("x", 1), num_tokens=len(tokens), blended=blended)
    candidate = estimate(view, wanted, "a", view.prefix.match(wanted.kv_names, ("a", "kv")))
    assert candidate.hit_tokens >= 0
    assert candidate.fetched_tokens >= 0
    assert candidate.hit_tokens + candidate.fetched_tokens <= len(tokens)
    fetched_us = candidate.fetched_tokens * 20.0
    reused_us = candidate.hit_tokens * view.policy.reuse_us_per_token
    assert candidate.ttft_estimate_ms * 1000 >= fetched_us + reused_us - 1e-6


def test_of_two_candidates_the_one_that_holds_the_chunks_blends() -> None:
    for holder in ("p1", "p2"):
        view = make_view(*(make_worker(name) for name in ("p1", "p2")), make_worker("d", "decode"))
        view.prefix.stored(holder, ONE)
        for number in range(8):
            request = make_request(str(number), names=make_names("exact", 30), blended=BLENDED)
            route = pick(view, request, now_ms=0)
            assert isinstance(route, Route)
            assert (route.prefill, route.reason) == (holder, RouteReason.LONGER_HIT)


def test_a_worker_that_decodes_too_is_expected_to_prefill_more_slowly() -> None:
    idle = make_worker("a", "both", decode_ms_per_step=20.0)
    busy = make_worker("a", "both", decode_ms_per_step=20.0, num_running=4)
    alone = estimate_at(make_view(idle), "a").ttft_estimate_ms
    assert estimate_at(make_view(busy), "a").ttft_estimate_ms == pytest.approx(
        alone + 3_208 / 512 * 20.0
    )


def test_an_unmeasured_worker_is_taken_to_be_like_the_others() -> None:
    new = make_worker("new", prefill_us_per_token=0.0)
    view = make_view(new, make_worker("b", prefill_us_per_token=300.0))
    assert estimate_at(view, "new").ttft_estimate_ms == pytest.approx(3_208 * 0.3)
    view.remove("b")
    assert estimate_at(view, "new").ttft_estimate_ms == pytest.approx(3_208 * 1.0)


@given(st.floats(0.3, 3.5), st.integers(0, 2**32))
def test_calibration_finds_the_ratio_in_spite_of_outliers(ratio: float, seed: int) -> None:
    calibration = Calibration()
    for i in range(400):
        outlier = 50.0 if (seed >> i % 32) % 7 == 0 and i % 10 == 0 else 1.0
        base_ms = 500.0 + i % 100 * 30
        calibration.observe("a", uncalibrated_ms=base_ms, actual_ms=base_ms * ratio * outlier)
    assert calibration.factor("a") == pytest.approx(ratio, rel=0.35)
    assert calibration.factor("b") == 1.0


@given(st.lists(st.tuples(st.floats(0, 1e7), st.floats(0, 1e7)), max_size=60))
def test_a_calibration_step_and_the_factor_are_bounded(pairs: list[tuple[float, float]]) -> None:
    calibration, before = Calibration(), 1.0
    for base_ms, actual_ms in pairs:
        calibration.observe("a", uncalibrated_ms=base_ms, actual_ms=actual_ms)
        after = calibration.factor("a")
        assert abs(math.log(after / before)) <= calibrate.STEP_MAX + 1e-9
        assert 1 / calibrate.FACTOR_MAX - 1e-9 <= after <= calibrate.FACTOR_MAX + 1e-9
        before = after


def test_experience_corrects_the_estimate_and_leaves_with_the_worker() -> None:
    view = make_view(make_worker("a"))
    for _ in range(200):
        route_ms = estimate_at(view, "a").uncalibrated_ms
        view.calibration.observe("a", uncalibrated_ms=route_ms, actual_ms=2 * route_ms)
    candidate = estimate_at(view, "a")
    assert candidate.ttft_estimate_ms == pytest.approx(2 * candidate.uncalibrated_ms, rel=0.1)
    assert view.calibration.error("a") < 0.1
    view.remove("a")
    assert view.calibration.factor("a") == 1.0


def test_the_expected_output_length_covers_three_of_four() -> None:
    output = OutputLength()
    for i in range(4_000):
        output.observe(40 + i * 37 % 100)
    assert 100 <= output.tokens <= 130


def decode_of(*workers: WorkerState, **request) -> str:
    view = make_view(make_worker("p", "prefill"), *workers)
    view.prefix.stored("home", PROMPT[:90])
    route = pick(view, make_request(names=PROMPT, **request), now_ms=0)
    assert isinstance(route, Route)
    return route.decode


def test_a_decode_worker_that_would_break_the_pace_is_passed_over() -> None:
    home = make_worker("home", "decode", num_running=4, decode_ms_per_step=40.0)
    other = make_worker("other", "decode", num_running=6, decode_ms_per_step=20.0)
    assert decode_of(home, other) == "home"
    assert decode_of(home, other, tpot_slo_ms=60) == "home"
    assert decode_of(home, other, tpot_slo_ms=45) == "other"  # 40 ms grow by a quarter at home
    assert decode_of(home, other, tpot_slo_ms=5) == "home"  # nobody keeps it: the least busy


def test_memory_is_asked_for_the_output_that_experience_expects() -> None:
    view = make_view(make_worker("p", "prefill"), make_worker("a", "decode", blocks_free=110))
    view.put(make_worker("b", "decode", num_running=3))
    request = make_request(names=PROMPT, max_tokens=4_000)
    assert pick(view, request, now_ms=0).decode == "a"
    for _ in range(200):
        view.output.observe(2_000)
    assert pick(view, request, now_ms=0).decode == "b"


def test_what_was_sent_since_a_report_counts_and_equals_share() -> None:
    """Else a router sends all it gets between two reports to the worker that was calmest then."""
    workers = [make_worker(f"d{i}", "decode", num_running=10) for i in range(4)]
    view = make_view(make_worker("p", "prefill"), *workers)
    taken = []
    for i in range(40):
        route = pick(view, make_request(f"r{i}", names=make_names(f"p{i}", 3)), now_ms=0)
        assert isinstance(route, Route)
        taken.append(route.decode)
        view.ledger.opened(route.decode)
    assert {taken.count(worker.name) for worker in workers} == {10}
    view.ledger.reported("d0", now_ms=100)
    assert view.running("d0") == 10
    view.ledger.closed("d1")
    assert view.running("d1") == 19


def test_routers_that_heard_the_same_do_not_all_choose_the_same() -> None:
    workers = [make_worker(f"d{i}", "decode") for i in range(8)]
    chosen = {
        pick(make_view(make_worker("p", "prefill"), *workers), make_request(f"r{i}"), now_ms=0)
        for i in range(40)
    }
    assert len({route.decode for route in chosen if isinstance(route, Route)}) == 4
