"""Tiny models with reference logits, and variants of their folders."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from kvasir_engine import _native

GOLDENS = Path(__file__).parent.parent / "fixtures" / "goldens"
MODELS = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())
PATHS = ("scalar", "avx2", "avx512", "avx512bf16", "amx")
RUNNABLE = _native.cpu_paths()
BF16_INPUTS = ("avx512bf16", "amx", *_native.model_paths())
"""Paths that round activations to bf16 for bf16 weights."""
LENGTHS = (1, 5, 64, 200)

_DTYPES = {"I32": "<i4", "F32": "<f4", "BF16": "<u2"}


@dataclass(frozen=True, slots=True)
class Golden:
    """A model folder and what the reference computed with it."""

    folder: Path
    arrays: dict[str, np.ndarray]

    def ids(self, length: int) -> np.ndarray:
        return self.arrays[f"ids_{length}"]

    def logits(self, length: int) -> np.ndarray:
        return self.arrays[f"logits_{length}"]


def read_golden(name: str) -> Golden:
    return Golden(GOLDENS / name, read_safetensors(GOLDENS / name / "golden.safetensors"))


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Independent of the engine's reader, which the tests test."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8:start])
    return {
        name: np.frombuffer(
            data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
            _DTYPES[entry["dtype"]],
        ).reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def write_safetensors(
    path: Path, tensors: dict[str, np.ndarray], *, is_aligned: bool = False
) -> None:
    """uint16 arrays are written as BF16; `is_aligned` as the format's own writer does."""
    names = {"uint16": "BF16", "float16": "F16", "float32": "F32", "int8": "I8"}
    header, blobs, offset = {}, [], 0
    for name, values in tensors.items():
        header[name] = {
            "dtype": names[values.dtype.name],
            "shape": list(values.shape),
            "data_offsets": [offset, offset + values.nbytes],
        }
        blobs.append(values.tobytes())
        offset += values.nbytes
    text = json.dumps(header).encode()
    if is_aligned:
        text = text.ljust(-(-len(text) // 8) * 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def copy_folder(name: str, target: Path, **changes: Any) -> Path:
    """A copy of a golden folder with fields of config.json replaced (None removes one)."""
    shutil.copytree(GOLDENS / name, target)
    config = json.loads((target / "config.json").read_text()) | changes
    config = {
        key: value for key, value in config.items() if key not in changes or value is not None
    }
    (target / "config.json").write_text(json.dumps(config))
    return target
