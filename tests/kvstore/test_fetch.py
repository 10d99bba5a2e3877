"""Fetch or recompute: never much worse than recomputing, and better where it should be."""

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvasir_kvstore.core.fetch import (
    LOSS_SHARE_MAX,
    FetchWatch,
    PathRates,
    plan_fetch,
)
from kvasir_kvstore.peers import DataPlane
from kvasir_kvstore.pulls import NamedPuller
from kvasir_proto.v1 import common_pb2
from kvstore_builders import EPOCH, UID, Wire, make_pair

POLL_MS = 2.0


def ttft_ms(
    arrivals_ms: list[float], *, compute_ms: float, path: PathRates, is_retry: bool = False
) -> tuple[float, float]:
    """Until all blocks are here or computed, and how many arrived; block i comes at arrivals[i]."""
    num_blocks = len(arrivals_ms)
    plan = plan_fetch(
        num_blocks=num_blocks,
        path=path,
        num_fetches=0,
        compute_ms_per_block=compute_ms,
        is_retry=is_retry,
    )
    if plan is None:
        return num_blocks * compute_ms, 0
    watch, now_ms, arrived = FetchWatch(plan), 0.0, 0
    while arrived < num_blocks:
        now_ms = min(now_ms + POLL_MS, max(arrivals_ms[-1], now_ms))
        arrived = sum(at_ms <= now_ms for at_ms in arrivals_ms)
        if not watch.goes_on(elapsed_ms=now_ms, num_arrived=arrived):
            break
    return now_ms + (num_blocks - arrived) * compute_ms, arrived


@given(
    st.lists(st.floats(0, 200), min_size=1, max_size=60),
    st.floats(0.5, 20),
    st.floats(0, 50),
    st.floats(0.01, 50),
    st.booleans(),
)
def test_whatever_the_path_does_it_costs_no_more_than_the_bound(
    gaps_ms: list[float], compute_ms: float, latency_ms: float, known_ms: float, is_retry: bool
) -> None:
    arrivals_ms = [latency_ms + sum(gaps_ms[: i + 1]) for i in range(len(gaps_ms))]
    path = PathRates(latency_ms=latency_ms, ms_per_block=known_ms)
    spent_ms, _ = ttft_ms(arrivals_ms, compute_ms=compute_ms, path=path, is_retry=is_retry)
    recompute_ms = len(gaps_ms) * compute_ms
    patience_ms = 2 * (latency_ms + known_ms)
    assert spent_ms <= recompute_ms + max(LOSS_SHARE_MAX * recompute_ms, patience_ms) + POLL_MS


@given(st.floats(0.05, 100), st.floats(0.5, 20), st.integers(20, 400), st.floats(0, 3))
def test_on_a_steady_path_no_request_is_five_percent_slower(
    fetch_ms: float, compute_ms: float, num_blocks: int, latency_ms: float
) -> None:
    """The first and retries included. What a poll takes is not counted: at most one per request."""
    arrivals_ms = [latency_ms + (i + 1) * fetch_ms for i in range(num_blocks)]
    recompute_ms = num_blocks * compute_ms
    path = PathRates()
    for attempt in range(4):
        spent_ms, arrived = ttft_ms(
            arrivals_ms, compute_ms=compute_ms, path=path, is_retry=attempt == 3
        )
        assert spent_ms <= (1 + LOSS_SHARE_MAX) * recompute_ms + POLL_MS
        transfer_ms = spent_ms - latency_ms - (num_blocks - arrived) * compute_ms
        path = path.after(
            latency_ms=latency_ms, transfer_ms=transfer_ms, num_arrived=arrived, num_fetches=1
        )
        if path.wants_probe:
            path = probed(path, latency_ms=latency_ms, fetch_ms=fetch_ms)
    best_ms = latency_ms + num_blocks * fetch_ms
    if best_ms * 1.2 + 2 * POLL_MS < recompute_ms and fetch_ms < compute_ms / 2:
        assert spent_ms <= best_ms + POLL_MS


@given(
    st.floats(0.01, 20), st.floats(0.5, 20), st.integers(1, 400), st.floats(0, 300), st.booleans()
)
def test_over_a_path_that_nobody_knows_no_link_speed_costs_five_percent(
    gb_per_s: float, compute_ms: float, num_blocks: int, latency_ms: float, is_retry: bool
) -> None:
    """Blocks of 1 MiB; polls are counted here."""
    fetch_ms = (1 << 20) / gb_per_s / 1e6
    arrivals_ms = [latency_ms + (i + 1) * fetch_ms for i in range(num_blocks)]
    for path in (PathRates(), PathRates(was_in_vain=True)):
        spent_ms, _ = ttft_ms(arrivals_ms, compute_ms=compute_ms, path=path, is_retry=is_retry)
        assert spent_ms <= 1.05 * num_blocks * compute_ms


