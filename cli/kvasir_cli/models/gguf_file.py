"""Opens GGUF files: metadata with types checked, tensors by name.

Decides what counts as a readable GGUF file. The data stays in the file (memory-mapped) until a
caller takes a piece of it; what metadata and tensors mean is left to the callers.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np

from kvasir_cli.errors import RefusedError

T = TypeVar("T", int, float, str, bool)
PIECE_VALUES_MAX = 1 << 21
"""Values dequantised at a time: 8 MB as float32, so memory stays low for any tensor."""


@dataclass(frozen=True, slots=True)
class GgufFile:
    """An open GGUF file."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, gguf.ReaderTensor]

    @property
    def architecture(self) -> str:
        """The model type as llama.cpp names it."""
        return self.need("general.architecture", str)

    def get(self, key: str, kind: type[T], default: T) -> T:
        """A metadata value, or `default` if the file does not have it."""
        return self.need(key, kind) if key in self.fields else default

    def need(self, key: str, kind: type[T]) -> T:
        """A metadata value.

        Raises:
            RefusedError: it is absent or of another type.
        """
        if key not in self.fields:
            raise RefusedError(f"{self.path}: its metadata lacks {key}")
        value = self.fields[key].contents()
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind):
            raise RefusedError(f"{self.path}: {key} is not of type {kind.__name__}: {value!r}")
        return value

    def strings(self, key: str) -> list[str]:
        """A metadata array of strings."""
        if key not in self.fields:
            raise RefusedError(f"{self.path}: its metadata lacks {key}")
        field = self.fields[key]
        return [bytes(field.parts[index]).decode("utf-8", "replace") for index in field.data]

    def floats(self, key: str) -> list[float]:
        """A metadata array of numbers.

        Raises:
            RefusedError: the file does not have it.
        """
        if key not in self.fields:
            raise RefusedError(f"{self.path}: its metadata lacks {key}")
        field = self.fields[key]
        return [float(field.parts[index][0]) for index in field.data]

    def integers(self, key: str) -> list[int]:
        """A metadata array of integers, empty if the file does not have it."""
        if key not in self.fields:
            return []
        field = self.fields[key]
        return [int(field.parts[index][0]) for index in field.data]


def open_gguf(path: Path) -> GgufFile:
    """Open a GGUF file.

    Raises:
        RefusedError: no such file, or not a whole GGUF file.
    """
    if not path.is_file():
        raise RefusedError(f"no such file: {path}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise RefusedError(f"{path} is not a GGUF file")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError, struct.error, UnicodeDecodeError) as error:
        raise RefusedError(f"{path} is damaged or cut off: {error}") from error
    return GgufFile(path, dict(reader.fields), {tensor.name: tensor for tensor in reader.tensors})


def float32_text(value: float) -> float:
    """The shortest decimal of a float32: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def dequantise(rows: np.ndarray, tensor: gguf.ReaderTensor) -> np.ndarray:
    """Rows of a tensor's raw data as float32.

    Raises:
        RefusedError: the quantisation is not one that the package gguf can undo.
    """
    try:
        values: np.ndarray = gguf.quants.dequantize(rows, tensor.tensor_type)
    except RuntimeError as error:
        raise RefusedError(
            f"{tensor.name} is stored as {tensor.tensor_type.name}, which cannot be read"
        ) from error
    return values
