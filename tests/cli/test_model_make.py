"""Made models: deterministic, loadable, with a tokenizer that works."""

import json
from pathlib import Path

import numpy as np
import pytest
from gguf_builder import read_safetensors, to_float32
from kvasir_cli.errors import RefusedError
from kvasir_cli.models.making import make_model
from kvasir_cli.models.safetensors import to_bf16
from kvasir_cli.models.shapes import SHAPES
from tokenizers import Tokenizer


def test_equal_seeds_make_equal_files(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_model("tiny", tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_shards_hold_what_one_file_holds(tmp_path: Path) -> None:
    make_model("tiny-moe", tmp_path / "whole")
    make_model("tiny-moe", tmp_path / "shards", shard_bytes_max=100_000)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    whole = read_safetensors(tmp_path / "whole" / "model.safetensors")
    assert len(set(index["weight_map"].values())) > 2
    assert set(index["weight_map"]) == set(whole)
    for file in set(index["weight_map"].values()):
        for name, bits in read_safetensors(tmp_path / "shards" / file).items():
            assert index["weight_map"][name] == file
            assert np.array_equal(bits, whole[name])


def test_norms_are_near_one_and_the_rest_near_zero(tmp_path: Path) -> None:
    make_model("tiny-qwen3", tmp_path / "m")
    for name, bits in read_safetensors(tmp_path / "m" / "model.safetensors").items():
        values = to_float32(bits)
        assert values.mean() == pytest.approx(1.0 if "norm" in name else 0.0, abs=0.02), name
        assert np.abs(values - values.mean()).max() < 0.2


def test_every_word_token_encodes_to_itself(tmp_path: Path) -> None:
    make_model("tiny", tmp_path / "m")
    tokenizer = Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == SHAPES["tiny"].vocab
    words = list(range(259, 512))
    assert tokenizer.encode(tokenizer.decode(words)).ids == words
    text = "Grüße 🦉\n<b>"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_unknown_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no shape 'huge'"):
        make_model("huge", tmp_path / "m")


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1.0, 0x3F80),
        (1.00390625, 0x3F80),  # halfway: to even
        (1.01171875, 0x3F82),  # halfway: to even
        (float("inf"), 0x7F80),
        (-0.0, 0x8000),
    ],
)
def test_bf16_rounds_to_nearest_even(value: float, bits: int) -> None:
    assert to_bf16(np.array([value], dtype=np.float32))[0] == bits


def test_bf16_keeps_nan() -> None:
    nan = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], dtype=np.uint32).view(np.float32)
    assert np.isnan(to_float32(to_bf16(nan))).all()
