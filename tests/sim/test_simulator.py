"""The simulator: its clock and caches are right, and nothing is lost or served twice."""

import json
import os
import random
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from kvasir_cli.commands.sim import sim
from kvasir_sim.main import run_sim
from kvasir_sim.result import SimResult
from kvasir_sim.settings import SimSettings
from kvasir_sim.trace import TraceRequest, at_rate
from kvasir_sim.worker import Job, SimWorker, Speed

POLICIES = ("kvasir", "round-robin", "least-loaded")


def write_trace(path: Path, rows: list[tuple[float, int, list[int]]]) -> Path:
    """Rows are (timestamp in ms, input tokens, hash ids)."""
    keys = ("timestamp", "input_length", "hash_ids")
    lines = [json.dumps({**dict(zip(keys, row, strict=True)), "output_length": 3}) for row in rows]
    path.write_text("\n".join(lines))
    return path


def simulate(path: Path, **fields) -> SimResult:
    known = {"trace": path, "workers": 1, "rate": 1.0, "warmup": 0, "prefill_us_per_token": 1_000}
    return run_sim(SimSettings(**{**known, **fields}))


@pytest.mark.parametrize("policy", POLICIES)
def test_one_worker_serves_in_order_and_reuses_prefixes(tmp_path: Path, policy: str) -> None:
    trace = write_trace(
        tmp_path / "t", [(0, 1_000, [1, 2]), (10, 1_000, [3, 4]), (20, 1_536, [1, 2, 5])]
    )
    result = simulate(trace, policy=policy, slo_ttft_ms=1_000)
    # arrivals at 0, 1 s, 2 s; 1 s, 1 s and (1,536 - 1,024) ms of work: nobody waits
    assert result.attainment == 1.0
    assert (result.served, result.refused, result.wait_max_ms) == (3, 0, 0.0)
    assert result.hit_rate == pytest.approx(1_024 / 3_536)
    assert result.ttft_p50_ms == pytest.approx(1_000)


def test_a_queue_is_waited_for(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", [(0, 1_000, [1]), (1, 1_000, [2]), (2, 1_000, [3])])
    result = simulate(trace, policy="round-robin", rate=2.0, slo_ttft_ms=1_500)
    # every 500 ms 1 s of work: first tokens after 1,000, 1,500 and 2,000 ms
    assert result.attainment == pytest.approx(2 / 3)
    assert result.wait_max_ms == pytest.approx(1_000)
    assert result.ttft_p50_ms == pytest.approx(1_500)


def test_reused_tokens_cost_what_they_cost(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", [(0, 512, [1]), (9, 512, [1])])
    result = simulate(trace, rate=0.5, reuse_us_per_token=100)
    assert sorted([result.ttft_p50_ms * 2 - 512, 512]) == pytest.approx([51.2, 512])


def test_the_cache_evicts_the_least_recently_used_block() -> None:
    worker = SimWorker("w", Speed(1.0, 0.0), cache_tokens=1_024)

    def serve(*names: bytes) -> list[bytes]:
        request = TraceRequest(0.0, 512 * len(names), 1, names)
        worker.accept(Job(0, request, 0.0, 0.0), 0.0)
        worker.start_next(0.0)
        return worker.finish()[1]

    assert [serve(b"a"), serve(b"b"), serve(b"a"), serve(b"c")] == [[], [], [], [b"b"]]
    assert worker.hit_tokens(TraceRequest(0.0, 700, 1, (b"a", b"b"))) == 512


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5_000), st.integers(1, 4), st.integers(0, 5)),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from(POLICIES),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from([(), ("1:x2",), ("1:-1", "3:+2"), ("0.5:+1", "2:x1")]),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([0, 1, 3]),
)
def test_every_request_is_served_or_refused_exactly_once(
    tmp_path_factory: pytest.TempPathFactory,
    rows,
    policy,
    workers,
    replicas,
    changes,
    loss,
    decode_workers,
) -> None:
    path = tmp_path_factory.mktemp("trace") / "t"
    ordered = sorted(rows)
    trace = write_trace(
        path, [(ms, 512 * n, [family * 100 + i for i in range(n)]) for ms, n, family in ordered]
    )
    fields = {
        "policy": policy,
        "workers": workers,
        "rate": 5.0,
        "replicas": replicas,
        "changes": changes,
        "sync_loss": loss,
        "decode_workers": decode_workers,
    }
    result = simulate(trace, **fields)
    assert result.served + result.refused == len(rows)
    assert 0 <= result.hit_rate <= 1
    assert 0 <= result.attainment <= 1
    assert result == simulate(trace, **fields)


