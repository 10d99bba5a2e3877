"""Packed weights kept beside their model, so that the next load maps them.

A file is a header (magic, key, checksum) and the packed bytes, which begin on the boundary of a
huge page. Decides when one may be used: its key names the source weights, the format and the
library that packed them, its size fits and the checksum of every byte holds; anything else is a
miss, and the weights are packed again. It is replaced whole, by a rename, and never changed, so
that readers see the old or the new one. A folder that cannot be written, or a disk with little
room, costs only the time of packing.
"""

import fcntl
import hashlib
import logging
import mmap
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from kvasir_kvstore._native import crc32c

from kvasir_engine import _native
from kvasir_engine.formats import WeightFormat
from kvasir_engine.weights import Progress

log = logging.getLogger(__name__)

FOLDER = ".kvasir"
MAGIC = b"KVASIRP2"
DIGEST_BYTES = 32
HEADER_BYTES = 2 << 20
"""One huge page: file systems that keep files in large pages map what follows by such."""
CHUNK_BYTES = 8 << 20
ROOM_FACTOR = 2
"""A file is written where the disk has room for so many of it."""


@dataclass(frozen=True, slots=True)
class PackedFile:
    """Where packed weights lie, and what they must be."""

    path: Path
    key: bytes
    num_bytes: int

    def map(self, *, num_threads: int, progress: Progress | None = None) -> np.ndarray | None:
        """The packed bytes, uint8, read-only, shared with all who map them; None: nothing fits.

        `progress` is called with ("read", done bytes, total bytes).
        """
        try:
            with self.path.open("rb", buffering=0) as file:
                header = file.read(len(_header(self.key, b"")) + DIGEST_BYTES)
                size = os.fstat(file.fileno()).st_size
                if not header.startswith(_header(self.key, b"")):
                    log.info("packed weights in %s are not of this model and version", self.path)
                    return None
                if size == HEADER_BYTES + self.num_bytes:
                    data = _mapped(file.fileno(), self.num_bytes)
                    checksum = _checksum_of(data, num_threads, progress)
                    if header == _header(self.key, checksum):
                        return data
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("packed weights in %s cannot be read: %s", self.path, error)
            return None
        log.warning("packed weights in %s are damaged: packing them again", self.path)
        return None

    def write(self, data: np.ndarray, *, num_threads: int) -> bool:
        """Keeps `data`, uint8; False where that is not possible now."""
        new = self.path.with_suffix(".new")
        try:
            self.path.parent.mkdir(exist_ok=True)
            if shutil.disk_usage(self.path.parent).free < ROOM_FACTOR * data.nbytes:
                log.info("packed weights are not kept in %s: the disk has little room", self.path)
                return False
            new.touch()
            with new.open("r+b", buffering=0) as file:
                if not _is_ours(file.fileno(), new):
                    log.info("another process keeps the packed weights in %s", self.path)
                    return False
                try:
                    os.ftruncate(file.fileno(), 0)
                    os.ftruncate(file.fileno(), HEADER_BYTES)
                    for start, chunk in _chunks(data):
                        _write_all(file.fileno(), chunk, HEADER_BYTES + start)
                    header = _header(self.key, _checksum_of(data, num_threads, None))
                    _write_all(file.fileno(), np.frombuffer(header, np.uint8), 0)
                    new.replace(self.path)
                except OSError:
                    new.unlink()
                    raise
        except OSError as error:
            log.info("packed weights are not kept in %s: %s", self.path, error)
            return False
        return True


def packed_file(
    model_dir: Path | str, digest: bytes, weights: WeightFormat, num_bytes: int
) -> PackedFile:
    """The file for a model whose weights, config and format have this digest."""
    key = hashlib.blake2b(digest + _library_digest(), digest_size=DIGEST_BYTES).digest()
    return PackedFile(Path(model_dir) / FOLDER / f"{weights}.packed", key, num_bytes)


@cache
def _library_digest() -> bytes:
    """Of the library that decides the layout."""
    library = Path(_native.__file__).read_bytes()
    return hashlib.blake2b(library, digest_size=DIGEST_BYTES).digest()


def _is_ours(descriptor: int, path: Path) -> bool:
    """Takes the lock of an unfinished file; False if another holds it or has just finished it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def _header(key: bytes, checksum: bytes) -> bytes:
    return MAGIC + key + checksum


def _mapped(descriptor: int, num_bytes: int) -> np.ndarray:
    mapping = mmap.mmap(descriptor, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=HEADER_BYTES)
    with suppress(OSError):  # a hint: ordinary pages serve as well
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, np.uint8)


def _chunks(data: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, data.nbytes, CHUNK_BYTES):
        yield start, data[start : start + CHUNK_BYTES]


def _checksum_of(data: np.ndarray, num_threads: int, progress: Progress | None) -> bytes:
    """BLAKE2b over the checksums of the chunks, which all threads compute."""
    whole = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="packed") as pool:
        checksums = pool.map(crc32c, (chunk for _, chunk in _chunks(data)))
        for (start, chunk), checksum in zip(_chunks(data), checksums, strict=True):
            whole.update(checksum.to_bytes(4, "little"))
            if progress is not None:
                progress("read", start + chunk.nbytes, data.nbytes)
    return whole.digest()


def _write_all(descriptor: int, data: np.ndarray, offset: int) -> None:
    done = 0
    while done < data.nbytes:
        done += os.pwrite(descriptor, data[done:].data, offset + done)
