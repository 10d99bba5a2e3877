"""Baselines decide as their sources say, lose nothing, and reproduce published figures."""

import hashlib
import itertools
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvasir_sim.baselines import BASELINES
from kvasir_sim.baselines.dualmap import ACCEPTED_MAX, DualMap
from kvasir_sim.baselines.hotness import SAMPLES_MIN, HotnessTree
from kvasir_sim.main import run_sim
from kvasir_sim.policy import RoutingPolicy, Send, Why
from kvasir_sim.settings import SimSettings
from kvasir_sim.trace import TraceRequest
from kvasir_sim.worker import Job

SETTINGS = SimSettings(trace=Path("none"), workers=4, prefill_us_per_token=1_000, seed=7)
WORKERS = ("w0", "w1", "w2", "w3")
INDEX = itertools.count()


class KnownView:
    """What a replica knows, as a test says."""

    def __init__(self) -> None:
        self.members = WORKERS
        self.pending = dict.fromkeys(WORKERS, 0)
        self.requests = dict.fromkeys(WORKERS, 0)
        self.runs: dict[str, int] = {}

    def pending_tokens(self, worker: str, now_ms: float) -> int:
        return self.pending[worker]

    def num_pending(self, worker: str) -> int:
        return self.requests[worker]

    def leading(self, names: tuple[bytes, ...]) -> dict[str, int]:
        return {name: min(run, len(names)) for name, run in self.runs.items()}

    def us_per_token(self, worker: str) -> float:
        return 1_000.0


def make(name: str) -> tuple[RoutingPolicy, KnownView]:
    view = KnownView()
    return BASELINES[name](view, SETTINGS, 0), view


def a_job(*blocks: int, tokens: int | None = None, at_ms: float = 0.0) -> Job:
    names = tuple(hashlib.blake2b(b"%d" % block, digest_size=16).digest() for block in blocks)
    size = tokens or 512 * len(blocks)
    return Job(next(INDEX), TraceRequest(at_ms, size, 1, names), at_ms, at_ms + 5_000)


def pair_of(policy: RoutingPolicy, *blocks: int) -> tuple[str, ...]:
    """The two workers that a DualMap policy considers."""
    assert isinstance(policy, DualMap)
    return policy._rings.candidates(a_job(*blocks).request.names[1])


def test_round_robin_takes_turns() -> None:
    policy, _ = make("round-robin")
    assert [policy.choose(a_job(1), 0.0) for _ in range(5)] == ["w0", "w1", "w2", "w3", "w0"]


def test_affinity_goes_by_the_first_two_blocks_alone() -> None:
    policy, view = make("affinity")
    homes = [policy.choose(a_job(1, 2, tail), 0.0) for tail in range(20)]
    view.pending[homes[0]] = 10**9
    assert {*homes, policy.choose(a_job(1, 2), 0.0)} == {homes[0]}
    assert len({policy.choose(a_job(1, second), 0.0) for second in range(40)}) == 4


def test_min_ttft_weighs_queue_against_hits() -> None:
    policy, view = make("min-ttft")
    view.pending = {"w0": 500, "w1": 900, "w2": 1_500, "w3": 2_100}
    view.runs = {"w2": 3}
    job = a_job(1, 2, 3, 4)  # computed: 2,048 at others, 512 at w2
    assert policy.choose(job, 0.0) == "w2"  # 2,012 against 2,548
    view.pending["w2"] = 2_100
    assert policy.choose(job, 0.0) == "w0"


def test_chwbl_bounds_the_load_of_the_keys_owner() -> None:
    policy, view = make("chwbl")
    owner = policy.choose(a_job(1, 2), 0.0)
    view.requests = {**dict.fromkeys(WORKERS, 4), owner: 4}
    assert policy.choose(a_job(1, 2), 0.0) == owner  # 5 <= 1.25 x 17 / 4
    view.requests[owner] = 5
    assert policy.choose(a_job(1, 2), 0.0) != owner  # 6 > 1.25 x 18 / 4


def test_sglang_follows_its_tree_until_unbalanced() -> None:
    policy, _ = make("sglang")
    first = policy.choose(a_job(1, 2, 3), 0.0)
    assert policy.choose(a_job(1, 8, 9), 0.0) == first  # 33 % matched
    assert policy.choose(a_job(1, 4, 5, 6), 0.0) != first  # 25 %: the smallest tree
    jobs = [a_job(1, 2, 3) for _ in range(80)]
    homes = [policy.choose(job, 0.0) for job in jobs]
    assert homes[:63] == [first] * 63
    assert homes[63] != first  # 65 above the least: the shortest queue, until balanced again
    for job, home in zip(jobs, homes, strict=True):
        policy.first_token(job, home, 1.0)
    assert policy.choose(a_job(1, 2, 3), 2.0) in set(homes)


