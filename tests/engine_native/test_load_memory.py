"""What a load holds in memory, seen from outside: the peak of a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_models import write_safetensors
from kvasir_engine.config import parse_config
from kvasir_engine.packed import FOLDER
from kvasir_engine.tensors import tensor_shapes

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 5,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 40_000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}
"""225 MB in bf16, the embeddings 82 of them."""
CHILD = """
import sys
from pathlib import Path
from kvasir_engine.model import load_model

def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = kilobytes("VmRSS")
model = load_model(sys.argv[1], num_threads=2, weights=sys.argv[2], keeps_packed=True)
print(kilobytes("VmHWM") - before, model.weights_bytes)
"""
SHARE_MAX = 1.25
"""Of the packed weights: the bar for what a load may hold at any moment."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("middling")
    shapes = tensor_shapes(parse_config(CONFIG))
    tensors = {name: np.full(shape, 0x3C01, np.uint16) for name, shape in shapes.items()}
    write_safetensors(target / "model.safetensors", tensors, is_aligned=True)
    (target / "config.json").write_text(json.dumps(CONFIG))
    return target


def peak_share(folder: Path, weights: str) -> float:
    """The largest growth of memory while loading, over the size of the packed weights."""
    command = [sys.executable, "-c", CHILD, folder, weights]
    ended = subprocess.run(command, capture_output=True, check=True, timeout=120)
    peak_kb, weights_bytes = ended.stdout.split()
    return int(peak_kb) * 1024 / int(weights_bytes)


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_a_load_never_holds_much_more_than_the_packed_weights(folder: Path, weights: str) -> None:
    packing = peak_share(folder, weights)
    assert (folder / FOLDER / f"{weights}.packed").exists()
    mapping = peak_share(folder, weights)
    assert 0.9 < packing < SHARE_MAX
    assert 0.9 < mapping < SHARE_MAX
