"""Quantised weights kept beside their model, so that the next load only reads them.

A file is a header (magic, key, checksum) and the packed bytes. Decides when one may be used: its
key names the source weights, the format and the library that packed them, its size fits and its
checksum holds; anything else is a miss, and the weights are packed again. It is replaced whole, by
a rename, so readers see the old or the new one. A folder that cannot be written, or a full disk,
costs only the time of packing.
"""

import fcntl
import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from kvasir_engine import _native
from kvasir_engine.formats import WeightFormat
from kvasir_engine.weights import Progress

log = logging.getLogger(__name__)

FOLDER = ".kvasir"
MAGIC = b"KVASIRPW"
DIGEST_BYTES = 32
HEADER_BYTES = 4096
CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class PackedFile:
    """Where packed weights lie, and what they must be."""

    path: Path
    key: bytes

    def read(self, into: np.ndarray, *, num_threads: int, progress: Progress | None = None) -> bool:
        """Fills `into`, uint8 zeros; False, and zeros stay, where nothing fits.

        `progress` is called with ("read", done bytes, total bytes).
        """
        try:
            with self.path.open("rb", buffering=0) as file:
                header = os.pread(file.fileno(), HEADER_BYTES, 0)
                size = os.fstat(file.fileno()).st_size
                if size != HEADER_BYTES + into.nbytes or not header.startswith(MAGIC + self.key):
                    return False
                checksum = _fill(file.fileno(), into, num_threads, progress)
                if header == _header(self.key, checksum):
                    return True
                log.warning("packed weights in %s are damaged and will be replaced", self.path)
        except FileNotFoundError:
            return False
        except OSError as error:
            log.warning("packed weights in %s cannot be read: %s", self.path, error)
        into[:] = 0
        return False

    def write(self, data: np.ndarray, *, num_threads: int) -> bool:
        """Keeps `data`, uint8; False where that is not possible now."""
        new = self.path.with_suffix(".new")
        try:
            self.path.parent.mkdir(exist_ok=True)
            with new.open("ab", buffering=0) as file:
                if not _is_ours(file.fileno(), new):
                    log.info("another process keeps the packed weights in %s", self.path)
                    return False
                try:
                    os.ftruncate(file.fileno(), 0)
                    file.write(_header(self.key, _checksum_of(data, num_threads)))
                    for chunk in _chunks(data):
                        _write_all(file.fileno(), chunk)
                    new.replace(self.path)
                except OSError:
                    new.unlink()
                    raise
        except OSError as error:
            log.info("packed weights are not kept in %s: %s", self.path, error)
            return False
        return True


def packed_file(model_dir: Path | str, digest: bytes, weights: WeightFormat) -> PackedFile:
    """The file for a model whose weights, config and format have this digest."""
    key = hashlib.blake2b(digest + _library_digest(), digest_size=DIGEST_BYTES).digest()
    return PackedFile(Path(model_dir) / FOLDER / f"{weights}.packed", key)


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
    return (MAGIC + key + checksum).ljust(HEADER_BYTES, b"\0")


def _chunks(data: np.ndarray) -> list[np.ndarray]:
    return [data[start : start + CHUNK_BYTES] for start in range(0, data.nbytes, CHUNK_BYTES)]


def _chunk_digest(chunk: np.ndarray) -> bytes:
    return hashlib.blake2b(chunk.data, digest_size=DIGEST_BYTES).digest()


def _checksum_of(data: np.ndarray, num_threads: int) -> bytes:
    with ThreadPoolExecutor(num_threads, thread_name_prefix="packed") as pool:
        digests = pool.map(_chunk_digest, _chunks(data))
        return hashlib.blake2b(b"".join(digests), digest_size=DIGEST_BYTES).digest()


def _fill(descriptor: int, into: np.ndarray, num_threads: int, progress: Progress | None) -> bytes:
    """Reads the bytes behind the header; returns their checksum."""
    chunks = _chunks(into)

    def fill(index: int) -> bytes:
        _read_all(descriptor, chunks[index], HEADER_BYTES + index * CHUNK_BYTES)
        return _chunk_digest(chunks[index])

    whole, done = hashlib.blake2b(digest_size=DIGEST_BYTES), 0
    with ThreadPoolExecutor(num_threads, thread_name_prefix="packed") as pool:
        for chunk, digest in zip(chunks, pool.map(fill, range(len(chunks))), strict=True):
            whole.update(digest)
            done += chunk.nbytes
            if progress is not None:
                progress("read", done, into.nbytes)
    return whole.digest()


def _read_all(descriptor: int, into: np.ndarray, offset: int) -> None:
    done = 0
    while done < into.nbytes:
        count = os.preadv(descriptor, [into[done:].data], offset + done)
        if count == 0:
            raise OSError("the file ended")
        done += count


def _write_all(descriptor: int, data: np.ndarray) -> None:
    done = 0
    while done < data.nbytes:
        done += os.write(descriptor, data[done:].data)
