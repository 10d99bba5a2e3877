"""Logits against the reference, on every kernel path that runs here."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from golden_models import LENGTHS, MODELS, PATHS, RUNNABLE, Golden, read_golden
from kvasir_engine import _native
from kvasir_engine.logits import sequence_logits
from kvasir_engine.model import LoadedModel, load_model

GREEDY_MARGIN_MIN = 0.1


@cache
def loaded(name: str, path: str) -> tuple[Golden, LoadedModel]:
    golden = read_golden(name)
    return golden, load_model(golden.folder, isa=path, num_threads=2)


Load = Callable[[str, str], tuple[Golden, LoadedModel]]


@pytest.fixture
def load() -> Load:
    """Loads a golden model on a path, or skips where the processor lacks it."""

    def load_or_skip(name: str, path: str) -> tuple[Golden, LoadedModel]:
        if path not in RUNNABLE:
            pytest.skip(f"KERNEL PATH {path} DOES NOT RUN ON THIS PROCESSOR: parity not shown")
        return loaded(name, path)

    return load_or_skip


@pytest.mark.parametrize("path", _native.model_paths())
@pytest.mark.parametrize("name", MODELS)
def test_modelled_instructions_match_the_reference(name: str, path: str) -> None:
    golden = read_golden(name)
    model = load_model(golden.folder, isa=path, num_threads=2)
    error = sequence_logits(model, golden.ids(64), chunk=64) - golden.logits(64)
    largest, rms = tolerance(name, path)
    assert np.abs(error).max() <= largest
    assert np.sqrt(np.mean(np.square(error))) <= rms


def tolerance(name: str, path: str) -> tuple[float, float]:
    """(largest difference, rms difference) allowed."""
    if path == "scalar":
        return 1e-3, 1e-3
    return 5e-2, 2e-2 if "moe" in name else 6e-3


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_match_the_reference(name: str, path: str, length: int, load: Load) -> None:
    golden, model = load(name, path)
    error = sequence_logits(model, golden.ids(length), chunk=length) - golden.logits(length)
    largest, rms = tolerance(name, path)
    assert np.abs(error).max() <= largest
    assert np.sqrt(np.mean(np.square(error))) <= rms


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_continuation_agrees_where_the_margin_is_clear(
    name: str, path: str, load: Load
) -> None:
    golden, model = load(name, path)
    continuation = golden.arrays["greedy_48_from_64"]
    margins = golden.arrays["greedy_margins"]
    ids = np.concatenate([golden.ids(64), continuation])
    chosen = sequence_logits(model, ids, chunk=len(ids)).argmax(axis=1)[63:-1]
    clear = margins > GREEDY_MARGIN_MIN
    assert clear.sum() > 10
    assert np.array_equal(chosen[clear], continuation[clear])


@pytest.mark.parametrize("name", MODELS)
def test_vector_paths_of_different_width_agree_bitwise(name: str, load: Load) -> None:
    golden, wide = load(name, "avx512")
    _, narrow = load(name, "avx2")
    ids = golden.ids(200)
    assert np.array_equal(
        sequence_logits(wide, ids, chunk=200), sequence_logits(narrow, ids, chunk=200)
    )
