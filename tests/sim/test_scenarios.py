"""Stale views, failures, KV nodes: what the engine models beside a healthy fleet."""

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
from kvasir_kvstore.core import fetch
from kvasir_router.core.prefix import PrefixView
from kvasir_sim.engine import Engine
from kvasir_sim.main import POLICIES, run_sim, simulate
from kvasir_sim.policy import Action, Recall, RoutingPolicy, Send, Why
from kvasir_sim.settings import SimSettings
from kvasir_sim.tier import KvTier
from kvasir_sim.trace import TraceRequest, at_rate
from kvasir_sim.view import GONE_TOKENS, ReplicaView, Report
from kvasir_sim.worker import Job, SimWorker, Speed

SPEED = Speed(1_000.0, 0.0)


def make_request(*blocks: int) -> TraceRequest:
    names = tuple(hashlib.blake2b(b"%d" % block, digest_size=16).digest() for block in blocks)
    return TraceRequest(0.0, 512 * len(blocks), 1, names)


def make_requests(count: int, *, shared: int = 2) -> list[TraceRequest]:
    """Every 50 ms one of eight conversations, of some shared blocks and one of its own."""
    rows = []
    for index in range(count):
        family = index * 7 % 8
        blocks = [1_000 * (family + 1) + block for block in range(shared)]
        names = make_request(*blocks, 10**6 + index).names
        rows.append(TraceRequest(50.0 * index, 512 * (shared + 1), 1, names))
    return rows


def make_settings(**fields) -> SimSettings:
    known = {"trace": Path("t"), "warmup": 0, "workers": 4, "rate": 3.0}
    return SimSettings(**{**known, "prefill_us_per_token": 1_000, **fields})


def make_view() -> ReplicaView:
    workers = {"w0": SimWorker("w0", SPEED, cache_tokens=51_200)}
    return ReplicaView(workers, PrefixView(blocks_max=100), is_exact=False)


def test_between_reports_a_replica_counts_down_and_adds_what_it_sent() -> None:
    view = make_view()
    view.reported("w0", Report(1_000.0, 3_000, 3))
    assert view.pending_tokens("w0", 2_000.0) == 2_000
    view.sent("w0", 7, make_request(1, 2))
    assert view.pending_tokens("w0", 9_000.0) == 1_024
    assert view.num_pending("w0") == 4
    view.ended(7, is_served=True)
    assert view.pending_tokens("w0", 9_000.0) == 0
    assert view.pending_tokens("gone", 0.0) == GONE_TOKENS


def test_a_replica_expects_what_it_sent_to_be_cached_until_reports_tell() -> None:
    view, request = make_view(), make_request(1, 2)
    view.sent("w0", 7, request)
    view.sent("w0", 8, make_request(1, 3))
    view.ended(7, is_served=True)
    assert view.hit_tokens("w0", request) == 1_024  # served; the event is on its way
    view.reported("w0", Report(1.0, 0, 0))
    assert view.hit_tokens("w0", request) == 512  # request 8 still goes there
    view.ended(8, is_served=False)
    assert view.leading(request.names) == {}


def test_what_a_failed_worker_had_is_served_by_others() -> None:
    settings = make_settings(changes=("5:x2",), replicas=3, slo_ttft_ms=20_000)
    engine = Engine(settings, POLICIES["kvasir"])
    requests = make_requests(60)
    engine.run(requests, at_rate(requests, 3.0))
    assert sorted(engine.fleet.workers) == ["w0", "w1"]
    late = [job for job in engine.served if job.started_ms > 5_000]
    assert {job.worker for job in late} == {"w0", "w1"}
    assert len(engine.served) + len(engine.refused) == 60
    assert any(job.arrival_ms < 5_000 for job in late)


class Mover(RoutingPolicy):
    """All to one worker, and on a tick what still waits to the other."""

    tick_ms = 100.0
    whys: ClassVar[list[Why]] = []

    def arrived(self, job: Job, now_ms: float) -> list[Action]:
        self.jobs = [*getattr(self, "jobs", []), job]
        return [Send(job, "w0")]

    def tick(self, now_ms: float) -> list[Action]:
        jobs, self.jobs = self.jobs, []
        return [Recall(job, "w0") for job in jobs]

    def returned(self, job: Job, worker: str, why: Why, now_ms: float) -> list[Action]:
        self.whys.append(why)
        return [Send(job, "w1")]


@pytest.mark.parametrize("queue", ["fifo", "deadline"])
def test_a_worker_gives_back_what_it_is_asked_for_and_has_not_begun(queue: str) -> None:
    settings = make_settings(workers=2, worker_queue=queue, slo_ttft_ms=60_000)
    engine = Engine(settings, Mover)
    requests = make_requests(6)
    Mover.whys.clear()
    engine.run(requests, [float(n) for n in range(6)])
    assert Counter(job.worker for job in engine.served) == {"w0": 1, "w1": 5}
    assert Mover.whys == [Why.RECALLED] * 5
    assert engine.num_recalled == 5