def test_a_first_fetch_in_vain_is_followed_by_a_probe_not_by_another() -> None:
    path, far = PathRates(), [50.0 + i for i in range(100)]  # found after 50 ms, then fast
    spent_ms, arrived = ttft_ms(far, compute_ms=5, path=path)
    assert (arrived, spent_ms > 500) == (0, True)
    path = path.after(latency_ms=spent_ms - 500, transfer_ms=0, num_arrived=0, num_fetches=1)
    assert path.wants_probe
    assert ttft_ms(far, compute_ms=5, path=path) == (500, 0)
    path = probed(path, latency_ms=50, fetch_ms=1)
    assert not path.wants_probe
    assert ttft_ms(far, compute_ms=5, path=path)[1] == 100


def probed(path: PathRates, *, latency_ms: float, fetch_ms: float) -> PathRates:
    """After four blocks were fetched that no request waited for."""
    return path.after(latency_ms=latency_ms, transfer_ms=4 * fetch_ms, num_arrived=4, num_fetches=1)


def test_a_path_that_slows_down_leaves_the_prefix_that_came() -> None:
    """Ten blocks come fast, then the link stalls: what came is kept, the rest is computed."""
    arrivals_ms = [1.0 * (i + 1) for i in range(10)] + [1e9] * 30
    spent_ms, arrived = ttft_ms(arrivals_ms, compute_ms=10, path=PathRates(1, 1))
    assert arrived == 10
    assert spent_ms <= 30 * 10 + 10 + LOSS_SHARE_MAX * 400 + POLL_MS


@pytest.mark.parametrize(("num_fetches", "is_worth_it"), [(0, True), (9, False)])
def test_fetches_that_share_the_path_count(num_fetches: int, is_worth_it: bool) -> None:
    plan = plan_fetch(
        num_blocks=10,
        path=PathRates(1, 1),
        num_fetches=num_fetches,
        compute_ms_per_block=5,
    )
    assert (plan is not None) == is_worth_it


def test_without_a_known_rate_of_computing_there_is_no_bound_so_no_fetch() -> None:
    for path in (PathRates(), PathRates(1, 1)):
        assert plan_fetch(num_blocks=9, path=path, num_fetches=0, compute_ms_per_block=0) is None


def test_nothing_that_arrived_says_only_that_a_block_takes_longer() -> None:
    path = PathRates(1, 8).after(latency_ms=1, transfer_ms=2, num_arrived=0, num_fetches=1)
    assert path.ms_per_block == 8
    path = PathRates().after(latency_ms=1, transfer_ms=30, num_arrived=0.2, num_fetches=1)
    assert path == PathRates(was_in_vain=True)
    path = PathRates().after(latency_ms=1, transfer_ms=30, num_arrived=10, num_fetches=3)
    assert math.isclose(path.ms_per_block, 1)


async def test_a_pull_that_stalls_is_ended_and_what_came_is_kept() -> None:
    """Two frames pass, then nothing: the pull's watcher ends it."""
    stalled = threading.Event()
    passed_bytes = 40 + 2 * (64 + 3 * 256)

    def change(offset: int, data: bytes) -> bytes:
        if offset + len(data) > passed_bytes and not stalled.is_set():
            stalled.set()
            return data[: passed_bytes - offset]
        return b"" if stalled.is_set() else data

    with make_pair() as pair, Wire(pair.server.port, change) as wire:
        names = pair.publish(4)
        puller = NamedPuller(pair.target, DataPlane(), pulls_max=1)
        seen: list[float] = []

        def goes_on(num_arrived: float) -> bool:
            seen.append(num_arrived)
            return num_arrived < 2

        peer = common_pb2.PeerAddress(host="127.0.0.1", data_port=wire.port, uid=UID, epoch=EPOCH)
        result = await puller.pull(
            peer, names=names, blocks=[4, 5, 6, 7], timeout_ms=60_000, goes_on=goes_on
        )
        assert (result.error, result.blocks_ok) == ("cancelled", [True, True, False, False])
        assert seen[-1] == 2
        await puller.close()
