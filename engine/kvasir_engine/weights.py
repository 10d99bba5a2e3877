"""Weights of a Hugging Face folder: safetensors files, one or sharded, mapped into memory.

Decides what a tensor's bytes are and what the weights' digest is. Invariant: nothing outside the
files' declared ranges is read, and equal digests mean equal bytes. bf16 tensors are views of the
mapping; f16 and f32 ones are rounded to bf16 once. Names and shapes are checked by who packs them.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvasir_engine.fields import malformed, unsupported

Progress = Callable[[str, int, int], None]
"""Called with (stage, done bytes, total bytes)."""

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
HEADER_BYTES_MAX = 100 << 20
DIGEST_CHUNK_BYTES = 16 << 20
DIGEST_BYTES = 32
DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies in its file. start and end are byte offsets from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One safetensors file, mapped read-only."""

    path: Path
    mapping: mmap.mmap
    entries: dict[str, TensorEntry]
    stamp: tuple[int, ...]
    """Of the file as it was opened, see `stamp_of`."""

    @property
    def data(self) -> np.ndarray:
        """uint8, the whole file."""
        return np.frombuffer(self.mapping, dtype=np.uint8)

    def release(self) -> None:
        """Gives back the memory of what was read; it is read again where it is used again."""
        self.mapping.madvise(mmap.MADV_DONTNEED)

    def chunk_digest(self, start: int) -> bytes:
        """Of a chunk of the file, whose memory is given back at once."""
        chunk = self.data[start : start + DIGEST_CHUNK_BYTES]
        digest = hashlib.blake2b(chunk.data, digest_size=DIGEST_BYTES, person=b"kvasir-chunk")
        self.mapping.madvise(mmap.MADV_DONTNEED, start, chunk.nbytes)
        return digest.digest()

    @property
    def changed_s(self) -> float:
        """When the file last changed, by the clock of the epoch."""
        return self.stamp[-1] / 1e9

    def tensor(self, name: str) -> np.ndarray:
        """bf16 bits (uint16) of a tensor; a view of the mapping where the file holds bf16."""
        entry = self.entries[name]
        raw = self.data[entry.start : entry.end]
        values: np.ndarray = np.frombuffer(raw, dtype=DTYPES[entry.dtype]).reshape(entry.shape)
        if entry.dtype == "BF16":
            return np.require(values, requirements="A")  # copies where a header's length is odd
        return bf16_from_float32(values.astype(np.float32, copy=False))


def bf16_from_float32(values: np.ndarray) -> np.ndarray:
    """bf16 bits of float32 values: to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(is_nan, quiet, rounded).astype(np.uint16)


def float32_from_bf16(bits: np.ndarray) -> np.ndarray:
    """float32 values of bf16 bits, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def open_weights(model_dir: Path | str) -> list[WeightFile]:
    """The folder's weight files, headers checked. KvasirError if one is missing or broken."""
    folder = Path(model_dir)
    if (folder / INDEX_NAME).is_file():
        return [_open_file(path) for path in _shards(folder)]
    if (folder / SINGLE_NAME).is_file():
        return [_open_file(folder / SINGLE_NAME)]
    if any(folder.glob("*.bin")) or any(folder.glob("*.gguf")):
        raise unsupported(f"{folder} holds no safetensors weights; other formats are not read")
    raise malformed(f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}")


def all_tensors(
    files: list[WeightFile], names: Container[str] | None = None
) -> dict[str, np.ndarray]:
    """bf16 bits of every tensor, or of those `names`. A name in two files is refused."""
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        for name in file.entries:
            if name in tensors:
                raise malformed(f"tensor {name} lies in two files of {file.path.parent}")
            if names is None or name in names:
                tensors[name] = file.tensor(name)
    return tensors


def weights_digest(
    files: list[WeightFile], *, num_threads: int, progress: Progress | None = None
) -> bytes:
    """32 bytes: BLAKE2b over the chunk digests of all files, in the order of their names.

    Chunks make it a flat hash tree, so that all threads take part (hashlib releases the GIL).
    """
    by_name = sorted(files, key=lambda file: file.path.name)
    chunks = [
        (file, start)
        for file in by_name
        for start in range(0, len(file.mapping), DIGEST_CHUNK_BYTES)
    ]
    total = sum(len(file.mapping) for file in files)
    whole = hashlib.blake2b(digest_size=DIGEST_BYTES, person=b"kvasir-weights")
    done = 0
    with ThreadPoolExecutor(num_threads, thread_name_prefix="digest") as pool:
        digests = pool.map(lambda chunk: chunk[0].chunk_digest(chunk[1]), chunks)
        for (file, start), digest in zip(chunks, digests, strict=True):
            whole.update(digest)
            done += min(DIGEST_CHUNK_BYTES, len(file.mapping) - start)
            if progress is not None:
                progress("digest", done, total)
    return whole.digest()


def stamp_of(status: os.stat_result) -> tuple[int, ...]:
    """What tells a changed file from an unchanged one; last, the time of its last change in ns."""
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _shards(folder: Path) -> list[Path]:
    """Paths of the shards that the index names."""
    try:
        names = sorted(set(json.loads((folder / INDEX_NAME).read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise malformed(f"{folder / INDEX_NAME} has no usable weight_map: {error}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise malformed(f"{folder / INDEX_NAME} names the file {name!r} outside its folder")
        if not (folder / name).is_file():
            raise malformed(f"{folder} lacks the shard {name} that {INDEX_NAME} names")
    return [folder / name for name in names]


def _open_file(path: Path) -> WeightFile:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(HEADER_BYTES_MAX, size - 8):
            raise malformed(f"{path} is no safetensors file: its header length is {length} bytes")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise malformed(f"{path}: its header is not JSON: {error}") from error
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if not isinstance(header, dict):
        raise malformed(f"{path}: its header is no JSON object")
    header.pop("__metadata__", None)
    entries = {
        name: _entry(path, name, value, base=8 + length, size=size)
        for name, value in header.items()
    }
    return WeightFile(path, mapped, entries, stamp_of(status))


def _entry(path: Path, name: str, value: Any, *, base: int, size: int) -> TensorEntry:
    """A checked header entry: supported type, and a byte range that fits shape and file."""
    try:
        dtype, shape = str(value["dtype"]), tuple(int(n) for n in value["shape"])
        start, end = (base + int(offset) for offset in value["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise malformed(f"{path}: the entry of tensor {name} is broken: {error}") from error
    if dtype not in DTYPES:
        raise unsupported(
            f"tensor {name} in {path.name} is {dtype}; supported are {', '.join(DTYPES)}"
        )
    num_bytes = DTYPES[dtype].itemsize
    for dim in shape:
        num_bytes *= dim
    if end > size:
        raise malformed(
            f"{path}: tensor {name} ends at byte {end},"
            f" beyond the file's {size} bytes: it is cut off"
        )
    if min(shape, default=1) < 0 or not base <= start <= end or end - start != num_bytes:
        raise malformed(f"{path}: tensor {name} of {num_bytes} bytes has the range {start}:{end}")
    return TensorEntry(dtype, shape, start, end)
