"""Logits against the reference, on every kernel path that runs here."""

import json
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from golden_models import (
    BF16_INPUTS,
    GOLDENS,
    LENGTHS,
    MODELS,
    PATHS,
    RUNNABLE,
    Golden,
    read_golden,
    read_safetensors,
)
from kvasir_engine import _native
from kvasir_engine.logits import sequence_logits
from kvasir_engine.model import LoadedModel, load_model
from kvasir_engine.weights import float32_from_bf16
from reference_decoder import Bf16Inputs, reference_logits

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


@cache
def rounded_logits(name: str, ids: tuple[int, ...]) -> np.ndarray:
    """Logits by the definition, with activations rounded to bf16 where they meet weights."""
    config = json.loads((GOLDENS / name / "config.json").read_text())
    config |= {"rope_scaling": config["rope_parameters"]} | config["rope_parameters"]
    tensors = {}
    for tensor, bits in read_safetensors(GOLDENS / name / "model.safetensors").items():
        values = float32_from_bf16(bits).astype(np.float64)
        tensors[tensor] = values.view(Bf16Inputs) if values.ndim == 2 else values
    return reference_logits(config, tensors, np.array(ids))


def expected_logits(golden: Golden, path: str, ids: np.ndarray) -> np.ndarray:
    """Rounding may flip a near-tie between experts: what rounds is compared with what rounds."""
    if path in BF16_INPUTS:
        return rounded_logits(golden.folder.name, tuple(ids.tolist()))
    return golden.logits(len(ids))


def tolerance(name: str, path: str) -> tuple[float, float]:
    """(largest difference, rms difference) allowed."""
    if path == "scalar":
        return 1e-3, 1e-3
    if path in _native.model_paths():
        return 2e-2, 3e-3
    return 5e-2, 2e-2 if "moe" in name else 6e-3


@pytest.mark.parametrize("path", _native.model_paths())
@pytest.mark.parametrize("name", MODELS)
def test_modelled_instructions_match_the_reference(
    name: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvasir_engine.model.choose_path", lambda isa: isa)  # it refuses models
    golden = read_golden(name)
    model = load_model(golden.folder, isa=path, num_threads=2)
    ids = golden.ids(64)
    error = sequence_logits(model, ids, chunk=64) - expected_logits(golden, path, ids)
    largest, rms = tolerance(name, path)
    assert np.abs(error).max() <= largest
    assert np.sqrt(np.mean(np.square(error))) <= rms


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_match_the_reference(name: str, path: str, length: int, load: Load) -> None:
    golden, model = load(name, path)
    ids = golden.ids(length)
    error = sequence_logits(model, ids, chunk=length) - expected_logits(golden, path, ids)
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
    if path in BF16_INPUTS:
        logits = rounded_logits(name, tuple(ids.tolist()))[63:-1]
        continuation = logits.argmax(axis=1)
        margins = np.diff(np.sort(logits)[:, -2:])[:, 0]
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
