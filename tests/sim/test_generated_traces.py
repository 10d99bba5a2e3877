"""Generated traces: what shares a prefix in them, how popular it is, and when requests come."""

import collections
import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvasir_sim.generate import BLOCK_TOKENS, GenerateSettings, generate, write_trace
from kvasir_sim.readers import load_trace

KINDS = ("conversations", "agents", "rag", "mixed")


def rows_of(**fields) -> list[dict]:
    return generate(GenerateSettings(**{"requests": 400, "documents": 50, **fields}))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.sampled_from([1.0, 8.0]))
def test_every_trace_is_well_formed(kind: str, seed: int, burst_factor: float) -> None:
    rows = rows_of(kind=kind, seed=seed, burst_factor=burst_factor, requests=120)
    assert len(rows) == 120
    arrivals = [row["timestamp"] for row in rows]
    assert arrivals == sorted(arrivals)
    owners = collections.defaultdict(set)
    for row in rows:
        assert len(row["hash_ids"]) == -(-row["input_length"] // BLOCK_TOKENS)
        assert len(set(row["hash_ids"])) == len(row["hash_ids"])
        assert 0 < row["input_length"] <= 20_480
        for place, block in enumerate(row["hash_ids"]):
            owners[block].add((place, *row["hash_ids"][:place]))
    assert all(len(before) == 1 for before in owners.values()), "an id names its whole prefix"


def test_the_same_seed_gives_the_same_trace(tmp_path: Path) -> None:
    assert rows_of(kind="mixed", seed=3) == rows_of(kind="mixed", seed=3)
    assert rows_of(kind="mixed", seed=3) != rows_of(kind="mixed", seed=4)
    rows = rows_of(kind="agents")
    write_trace(rows, tmp_path / "t")
    read = load_trace(tmp_path / "t", max_input=20_480, count=10_000)
    assert [r.input_tokens for r in read] == [row["input_length"] for row in rows]
    assert [r.session for r in read] == [row["session"] for row in rows]


@pytest.mark.parametrize("kind", ["conversations", "agents"])
def test_a_session_goes_on_with_what_it_has_seen(kind: str) -> None:
    sessions = collections.defaultdict(list)
    for row in rows_of(kind=kind):
        sessions[row["session"]].append(row)
    pairs = [p for rows in sessions.values() for p in itertools.pairwise(rows)]
    assert len(pairs) > 50
    for before, after in pairs:
        seen = before["input_length"] // BLOCK_TOKENS
        assert after["hash_ids"][:seen] == before["hash_ids"][:seen]
        assert after["input_length"] > before["input_length"] + before["output_length"]


def test_documents_follow_zipfs_law() -> None:
    def top_share(zipf: float) -> float:
        rows = rows_of(kind="rag", zipf=zipf, requests=2_000)
        places = collections.Counter(tuple(row["hash_ids"][1:4]) for row in rows)
        return places.most_common(1)[0][1] / len(rows)

    harmonic = sum(1 / rank for rank in range(1, 51))
    assert top_share(1.0) == pytest.approx(1 / harmonic, rel=0.2)
    assert top_share(0.0) < 0.06


def test_bursts_raise_the_variance_and_keep_the_rate() -> None:
    def gaps(burst_factor: float) -> list[float]:
        rows = rows_of(kind="rag", burst_factor=burst_factor, requests=8_000, rate=20.0)
        return [b["timestamp"] - a["timestamp"] for a, b in itertools.pairwise(rows)]

    def squared_variation(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return sum((value - mean) ** 2 for value in values) / len(values) / mean**2

    smooth, bursty = gaps(1.0), gaps(10.0)
    assert squared_variation(smooth) == pytest.approx(1.0, rel=0.15)  # Poisson
    assert squared_variation(bursty) > 1.5
    assert sum(smooth) / len(smooth) == pytest.approx(50.0, rel=0.1)
    assert sum(bursty) / len(bursty) == pytest.approx(50.0, rel=0.35)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_rate_is_as_asked(kind: str) -> None:
    rows = rows_of(kind=kind, requests=6_000, rate=12.0, max_input=200_000)
    late = rows[len(rows) // 2 :]  # sessions that began before the first row are missing there
    rate = (len(late) - 1) * 1_000 / (late[-1]["timestamp"] - late[0]["timestamp"])
    assert rate == pytest.approx(12.0, rel=0.2)


def test_given_arrivals_and_lengths_are_kept(tmp_path: Path) -> None:
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    lines += [
        f"2023-11-16 18:{n // 60:02}:{n % 60:02},{700 + 97 * n % 5_000},40" for n in range(300)
    ]
    path = tmp_path / "azure.csv"
    path.write_text("\n".join(lines))
    rows = rows_of(lengths=path, continued=0.7)
    given_requests = load_trace(path, max_input=20_480, count=400)
    assert [row["input_length"] for row in rows] == [r.input_tokens for r in given_requests]
    assert rows[10]["timestamp"] == pytest.approx(10_000)
    seen: set[int] = set()
    shared = 0
    for row in rows:
        shared += sum(block in seen for block in row["hash_ids"])
        seen.update(row["hash_ids"])
    assert shared > 300
    alone = rows_of(lengths=path, continued=0.0, prompts=1_000, zipf=0.0)
    assert len({row["session"] for row in alone}) == len(alone)
