"""The engine's own benchmark: it measures every case and says what it measured."""

import json
from pathlib import Path

import pytest
from golden_models import GOLDENS
from kvasir_engine.bench import EngineBenchSettings, run_bench_engine


@pytest.mark.parametrize("isa", [None, "scalar"])
def test_every_case_has_a_rate_and_the_result_is_json(
    isa: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvasir_engine.bench.PROBE_BYTES", 1 << 20)
    settings = EngineBenchSettings(
        model_dir=Path(GOLDENS / "qwen2-bias"),
        prompt_lengths=(40, 3),
        batch_sizes=(1, 2),
        context_length=33,
        decode_steps=2,
        repetitions=2,
        isa=isa,
    )
    seen: list[tuple[str, int, int]] = []
    result = run_bench_engine(settings, lambda *args: seen.append(args))
    json.dumps(result)
    assert set(result["tokens_per_s"]) == {"prefill_40", "prefill_3", "decode_1", "decode_2"}
    assert min(result["tokens_per_s"].values()) > 0
    assert [len(values) for values in result["seconds"].values()] == [2] * 4
    assert result["memory_read_gb_per_s"] > 0
    assert seen[-1] == ("measure", 8, 8)
