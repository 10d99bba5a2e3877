"""The bench of chunks: recomputing everything agrees with the exact answer in every figure."""

from pathlib import Path

import numpy as np
from kvasir_engine.chunk_bench import ChunkBenchSettings, divergence, run_bench_chunks
from worker_builders import make_model_dir


def test_all_recomputed_agrees_and_less_comes_close(tmp_path: Path) -> None:
    model = make_model_dir(tmp_path / "tiny")
    settings = ChunkBenchSettings(model, 1, num_prompts=1, num_chunks=2, permilles=(1, 1000))
    result = run_bench_chunks(settings)
    some, everything = result["rows"]
    assert (everything["agreement"], everything["divergence"]) == (1, 0)
    assert 0 < some["divergence"] < 1
    assert result["prompt_tokens"] > 200


def test_divergence_is_zero_for_equal_distributions_only() -> None:
    logits = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 5.0]], np.float32)
    assert divergence(logits, logits + 7) < 1e-9
    assert divergence(logits, logits[::-1]) > 0.1
