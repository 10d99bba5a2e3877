"""Writes bf16 safetensors files piece by piece, so that memory holds one piece at a time.

The format (https://github.com/huggingface/safetensors): u64 header length, JSON header with every
tensor's type, shape and byte range, then the data. The header comes first, so shapes must be known
before the data is; what the tensors hold is left to the caller.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvasir_cli.models.folder import write_json
from kvasir_cli.progress import Advance


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name and shape of one bf16 tensor."""

    name: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data."""
        return 2 * math.prod(self.shape)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 values as bf16 bits (uint16), rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, np.uint32(0x7FC0), rounded).astype("<u2")


def write_model(
    folder: Path,
    specs: Sequence[TensorSpec],
    pieces: Callable[[TensorSpec], Iterable[np.ndarray]],
    *,
    advance: Advance,
    shard_bytes_max: int = 0,
) -> None:
    """Write model.safetensors, or numbered shards and their index if `shard_bytes_max` is set.

    Args:
        pieces: for a spec, its values in order as uint16 arrays (bf16 bits) of any sizes.
        advance: called with the number of bytes written.
    """
    shards = list(_shards(specs, shard_bytes_max))
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", shards[0], pieces, advance)
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, pieces, advance)
    index = {
        "metadata": {"total_size": sum(spec.num_bytes for spec in specs)},
        "weight_map": {
            spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard
        },
    }
    write_json(folder / "model.safetensors.index.json", index)


def _shards(specs: Sequence[TensorSpec], shard_bytes_max: int) -> Iterator[list[TensorSpec]]:
    shard: list[TensorSpec] = []
    size = 0
    for spec in specs:
        if shard and shard_bytes_max and size + spec.num_bytes > shard_bytes_max:
            yield shard
            shard, size = [], 0
        shard.append(spec)
        size += spec.num_bytes
    yield shard


def _write_file(
    path: Path,
    specs: Sequence[TensorSpec],
    pieces: Callable[[TensorSpec], Iterable[np.ndarray]],
    advance: Advance,
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        start, end = end, end + spec.num_bytes
        header[spec.name] = {"dtype": "BF16", "shape": spec.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            written = 0
            for piece in pieces(spec):
                assert piece.dtype == np.dtype("<u2"), piece.dtype
                file.write(np.ascontiguousarray(piece).data)
                written += piece.nbytes
                advance(piece.nbytes)
            assert written == spec.num_bytes, f"{spec.name}: {written} of {spec.num_bytes} bytes"
