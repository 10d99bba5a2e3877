"""Balanced weights: the same function, the same bytes everywhere, and less lost by rounding."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from family_models import FAMILIES, make_family_model, random_tensors
from golden_models import RUNNABLE, write_safetensors
from kvasir_engine.formats import WeightFormat
from kvasir_engine.logits import sequence_logits
from kvasir_engine.model import LoadedModel, load_model
from kvasir_engine.weights import bf16_from_float32, float32_from_bf16

IDS = np.random.default_rng(4).integers(0, 200, 70).astype(np.int32)
MIXED = "qwen3-moe-mixed-layers"

Load = Callable[..., LoadedModel]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    def load_balanced_or_not(
        folder: Path,
        weights: WeightFormat = "int8",
        *,
        isa: str = RUNNABLE[-1],
        is_balanced: bool = True,
        num_threads: int = 2,
    ) -> LoadedModel:
        monkeypatch.setattr("kvasir_engine.model.BALANCED", (weights,) if is_balanced else ())
        return load_model(folder, num_threads=num_threads, isa=isa, weights=weights)

    return load_balanced_or_not


def logits_of(model: LoadedModel) -> np.ndarray:
    return sequence_logits(model, IDS, chunk=len(IDS))


def share_of_error(model: LoadedModel, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((logits_of(model) - expected) ** 2) / np.mean(expected**2)))


@pytest.mark.parametrize("isa", sorted({"scalar", RUNNABLE[-1]}))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_float_model_computes_the_same_bits_balanced(
    family: str, isa: str, load: Load, tmp_path: Path
) -> None:
    folder = make_family_model(family, tmp_path / "model")
    plain = load(folder, "bf16", isa=isa, is_balanced=False)
    balanced = load(folder, "bf16", isa=isa)
    assert not np.array_equal(plain.native.packed, balanced.native.packed)
    assert np.array_equal(logits_of(plain), logits_of(balanced))


@pytest.mark.parametrize("family", [MIXED, "gemma3", "llama-odd-sizes"])
def test_paths_and_threads_pack_the_same_bytes(family: str, load: Load, tmp_path: Path) -> None:
    """Kept weights do not say which path has packed them."""
    folder = make_family_model(family, tmp_path / "model")
    first = load(folder, isa="scalar", num_threads=1).native.packed
    assert not np.array_equal(first, load(folder, is_balanced=False).native.packed)
    for isa in RUNNABLE:
        assert np.array_equal(load(folder, isa=isa).native.packed, first), isa


def write_uneven(folder: Path, family: str) -> None:
    """The family's model with channels of very different size, by factors that cancel out."""
    tensors = {
        name: float32_from_bf16(bits) for name, bits in random_tensors(FAMILIES[family]).items()
    }
    source = np.random.default_rng(6)

    def scale(maker: np.ndarray, *readers: str) -> None:
        factors = np.exp2(source.integers(-5, 6, len(maker)))
        maker *= factors.reshape(-1, *[1] * (maker.ndim - 1))
        for name in readers:
            tensors[name] = tensors[name] / factors

    for layer in range(FAMILIES[family]["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        heads = (f"{prefix}self_attn.{name}_proj.weight" for name in "qkv")
        scale(tensors[f"{prefix}input_layernorm.weight"], *heads)
        gates = (f"{prefix}mlp.{name}_proj.weight" for name in ("gate", "up"))
        scale(tensors[f"{prefix}post_attention_layernorm.weight"], *gates)
        scale(tensors[f"{prefix}mlp.up_proj.weight"], f"{prefix}mlp.down_proj.weight")
    scale(tensors["model.norm.weight"], "lm_head.weight")
    bits = {name: bf16_from_float32(values) for name, values in tensors.items()}
    write_safetensors(folder / "model.safetensors", bits)


def test_uneven_channels_round_as_even_ones_do(load: Load, tmp_path: Path) -> None:
    folder = make_family_model("mistral", tmp_path / "model")
    expected = logits_of(load(folder, "bf16", is_balanced=False))
    even = share_of_error(load(folder), expected)
    write_uneven(folder, "mistral")
    assert np.array_equal(logits_of(load(folder, "bf16", is_balanced=False)), expected)
    assert share_of_error(load(folder), expected) < 1.3 * even
    assert share_of_error(load(folder, is_balanced=False), expected) > 3 * even


def test_channels_without_a_size_stay_harmless(load: Load, tmp_path: Path) -> None:
    """Of weights that are zero, where training has pruned them, on either side of a product."""
    folder = make_family_model("mistral", tmp_path / "model")
    tensors = random_tensors(FAMILIES["mistral"])
    tensors["model.layers.0.input_layernorm.weight"][:3] = 0
    tensors["model.layers.1.mlp.up_proj.weight"][:] = 0
    tensors["model.norm.weight"][:] = 0
    for name in ("q", "k", "v"):
        tensors[f"model.layers.2.self_attn.{name}_proj.weight"][:, 5:9] = 0
    write_safetensors(folder / "model.safetensors", tensors)
    plain, balanced = load(folder, "bf16", is_balanced=False), load(folder, "bf16")
    assert np.array_equal(logits_of(plain), logits_of(balanced))
    assert np.isfinite(logits_of(load(folder))).all()


def test_only_int8_is_balanced(tmp_path: Path) -> None:
    """int4 weights that were kept in groups of 32 come through unchanged, bf16 as they are."""
    folder = make_family_model("llama", tmp_path / "model")
    with pytest.MonkeyPatch.context() as patch:
        packed = {
            weights: load_model(folder, num_threads=1, weights=weights).native.packed
            for weights in ("bf16", "int8", "int4")
        }
        patch.setattr("kvasir_engine.model.BALANCED", ())
        for weights, before in packed.items():
            after = load_model(folder, num_threads=1, weights=weights).native.packed
            assert np.array_equal(before, after) == (weights != "int8")
