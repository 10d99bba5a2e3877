"""Every supported family computes what its published definition says, on every kernel path."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_models import CONTEXT, FAMILIES, YARN, make_family_model, random_tensors
from golden_models import PATHS, RUNNABLE, write_safetensors
from kvasir_engine.logits import sequence_logits
from kvasir_engine.memory import weights_bytes
from kvasir_engine.model import LoadedModel, load_model, new_kv_arrays
from kvasir_engine.weights import float32_from_bf16
from reference_decoder import reference_logits
from step_builders import Part, run_step

LENGTH = 150
SCALAR_TOLERANCE = 5e-5
"""Largest difference, of the largest logit."""
FAST_RMS = {"dense": 0.02, "sparse": 0.08}
"""Of the logits' own spread; a mixture may flip a near-tie between experts."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: make_family_model(name, root / name) for name in FAMILIES}


@pytest.fixture
def load(folders: dict[str, Path]):
    """Loads a family's model on a path, or skips where the processor lacks it."""

    def load_or_skip(family: str, path: str) -> LoadedModel:
        if path not in RUNNABLE:
            pytest.skip(f"KERNEL PATH {path} DOES NOT RUN ON THIS PROCESSOR: parity not shown")
        return load_model(folders[family], isa=path, num_threads=2)

    return load_or_skip


def wide_tensors(family: str) -> dict[str, np.ndarray]:
    """The family's weights in float64."""
    return {
        name: float32_from_bf16(bits).astype(np.float64)
        for name, bits in random_tensors(FAMILIES[family]).items()
    }


@cache
def expected(family: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids, logits of the reference)."""
    config = FAMILIES[family]
    ids = np.random.default_rng(9).integers(0, config["vocab_size"], LENGTH).astype(np.int32)
    return ids, reference_logits(config, wide_tensors(family), ids)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_the_definition(family: str, path: str, load) -> None:
    ids, logits = expected(family)
    error = sequence_logits(load(family, path), ids, chunk=LENGTH) - logits
    spread = logits.std()
    assert spread > 0.3, "logits too alike to tell models apart"
    if path == "scalar":
        assert np.abs(error).max() < SCALAR_TOLERANCE * np.abs(logits).max()
        return
    kind = "sparse" if "num_experts_per_tok" in FAMILIES[family] else "dense"
    assert np.sqrt(np.mean(np.square(error))) < FAST_RMS[kind] * spread


VISIBLE: dict[str, tuple[str, dict[str, Any]]] = {
    "window": ("mistral", {"sliding_window": 41}),
    "which layers slide": ("qwen2-upper-windows", {"max_window_layers": 2}),
    "pattern of layers": ("gemma3", {"sliding_window_pattern": 4}),
    "linear factor": ("llama-linear", {"rope_scaling": {"rope_type": "linear", "factor": 3.9}}),
    "dynamic base": ("llama-dynamic-long", {"rope_scaling": None}),
    "yarn": ("qwen2-yarn", {"rope_scaling": YARN | {"factor": 4.1}}),
    "yarn's ramp": ("qwen3-yarn", {"rope_scaling": YARN | {"beta_slow": 4}}),
    "global base": ("gemma3", {"rope_theta": 9e5}),
    "local base": ("gemma3", {"rope_local_base_freq": 9000.0}),
    "query scale": ("gemma3", {"query_pre_attn_scalar": 25}),
    "cap of scores": ("gemma2", {"attn_logit_softcapping": 3.1}),
    "cap of logits": ("gemma2", {"final_logit_softcapping": 5.1}),
    "scaled shares": ("qwen3-moe", {"norm_topk_prob": False}),
    "part that rotates": ("phi3-plain", {"partial_rotary_factor": 0.75}),
    "long divisors": ("phi3", {"original_max_position_embeddings": CONTEXT}),
}
"""Changes of a config.json that a test against the definition has to notice."""


@pytest.mark.parametrize("case", VISIBLE, ids=str)
def test_every_field_of_a_definition_shows_in_the_logits(case: str) -> None:
    family, changes = VISIBLE[case]
    ids, logits = expected(family)
    other = reference_logits(FAMILIES[family] | changes, wide_tensors(family), ids)
    assert np.abs(other - logits).max() > 20 * SCALAR_TOLERANCE * np.abs(logits).max()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_and_prefixes_do_not_show(family: str, path: str, load) -> None:
    model, (ids, _) = load(family, path), expected(family)
    whole = sequence_logits(model, ids, chunk=LENGTH)
    for chunk in (1, 7, 33, 64):
        assert np.array_equal(sequence_logits(model, ids, chunk=chunk), whole), chunk
    new_kv_arrays(model, 16)
    other = np.concatenate([ids[:64], np.flip(ids[64:])]).astype(np.int32)
    run_step(model, Part(other, 0, 100, (0, 1, 2, 3)))
    suffix, _ = run_step(model, Part(ids, 64, LENGTH - 64, (0, 1, 4, 5, 6)), Part(ids, 0, 9, (9,)))
    assert np.array_equal(suffix, whole[64:])


@pytest.mark.parametrize("family", FAMILIES)
def test_vector_paths_agree_bitwise(family: str, load) -> None:
    ids, _ = expected(family)
    wide = sequence_logits(load(family, "avx512"), ids, chunk=LENGTH)
    assert np.array_equal(wide, sequence_logits(load(family, "avx2"), ids, chunk=LENGTH))


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_estimated_before_the_load(family: str, load) -> None:
    model = load(family, "scalar")
    estimate = weights_bytes(model.config)
    assert estimate <= model.weights_bytes <= estimate + (4 << 20)


@pytest.mark.parametrize(
    ("prefix", "other"),
    [
        ("language_model.", "vision_tower.weight"),
        ("model.language_model.", "model.multi_modal_projector.weight"),
    ],
    ids=["older names", "newer names"],
)
def test_text_model_of_a_folder_with_images_is_computed(
    prefix: str, other: str, tmp_path: Path
) -> None:
    ids, logits = expected("gemma3")
    config = FAMILIES["gemma3"] | {"model_type": "gemma3_text"}
    whole = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(whole | {"text_config": config}))
    start = "" if prefix == "language_model." else "model."
    tensors = {
        prefix + name.removeprefix(start): bits for name, bits in random_tensors(config).items()
    }
    write_safetensors(tmp_path / "model.safetensors", tensors | {other: np.zeros(3, np.float32)})
    found = sequence_logits(load_model(tmp_path, isa="scalar", num_threads=1), ids, chunk=LENGTH)
    assert np.abs(found - logits).max() < SCALAR_TOLERANCE * np.abs(logits).max()


def test_what_left_the_window_is_not_read(load) -> None:
    """Blocks before the window of every token may hold anything."""
    model, (ids, _) = load("mistral", RUNNABLE[-1]), expected("mistral")
    whole = sequence_logits(model, ids, chunk=LENGTH)
    arrays = new_kv_arrays(model, 5)
    run_step(model, Part(ids, 0, 128, (0, 1, 2, 3, 4)))
    arrays.data[:2] = 0xFF  # NaN; position 128 sees 89 and later
    (rest,) = run_step(model, Part(ids, 128, LENGTH - 128, (0, 1, 2, 3, 4)))
    assert np.array_equal(rest, whole[128:])