def test_dynamo_adds_prefill_and_active_blocks() -> None:
    policy, view = make("dynamo")
    job = a_job(1, 2, 3, 4)
    view.pending = {"w0": 0, "w1": 0, "w2": 512, "w3": 0}
    view.runs = {"w2": 4}
    assert policy.choose(job, 0.0) == "w2"  # 1 + 4 blocks against 4 + 4
    assert policy.choose(a_job(5, 6, 7, 8), 0.0) == "w0"  # w2 holds 4 active blocks
    policy.first_token(job, "w2", 1.0)
    view.pending["w0"] = view.pending["w1"] = view.pending["w3"] = 1_024
    assert policy.choose(a_job(9, tokens=512), 1.0) == "w2"


def test_llm_d_sums_three_scores_with_its_default_weights() -> None:
    policy, view = make("llm-d")
    home = policy.choose(a_job(1, 2, 3, 4), 0.0)
    assert policy.choose(a_job(1, 2, 3, 5), 0.0) == home  # 3 x 3/4 for the prefix
    view.requests = {**dict.fromkeys(WORKERS, 0), home: 1}
    assert policy.choose(a_job(1, 2, 3, 6), 0.0) == home  # 2.25 against 2 for the queue
    assert policy.choose(a_job(1, 2, 7, 8), 0.0) != home  # 1.5 against 2


def test_lmetric_multiplies_prefill_tokens_by_batch_size() -> None:
    policy, view = make("lmetric")
    view.pending = dict.fromkeys(WORKERS, 2_000)
    view.requests = {"w0": 1, "w1": 1, "w2": 4, "w3": 1}
    view.runs = {"w2": 4}
    assert policy.choose(a_job(1, 2, 3, 4), 0.0) == "w0"  # 4,048 x 2 against 2,000 x 5
    view.requests["w2"] = 3
    assert policy.choose(a_job(1, 2, 3, 4), 0.0) == "w2"  # 2,000 x 4


def test_preble_exploits_a_long_match_and_else_explores_by_load() -> None:
    policy, _ = make("preble")
    homes = [policy.choose(a_job(10 * n, 10 * n + 1, 10 * n + 2), 0.0) for n in range(4)]
    assert sorted(homes) == list(WORKERS)
    assert policy.choose(a_job(10, 11, 19), 1.0) == homes[1]  # two thirds cached
    assert policy.choose(a_job(10, 98, 99), 1.0) != homes[1]  # a third: by load
    later = 200_000.0  # the window has passed: all are equally light, the tree remembers
    assert policy.choose(a_job(10, 11, 18), later) == homes[1]


def test_hot_prefixes_get_longer_keys_and_short_ones_again() -> None:
    tree = HotnessTree()
    paths = [a_job(0, 1, 2 + turn % 8, 100 + turn).request for turn in range(1_200)]
    keys = [tree.key(request, 8) for request in paths]
    assert set(keys[: SAMPLES_MIN - 1]) == {paths[0].names[1]}
    assert set(keys[SAMPLES_MIN:]) == {request.names[2] for request in paths[:8]}
    cold = [tree.key(a_job(500 + turn, turn).request, 8) for turn in range(1_000)]
    assert len(set(cold)) == 1_000
    assert tree.key(paths[0], 8) == paths[0].names[1]


def test_dualmap_keeps_to_the_longer_hit_while_half_the_slo_allows() -> None:
    policy, view = make("dualmap")
    near, far = pair_of(policy, 1, 2)
    view.runs = {near: 2}
    view.pending[near] = 2_000
    assert [a.worker for a in policy.arrived(a_job(1, 2), 1.0)] == [near]  # 2,000 <= 2,500
    view.pending[near] = 2_600
    assert [a.worker for a in policy.arrived(a_job(1, 2), 2.0)] == [far]


def test_dualmap_gives_a_worker_few_requests_and_the_rest_as_it_answers() -> None:
    policy, _ = make("dualmap")
    jobs = [a_job(1, 2, tokens=600) for _ in range(4 * ACCEPTED_MAX)]
    sent = [action for job in jobs for action in policy.arrived(job, 0.0)]
    by_worker = {w: sum(a.worker == w for a in sent) for w in {a.worker for a in sent}}
    assert set(by_worker.values()) == {ACCEPTED_MAX}
    while len(sent) < len(jobs):
        answered = sent[len(sent) - sum(by_worker.values())]
        more = policy.first_token(answered.job, answered.worker, 10.0)
        assert [a.worker for a in more] == [answered.worker] or not more
        sent += more
        by_worker[answered.worker] += len(more) - 1
    assert sorted(a.job.index for a in sent) == sorted(job.index for job in jobs)


