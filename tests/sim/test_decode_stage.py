"""Decode workers: steps, batches, memory and hand-off, and what they add to the figures."""

import hashlib
from collections import Counter
from pathlib import Path

import pytest
from kvasir_sim.engine import Engine
from kvasir_sim.kvasir_policy import KvasirPolicy
from kvasir_sim.main import POLICIES, simulate
from kvasir_sim.settings import SimSettings
from kvasir_sim.trace import TraceRequest
from kvasir_sim.worker import Job

ASKED_KEYS = [
    "attainment",
    "attainment_longest_quarter",
    "goodput_rps",
    "ttft_p50_ms",
    "ttft_p90_ms",
    "ttft_p99_ms",
    "hit_rate",
    "load_cv",
    "wait_max_ms",
    "refused",
    "served",
    "fetched_rate",
    "declined_rate",
]


def make_request(number: int, *, tokens: int = 1_000, output: int = 4) -> TraceRequest:
    names = tuple(
        hashlib.blake2b(b"%d/%d" % (number, block), digest_size=16).digest()
        for block in range(-(-tokens // 512))
    )
    return TraceRequest(float(number), tokens, output, names)


def make_settings(**fields) -> SimSettings:
    known = {"trace": Path("t"), "warmup": 0, "workers": 2, "prefill_us_per_token": 100}
    known |= {"decode_workers": 1, "decode_base_ms": 10, "decode_ms_per_request": 1}
    known |= {"decode_us_per_context_token": 0, "handoff_us_per_token": 0}
    return SimSettings(**{**known, **fields})


def run(settings: SimSettings, requests: list[TraceRequest]) -> dict[int, Job]:
    """All at once; served jobs by number."""
    engine = Engine(settings, POLICIES[settings.policy])
    engine.run(requests, [0.0] * len(requests))
    assert not engine.refused
    return {job.index: job for job in engine.served}


def test_a_request_alone_takes_its_steps_after_the_hand_off() -> None:
    fields = {"handoff_us_per_token": 20, "decode_us_per_context_token": 1}
    job = run(make_settings(**fields), [make_request(0)])[0]
    assert job.finished_ms == pytest.approx(100)
    # 20 ms of transfer; steps of 11 ms with 1,001, 1,002 and 1,003 us of context
    assert job.last_token_ms - job.finished_ms == pytest.approx(20 + 33 + 3.006)


def test_requests_in_a_batch_share_its_steps() -> None:
    jobs = run(make_settings(), [make_request(0), make_request(1)])
    # the second joins after the first's first step: 11, 12, 12 and 12, 12, 11 ms
    assert [job.last_token_ms for job in jobs.values()] == pytest.approx([135, 146])
    assert jobs[0].decode == jobs[1].decode == "d0"


@pytest.mark.parametrize(
    "fields", [{"decode_batch_max": 1}, {"decode_cache_tokens": 1_500}], ids=["batch", "memory"]
)
def test_what_does_not_fit_waits_for_its_turn(fields) -> None:
    jobs = run(make_settings(**fields), [make_request(0), make_request(1)])
    assert sorted(job.last_token_ms for job in jobs.values()) == pytest.approx([133, 166])


def test_a_request_larger_than_the_memory_is_decoded_alone() -> None:
    settings = make_settings(decode_cache_tokens=1_024, policy="round-robin")
    jobs = run(settings, [make_request(0, tokens=4_000), make_request(1, tokens=4_000)])
    assert sorted(job.last_token_ms for job in jobs.values()) == pytest.approx([433, 466])


def test_one_token_needs_no_decode_worker() -> None:
    job = run(make_settings(), [make_request(0, output=1)])[0]
    assert (job.last_token_ms, job.decode != "") == (job.finished_ms, True)


@pytest.mark.parametrize("policy", ["kvasir", "round-robin"])
@pytest.mark.parametrize("replicas", [1, 3])
def test_decode_workers_share_the_load(policy, replicas) -> None:
    settings = make_settings(
        decode_workers=4, workers=8, policy=policy, replicas=replicas, sync_ms=20
    )
    engine = Engine(settings, POLICIES[policy])
    requests = [make_request(n, output=30) for n in range(80)]
    engine.run(requests, [25.0 * n for n in range(80)])
    count = Counter(job.decode for job in engine.served)
    assert set(count) == {"d0", "d1", "d2", "d3"}
    assert max(count.values()) <= 2 * min(count.values())
    for replica in engine.policies:
        if isinstance(replica, KvasirPolicy):
            assert not any(replica._fleet.ledger.in_flight(name) for name in count)


def test_tpot_is_reported_with_decode_workers_alone() -> None:
    requests = [make_request(n, output=1 + n) for n in range(20)]
    plain = simulate(make_settings(decode_workers=0), requests).to_json()
    assert list(plain) == ASKED_KEYS
    paired = simulate(make_settings(slo_tpot_ms=100), requests).to_json()
    assert {key: paired[key] for key in ASKED_KEYS} == plain
    assert 10 < paired["tpot_p50_ms"] <= paired["tpot_p90_ms"] <= paired["tpot_p99_ms"]
    assert paired["tpot_attainment"] == paired["both_attainment"] == 1.0
    late = simulate(make_settings(slo_tpot_ms=5), requests).to_json()
    assert late["tpot_attainment"] == pytest.approx(1 / 20)  # that of one token
