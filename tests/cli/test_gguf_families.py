"""Every supported family and both kinds of tokenizers survive the way through a GGUF file."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from family_models import FAMILIES, make_family_model, random_tensors
from gguf_builder import pieces_tokenizer, read_safetensors, small_tokenizer, write_gguf
from kvasir_cli.errors import RefusedError
from kvasir_cli.models.importing import import_gguf
from kvasir_engine.logits import sequence_logits
from kvasir_engine.model import load_model
from kvasir_engine.text import Tokenizer
from kvasir_engine.weights import float32_from_bf16

IMPORTED = [
    "llama-3.1",
    "llama-linear",
    "mistral",
    "mixtral",
    "mixtral-window",
    "qwen2-yarn",
    "qwen3-yarn",
    "qwen3-moe",
    "gemma2",
    "gemma3",
    "phi3",
    "phi3-short",
    "phi3-plain",
]
AS_RELEASED = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {
        "num_hidden_layers": 7,
        "query_pre_attn_scalar": 16,
        "sliding_window_pattern": 6,
    },
}
"""What GGUF files cannot say, as in the models that exist."""
MOST_NORM_BITS_LOST = 1e-6


@pytest.fixture
def original(tmp_path: Path):
    """A function that makes a family's model folder."""

    def make(family: str, **changes: Any) -> Path:
        changes = AS_RELEASED.get(family, {}) | changes
        return make_family_model(family, tmp_path / "original", **changes)

    return make


@pytest.mark.parametrize("family", IMPORTED)
def test_logits_are_those_of_the_original(family: str, tmp_path: Path, original) -> None:
    folder = original(family)
    write_gguf(tmp_path / "m.gguf", folder, tokenizer=small_tokenizer())
    import_gguf(tmp_path / "m.gguf", tmp_path / "model", label="test")
    ids = np.random.default_rng(1).integers(0, 200, 90).astype(np.int32)
    found, expected = (
        sequence_logits(load_model(path, isa="scalar", num_threads=1), ids, chunk=90)
        for path in (tmp_path / "model", folder)
    )
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("family", IMPORTED)
def test_tensors_are_those_of_the_original(family: str, tmp_path: Path, original) -> None:
    folder = original(family)
    write_gguf(tmp_path / "m.gguf", folder, tokenizer=small_tokenizer())
    import_gguf(tmp_path / "m.gguf", tmp_path / "model", label="test")
    found = read_safetensors(tmp_path / "model" / "model.safetensors")
    expected = random_tensors(FAMILIES[family] | AS_RELEASED.get(family, {}))
    assert set(found) == set(expected)
    for name, bits in expected.items():
        error = np.abs(float32_from_bf16(found[name]) - float32_from_bf16(bits)).max()
        is_shifted = family.startswith("gemma") and "norm" in name  # stored as 1 + w in float32
        assert error <= (MOST_NORM_BITS_LOST if is_shifted else 0), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "attn": 1.5}, "attn_factor"),
        ({"model_type": "qwen3", "sliding_window": 8}, "sliding_window is not supported"),
        ({"model_type": "gemma2", "num_experts": 4, "num_experts_per_tok": 1}, "experts of"),
    ],
    ids=["attention-factor", "window", "experts"],
)
def test_what_would_be_computed_otherwise_is_refused(
    config: dict, message: str, tmp_path: Path, original, monkeypatch
) -> None:
    folder = original("llama-linear")
    raw = FAMILIES["llama-linear"] | config
    (folder / "config.json").write_text(json.dumps(raw))
    whole = gguf.GGUFWriter.write_header_to_file

    def with_attention_factor(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_attn_factors(config.get("attn", 1.0))
        whole(writer)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_attention_factor)
    write_gguf(tmp_path / "m.gguf", folder, tokenizer=small_tokenizer())
    with pytest.raises(RefusedError, match=message):
        import_gguf(tmp_path / "m.gguf", tmp_path / "model", label="test")


# ---- tokenizers of pieces ------------------------------------------------------------------------


@pytest.fixture
def tokenizer_of(tmp_path: Path, original):
    """A function that imports a model with this tokenizer and loads what came out."""

    def load(**changes: object) -> Tokenizer:
        folder = original("llama-linear")
        write_gguf(tmp_path / "m.gguf", folder, tokenizer=pieces_tokenizer(**changes))
        import_gguf(tmp_path / "m.gguf", tmp_path / "model", label="test")
        return Tokenizer.load(tmp_path / "model")

    return load


def pieces_of(tokenizer: Tokenizer, text: str) -> list[str]:
    tokens = pieces_tokenizer()["tokens"]
    return [tokens[i] for i in tokenizer.encode(text)]


def test_pieces_are_joined_by_their_scores(tokenizer_of) -> None:
    tokenizer = tokenizer_of()
    assert pieces_of(tokenizer, "hello world") == ["<s>", "\u2581hello", "\u2581world"]
    assert pieces_of(tokenizer, "hellohel") == ["<s>", "\u2581hello", "h", "el"]


def test_pieces_without_a_prefix_begin_as_written(tokenizer_of) -> None:
    tokenizer = tokenizer_of(adds_prefix=False)
    assert pieces_of(tokenizer, "hello world") == ["<s>", "h", "el", "lo", "\u2581world"]


@pytest.mark.parametrize("adds_prefix", [True, False])
def test_any_text_comes_back_from_pieces(adds_prefix: bool, tokenizer_of) -> None:
    tokenizer = tokenizer_of(adds_prefix=adds_prefix)
    text = "hello  wörld 🦉\n  hello<tool>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    stream = tokenizer.start_decoding()
    streamed = "".join(stream.feed([token]) for token in ids) + stream.flush()
    assert streamed == tokenizer.decode(ids)


def test_answers_end_at_the_tokens_of_the_family(tokenizer_of) -> None:
    assert tokenizer_of().eos_token_ids == (2, 3)


def test_pieces_without_scores_are_refused(tokenizer_of) -> None:
    with pytest.raises(RefusedError, match=r"lacks tokenizer\.ggml\.scores"):
        tokenizer_of(scores=None)