def test_dualmap_moves_what_waits_for_a_hot_worker() -> None:
    policy, view = make("dualmap")
    near, far = pair_of(policy, 1, 2)
    view.runs = {near: 2}
    for _ in range(ACCEPTED_MAX + 3):
        policy.arrived(a_job(1, 2, 3), 0.0)
    view.pending[near] = 6_000
    moved = policy.tick(100.0)
    assert {a.worker for a in moved} == {far}
    assert all(isinstance(action, Send) for action in moved)


def test_dualmap_moves_nothing_to_a_worker_that_left() -> None:
    policy, view = make("dualmap")
    near, far = pair_of(policy, 1, 2)
    view.runs = {near: 2}
    for _ in range(ACCEPTED_MAX + 3):
        policy.arrived(a_job(1, 2, 3), 0.0)
    view.members = tuple(name for name in WORKERS if name != far)
    policy.members(50.0)
    view.pending[near] = 6_000
    moved = policy.tick(100.0)
    assert {a.worker for a in moved} == set(pair_of(policy, 1, 2)) - {near}


@pytest.mark.parametrize("name", BASELINES)
def test_a_failed_workers_requests_are_routed_to_the_rest(name: str) -> None:
    policy, view = make(name)
    view.pending = {**dict.fromkeys(WORKERS, 100), "w1": 0}
    sent = [action for turn in range(60) for action in policy.arrived(a_job(turn, turn), 0.0)]
    lost = next(action for action in sent if action.worker == "w1")
    view.members = ("w0", "w2", "w3")
    policy.members(20.0)
    again = policy.returned(lost.job, "w1", Why.FAILED, 21.0)
    assert all(action.worker in view.members for action in again)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5_000), st.integers(1, 4), st.integers(0, 5)),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from(sorted(BASELINES)),
    st.sampled_from([1, 3]),
    st.sampled_from([(), ("1:x1", "2:-1", "4:+2")]),
)
def test_every_request_is_answered_once(
    tmp_path_factory: pytest.TempPathFactory, rows, policy: str, replicas: int, changes
) -> None:
    trace = tmp_path_factory.mktemp("trace") / "t"
    lines = [
        {
            "timestamp": at_ms,
            "input_length": 512 * size,
            "output_length": 1,
            "hash_ids": [family * 100 + place for place in range(size)],
        }
        for at_ms, size, family in sorted(rows)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    fields = {"trace": trace, "policy": policy, "workers": 3, "rate": 5.0, "warmup": 0}
    chosen = SimSettings(
        **fields, prefill_us_per_token=1_000, replicas=replicas, changes=changes, sync_ms=500
    )
    result = run_sim(chosen)
    assert (result.served, result.refused) == (len(rows), 0)
    assert result == run_sim(chosen)


@pytest.mark.parametrize(("queue", "refused"), [(None, 0), ("fifo", 0), ("deadline", 3)])
def test_a_rule_may_be_given_kvasirs_queue(tmp_path: Path, queue: str | None, refused: int) -> None:
    row = {"input_length": 1_000, "output_length": 1}
    lines = [{**row, "timestamp": n, "hash_ids": [2 * n, 2 * n + 1]} for n in range(6)]
    (tmp_path / "t").write_text("\n".join(map(json.dumps, lines)))
    fields = {"trace": tmp_path / "t", "policy": "round-robin", "workers": 1, "warmup": 0}
    fields |= {"rate": 100.0, "slo_ttft_ms": 3_500, "prefill_us_per_token": 1_000}
    result = run_sim(SimSettings(**fields, worker_queue=queue))  # six at once, a second each
    assert (result.refused, result.attainment) == (refused, 0.5)


PUBLISHED = {
    # policy: attainment at 7, 8, 9 req/s with 1, 4 and 16 replicas, in an independent simulator
    "dualmap": {1: (1.0, 0.99, 0.94), 4: (0.99, 0.96, 0.86), 16: (0.98, 0.94, 0.82)},
    "min-ttft": {1: (1.0, 1.0, 0.96), 4: (0.96, 0.90, 0.55), 16: (0.82, 0.61, 0.16)},
    "round-robin": {1: (0.70, 0.40, 0.05)},
}


@pytest.mark.trace
@pytest.mark.slow
@pytest.mark.parametrize("policy", PUBLISHED)
def test_baselines_come_near_the_published_figures(policy: str) -> None:
    folder = os.environ.get("KVASIR_TRACES")
    if not folder:
        pytest.skip("KVASIR_TRACES is not set")
    trace = Path(folder) / "mooncake_conversation.jsonl"
    # others than DualMap do better here: a replica counts down what it heard and adds what it sent
    above = 0.05 if policy == "dualmap" else 0.15
    for replicas, figures in PUBLISHED[policy].items():
        for rate, published in zip((7.0, 8.0, 9.0), figures, strict=True):
            chosen = SimSettings(trace=trace, policy=policy, rate=rate, replicas=replicas)
            attained = run_sim(chosen).attainment
            assert published - 0.05 <= attained <= published + above
