"""GGUF files become Hugging Face folders that hold the same model."""

import json
from pathlib import Path

import gguf_builder
import numpy as np
import pytest
from gguf_builder import read_safetensors, small_tokenizer, write_gguf
from kvasir_cli.errors import RefusedError
from kvasir_cli.models.importing import import_gguf
from tokenizers import Tokenizer

GOLDENS = Path(__file__).parents[1] / "fixtures" / "goldens"
MODELS = ("llama-gqa-tied", "llama3-rope-scaled", "mixtral-moe", "qwen2-bias", "qwen3-qknorm")


@pytest.fixture
def imported(tmp_path: Path):
    """A function that writes a golden model as GGUF and imports it again."""

    def build(name: str, **tokenizer: object) -> Path:
        write_gguf(tmp_path / "m.gguf", GOLDENS / name, tokenizer=small_tokenizer(**tokenizer))
        import_gguf(tmp_path / "m.gguf", tmp_path / "model", label="test")
        return tmp_path / "model"

    return build


@pytest.mark.parametrize("name", MODELS)
def test_weights_come_back_bit_by_bit(name: str, imported) -> None:
    expected = read_safetensors(GOLDENS / name / "model.safetensors")
    found = read_safetensors(imported(name) / "model.safetensors")
    assert set(found) == set(expected)
    for tensor, bits in expected.items():
        assert np.array_equal(found[tensor], bits), tensor


@pytest.mark.parametrize("name", MODELS)
def test_config_says_the_same_as_the_original(name: str, imported) -> None:
    expected = json.loads((GOLDENS / name / "config.json").read_text())
    found = json.loads((imported(name) / "config.json").read_text())
    skipped = {"head_dim", "bos_token_id", "eos_token_id", "pad_token_id"}
    shared = (set(found) & set(expected)) - skipped
    assert {"model_type", "rope_parameters", "hidden_size", "tie_word_embeddings"} <= shared
    assert {key: found[key] for key in shared} == {key: expected[key] for key in shared}


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", " a 2024", [" a", " ", "2", "0", "2", "4"]),
        ("smollm", " ab1", [" ab", "1"]),
        ("llama-bpe", " ab\n", [" ab", "\n"]),
        ("qwen2", " ab cd", [" ab", " cd"]),
    ],
    ids=["gpt-2", "smollm", "llama-bpe", "qwen2"],
)
def test_tokenizer_cuts_text(pre: str, text: str, pieces: list[str], imported) -> None:
    tokenizer = Tokenizer.from_file(str(imported("llama-gqa-tied", pre=pre) / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert [tokenizer.decode([token]) for token in ids] == pieces


def test_digits_are_split_one_by_one_for_smollm(imported) -> None:
    tokens = small_tokenizer()
    tokens["tokens"][-1] = "12"
    tokens["merges"][-1] = "1 2"
    for pre, expected in (("smollm", ["1", "2"]), ("gpt-2", ["12"])):
        folder = imported("llama-gqa-tied", **tokens, pre=pre)
        found = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("12").tokens
        assert found == expected
        for path in folder.iterdir():
            path.unlink()


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_any_text_comes_back(pre: str, imported) -> None:
    tokenizer = Tokenizer.from_file(str(imported("llama-gqa-tied", pre=pre) / "tokenizer.json"))
    text = "Grüße,  12 x 34 = 408?\n\n\t日本語 🦉 don't <b>\r\n"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text


def test_control_tokens_are_special_and_end_tokens_are_listed(imported) -> None:
    folder = imported("llama-gqa-tied")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("<|im_end|>").ids == [2]
    assert tokenizer.decode([2]) == ""
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages[0]['content'] }}"
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize(
    ("arch", "tokenizer", "message"),
    [
        ("mamba", {}, "architecture 'mamba' is not supported"),
        (None, {"model": "bert"}, "tokenizer type 'bert' is not supported"),
        (None, {"model": "llama"}, "its tokenizer has no unknown token"),
        (None, {"pre": "tekken"}, "pre-tokenizer 'tekken' is not supported"),
        (None, {"merges": ["ab"]}, "merge"),
        (None, {"merges": ["zzz yyy"]}, "tokenizer cannot be rebuilt"),
    ],
    ids=[
        "architecture",
        "tokenizer",
        "pieces",
        "pre-tokenizer",
        "merge",
        "merge-of-unknown-tokens",
    ],
)
def test_unsupported_file_is_refused_and_leaves_nothing(
    arch: str | None, tokenizer: dict, message: str, tmp_path: Path
) -> None:
    source = tmp_path / "m.gguf"
    model = GOLDENS / "llama-gqa-tied"
    write_gguf(source, model, arch=arch, tokenizer=small_tokenizer(**tokenizer))
    with pytest.raises(RefusedError, match=message):
        import_gguf(source, tmp_path / "model", label="test")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_cut_off_file_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "m.gguf"
    write_gguf(source, GOLDENS / "llama-gqa-tied", tokenizer=small_tokenizer())
    source.write_bytes(source.read_bytes()[:-100_000])
    with pytest.raises(RefusedError, match="damaged or cut off"):
        import_gguf(source, tmp_path / "model", label="test")


def test_file_without_a_tensor_of_its_model_is_refused(tmp_path: Path, monkeypatch) -> None:
    source = tmp_path / "m.gguf"
    whole = gguf_builder.gguf_tensors
    monkeypatch.setattr(
        gguf_builder,
        "gguf_tensors",
        lambda *args: [item for item in whole(*args) if item[0] != "blk.1.ffn_up.weight"],
    )
    write_gguf(source, GOLDENS / "llama-gqa-tied", tokenizer=small_tokenizer())
    with pytest.raises(RefusedError, match=r"lack the tensor model\.layers\.1\.mlp\.up_proj"):
        import_gguf(source, tmp_path / "model", label="test")
    assert not (tmp_path / "model").exists()


def test_occupied_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RefusedError, match="is not empty"):
        import_gguf(tmp_path / "m.gguf", tmp_path, label="test")