def test_kvasir_reuses_more_and_serves_more_in_time_than_the_baselines(tmp_path: Path) -> None:
    rnd = random.Random(1)
    rows: list[tuple[float, int, list[int]]] = []
    for at in range(600):
        family = rnd.randrange(24)
        ids = [0, *(1_000 * (family + 1) + i for i in range(7)), 10**6 + at]
        rows.append((at, 512 * len(ids), ids))
    trace = write_trace(tmp_path / "t", rows)
    fields = {"workers": 8, "rate": 6.0, "cache_tokens": 40 * 512, "warmup": 100}
    ours, turns, least = (
        simulate(trace, policy=policy, slo_ttft_ms=6_000, **fields) for policy in POLICIES
    )
    assert ours.hit_rate > 1.3 * max(turns.hit_rate, least.hit_rate)
    assert ours.attainment > max(turns.attainment, least.attainment)


def test_arrivals_are_scaled_to_the_rate() -> None:
    requests = [TraceRequest(ms, 1, 1, ()) for ms in (100.0, 150.0, 300.0)]
    assert at_rate(requests, 4.0) == [0.0, 125.0, 500.0]


@pytest.mark.parametrize("line", ["{", "[]", '{"timestamp": 0}'], ids=["json", "list", "fields"])
def test_a_malformed_trace_is_refused_by_line(tmp_path: Path, line: str) -> None:
    trace = write_trace(tmp_path / "t", [(0, 512, [1])])
    trace.write_text(f"{trace.read_text()}\n{line}\n")
    with pytest.raises(ValueError, match="t:2: not a request"):
        simulate(trace)


def test_requests_beyond_max_input_are_left_out(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", [(0, 600, [1, 2]), (1, 100, [3])])
    assert simulate(trace, max_input=512).served == 1
    with pytest.raises(ValueError, match="no request of up to"):
        simulate(trace, max_input=50)
    with pytest.raises(ValueError, match="warm-up takes them all"):
        simulate(trace, warmup=5)


@pytest.mark.trace
def test_round_robin_meets_published_figures_on_the_mooncake_trace() -> None:

    folder = os.environ.get("KVASIR_TRACES")
    if not folder:
        pytest.skip("KVASIR_TRACES is not set")
    trace = Path(folder) / "mooncake_conversation.jsonl"
    attained = [
        run_sim(SimSettings(trace=trace, policy="round-robin", rate=rate)).attainment
        for rate in (7.0, 8.0, 9.0)
    ]
    assert attained == pytest.approx([0.70, 0.40, 0.05], abs=0.03)
    ours = run_sim(SimSettings(trace=trace, policy="kvasir", rate=8.0))
    assert ours.attainment > 0.95


def test_the_command_writes_the_figures(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", [(0, 512, [1]), (9, 512, [1])])
    target = tmp_path / "out.json"
    args = ["--trace", str(trace), "--policy", "kvasir", "--warmup", "0", "--json", str(target)]
    shown = CliRunner().invoke(sim, ["run", *args], catch_exceptions=False)
    assert shown.exit_code == 0
    figures = json.loads(target.read_text())
    assert (figures["served"], figures["attainment"], figures["hit_rate"]) == (2, 1.0, 0.5)
    assert "attainment_longest_quarter" in shown.output
    wrong = CliRunner().invoke(sim, ["run", *args, "--rate", "0"])
    assert wrong.exit_code == 2
    assert "--rate" in wrong.output