def test_requests_leave_hot_workers_by_the_routers_own_rule() -> None:
    settings = make_settings(workers=3, slo_ttft_ms=8_000)
    engine = Engine(settings, POLICIES["kvasir"])
    requests = make_requests(200)
    engine.run(requests, at_rate(requests, 6.0))
    assert engine.num_recalled > 0
    assert len(engine.served) + len(engine.refused) == 200


def test_replicas_exchange_extended_keys() -> None:
    engine = Engine(make_settings(replicas=2, sync_ms=500), POLICIES["kvasir"])
    one, two = engine.policies
    jobs = [Job(n, make_request(1, 2, 100 + n), n, n + 5_000.0) for n in range(40)]
    for job in jobs:
        one.arrived(job, job.arrival_ms)
    names = jobs[0].request.names
    assert [p._fleet.keys.depth(names) for p in (one, two)] == [3, 2]
    one.tick(250.0)
    assert two._fleet.keys.depth(names) == 3


def test_workers_that_leave_finish_what_they_have() -> None:
    settings = make_settings(changes=("5:-3",), slo_ttft_ms=60_000)
    engine = Engine(settings, POLICIES["round-robin"])
    requests = make_requests(40)
    engine.run(requests, at_rate(requests, 3.0))
    assert len(engine.served) == 40
    assert list(engine.fleet.workers) == ["w0"]
    assert len(engine.fleet.retired) == 3


def test_kv_nodes_raise_hits_where_caches_are_small() -> None:
    requests = make_requests(200)
    fields = {"cache_tokens": 2_048, "slo_ttft_ms": 5_000}
    without = simulate(make_settings(**fields), requests)
    tier = simulate(make_settings(**fields, kv_node_tokens=1_000_000), requests)
    assert tier.hit_rate > without.hit_rate + 0.1
    assert tier.attainment >= without.attainment


@pytest.mark.parametrize("us_per_token", [8.0, 300.0, 950.0, 5_000.0])
def test_what_is_faster_computed_is_not_fetched(us_per_token: float) -> None:
    requests = make_requests(200)
    fields = {"cache_tokens": 2_048, "slo_ttft_ms": 5_000, "policy": "round-robin"}
    without = simulate(make_settings(**fields), requests)
    path = {"kv_node_tokens": 1_000_000, "kv_node_us_per_token": us_per_token}
    tier = simulate(make_settings(**fields, **path), requests)
    assert tier.ttft_p50_ms <= without.ttft_p50_ms
    assert tier.ttft_p99_ms <= without.ttft_p99_ms
    is_worth_it = us_per_token * fetch.GAIN_MIN < 1_000
    assert (tier.fetched_rate > 0) is is_worth_it
    assert (tier.declined_rate > 0) is (not is_worth_it)


def test_fetches_share_the_path_until_computing_is_faster() -> None:
    request = make_request(*range(8))
    tier = KvTier(1_000_000, us_per_token=300.0, latency_ms=5.0)
    tier.offer(request.names)
    fetches = []
    for _ in range(4):
        fetches.append(tier.plan(request, beyond=512, compute_us_per_token=1_000))
        tier.begin(fetches[-1], now_ms=0.0)
    tokens = 7 * 512
    assert [found.tokens for found in fetches] == [tokens, tokens, tokens, 0]
    assert [found.declined_tokens for found in fetches] == [0, 0, 0, tokens]
    assert fetches[1].ms - 5.0 == pytest.approx(2 * (fetches[0].ms - 5.0))
    tier.advance(fetches[0].ms)
    assert tier.plan(request, beyond=512, compute_us_per_token=1_000).tokens == tokens


def test_slow_workers_get_less() -> None:
    requests = make_requests(300, shared=1)
    settings = make_settings(slow_workers=2, slow_factor=4.0, slo_ttft_ms=8_000)
    engine = Engine(settings, POLICIES["kvasir"])
    engine.run(requests, at_rate(requests, 3.0))
    slow = sum(job.worker in {"w0", "w1"} for job in engine.served)
    assert 0 < slow < len(engine.served) / 2
    assert not engine.refused


@pytest.mark.parametrize("text", ["5", "5:2", "x:+1", "5:+x", "-5:+1"])
def test_a_change_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="SECONDS"):
        make_settings(changes=(text,))


@pytest.mark.trace
@pytest.mark.parametrize(
    ("rate", "replicas", "low", "longest_low"),
    [(9, 1, 0.985, 0), (9, 16, 0.98, 0), (14, 1, 0.90, 0.6), (14, 16, 0.90, 0.6)],
)
def test_kvasir_meets_its_bars_on_the_mooncake_trace(rate, replicas, low, longest_low) -> None:
    folder = os.environ.get("KVASIR_TRACES")
    if not folder:
        pytest.skip("KVASIR_TRACES is not set")
    trace = Path(folder) / "mooncake_conversation.jsonl"
    result = run_sim(SimSettings(trace=trace, rate=rate, replicas=replicas))
    assert result.attainment >= low
    assert result.attainment_longest_quarter >= longest_low
    assert result.wait_max_ms <= 60_000
