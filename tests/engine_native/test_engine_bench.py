"""The engine's own benchmark: every case has a rate, and a share of what the machine allows."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_models import GOLDENS
from kvasir_engine import _native, bench
from kvasir_engine.bench import Case, EngineBenchSettings, plausible_block, run_bench_engine
from kvasir_engine.config import read_config
from kvasir_engine.decoder import LayerConfig, ModelConfig
from kvasir_engine.formats import KvFormat
from kvasir_engine.roofline import Limits, StepShape, least_seconds, step_work
from kvasir_proto.errors import KvasirError

SETTINGS = EngineBenchSettings(
    model_dir=Path(GOLDENS / "qwen2-bias"),
    prompt_lengths=(40, 3),
    batch_sizes=(1, 2),
    context_length=33,
    decode_steps=2,
    repetitions=2,
)
KEYS = {"engine", "weights", "kv", "threads", "test", "tokens_per_s", "share_of_limit", "rss_mb"}


class FakePeer:
    """A peer that always takes a second."""

    name, weights, kv = "other", "bf16", "bf16"

    def seconds(self, case: Case) -> float:
        return 1.0

    def rss_mb(self) -> int:
        return 7


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvasir_engine.bench.PROBE_BYTES", 1 << 20)


@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize("isa", [None, "scalar"])
def test_every_case_has_a_rate_and_the_result_is_json(isa: str | None, kv: KvFormat) -> None:
    seen: list[tuple[str, int, int]] = []
    rows = run_bench_engine(
        replace(SETTINGS, isa=isa, kv=kv), progress=lambda *args: seen.append(args)
    )
    json.dumps(rows)
    assert [row["test"] for row in rows] == ["p40", "p3", "d1", "d2"]
    assert all(row.keys() >= KEYS for row in rows)
    assert all(row["tokens_per_s"] > 0 and row["kv"] == kv for row in rows)
    assert [len(row["seconds"]) for row in rows] == [2] * 4
    assert all(row["share_of_limit"] > 0 for row in rows)
    for row in rows[2:]:
        assert row["overhead_share"].keys() == {"greedy", "top_p_peaked", "top_p"}
        assert all(0 < share < 1 for share in row["overhead_share"].values())
    assert seen[-1] == ("measure", 8, 8)


def test_peers_are_measured_in_turn_with_the_engine() -> None:
    rows = run_bench_engine(SETTINGS, peers=(FakePeer(),))
    other = [row for row in rows if row["engine"] == "other"]
    assert [row["tokens_per_s"] for row in other] == [40.0, 3.0, 2.0, 4.0]
    assert {row["rss_mb"] for row in other} == {7}


def test_memory_of_the_probes_is_not_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    held_mb = [5]

    class Hungry(bench.Probes):
        def __init__(self, **options: Any) -> None:
            held_mb[0] = 500
            super().__init__(**options)

    monkeypatch.setattr(bench, "peak_rss_mb", lambda: held_mb[0])
    monkeypatch.setattr(bench, "Probes", Hungry)
    assert {row["rss_mb"] for row in run_bench_engine(SETTINGS)} == {5}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"prompt_lengths": (40, 1025)}, "p1025 takes 1025 tokens; this model's context is 1024"),
        ({"context_length": 1023}, "d1 takes 1025 tokens"),
    ],
)
def test_lengths_beyond_the_models_context_are_refused(changes: Any, text: str) -> None:
    with pytest.raises(KvasirError, match=text):
        run_bench_engine(replace(SETTINGS, **changes))


def test_peak_of_a_path_is_measured() -> None:
    assert _native.PeakProbe(isa=_native.cpu_paths()[-1], weights="int8", num_threads=2).run() > 1e8


def model(**changes: object) -> ModelConfig:
    config = read_config(GOLDENS / "qwen2-bias")
    sizes = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    sizes |= {"intermediate_size": 128, "vocab_size": 1000, "layers": (LayerConfig(),)}
    return replace(config, **(sizes | changes))


def test_work_of_a_decode_step_is_counted_by_hand() -> None:
    layer, attention, head = step_work(model(), StepShape(3, 99, 100), weights="bf16", kv="int8")
    weights = 64 * 16 * (4 + 2 + 2 + 4) + 3 * 64 * 128
    assert (layer.num_bytes, layer.operations) == (2 * weights, 3 * 2 * weights)
    assert attention.num_bytes == 3 * 100 * 2 * 2 * (16 + 4)
    assert attention.operations == 3 * 100 * 4 * 4 * 16
    assert (head.num_bytes, head.operations) == (2 * 64_000, 3 * 2 * 64_000)


def test_a_prompt_sees_half_its_square_and_a_window_less() -> None:
    _, whole, _ = step_work(model(), StepShape(1, 0, 100), weights="int8", kv="bf16")
    assert whole.operations == 4 * 4 * 16 * 5050
    window = (LayerConfig(window=10),)
    _, part, _ = step_work(model(layers=window), StepShape(1, 0, 100), weights="int8", kv="bf16")
    assert part.operations == 4 * 4 * 16 * (55 + 90 * 10)
    _, one, _ = step_work(model(layers=window), StepShape(1, 99, 100), weights="int8", kv="bf16")
    assert one.num_bytes == 10 * 2 * 2 * 16 * 2


def test_the_slower_limit_of_each_part_counts() -> None:
    parts = step_work(model(), StepShape(1, 0, 100), weights="int8", kv="bf16")
    slow_memory = Limits(1.0, 1e30, 1e30)
    assert least_seconds(parts, slow_memory) == sum(part.num_bytes for part in parts)
    slow_integers = Limits(1e30, 1e30, 1.0)
    assert least_seconds(parts, slow_integers) == pytest.approx(
        parts[0].operations + parts[2].operations
    )


def test_experts_are_read_once_however_many_tokens_choose_them() -> None:
    sparse = model(
        layers=(LayerConfig(is_sparse=True),),
        num_experts=8,
        num_experts_per_token=2,
        expert_size=32,
    )
    one, many = (
        step_work(sparse, StepShape(n, 9, 10), weights="bf16", kv="bf16")[0] for n in (1, 100)
    )
    assert many.num_bytes - one.num_bytes == 2 * (8 - 2) * 3 * 64 * 32
    assert many.operations == 100 * one.operations


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_a_plausible_block_holds_ordinary_numbers(kv: KvFormat) -> None:
    layout = model().layout({"bf16": "bfloat16", "int8": "int8"}[kv])
    block = plausible_block(layout)
    assert block.nbytes == layout.block_bytes
    if kv == "int8":
        scales = block.reshape(-1, 32 * (16 + 4))[:, 32 * 16 :].copy().view(np.float32)
        assert (scales == 1 / 64).all()
