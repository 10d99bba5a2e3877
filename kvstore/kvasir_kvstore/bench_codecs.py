"""How fast the codecs are on one core, beside memcpy: 16 MiB of KV, slice by slice as frames are.

From "memory", blocks stream from and into memory; in "cache", one slice is taken again and again,
which shows what the code does where memory does not bound it. Encoded frames stay in the cache, as
on the wire. Rounds of all codecs and of memcpy are interleaved; the best round counts. Rates are in
raw bytes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvasir_kvstore import _native
from kvasir_kvstore.codecs import CodecShape
from kvasir_kvstore.core.codecs import CODECS, FRAME_BYTES

TOTAL_BYTES = 16 << 20
ROUNDS = 7


@dataclass(frozen=True, slots=True)
class CodecRow:
    """One codec on one path of the CPU, or memcpy (as both)."""

    codec: str
    path: str
    place: str
    """memory or cache."""
    encode_gb_per_s: float
    decode_gb_per_s: float
    ratio: float


@dataclass(frozen=True, slots=True)
class Blocks:
    """Slices to encode, and as many to decode into."""

    place: str
    sources: Sequence[np.ndarray]
    targets: Sequence[np.ndarray]

    @property
    def gigabytes(self) -> float:
        """Of all slices."""
        return len(self.sources) * self.sources[0].nbytes / 1e9


def run_bench_codecs(*, num_heads: int = 8, head_dim: int = 64) -> list[CodecRow]:
    """memcpy, then every codec on every path with vectors that runs here (else on the scalar one).

    Times are of this thread's CPU, so that a busy machine does not count.
    """
    shape = CodecShape(num_heads=num_heads, head_dim=head_dim)
    one = _slice(num_heads, head_dim)
    num_slices = TOTAL_BYTES // len(one)
    many = np.tile(one, (num_slices, 1))
    landed = np.empty_like(many)
    places = [
        Blocks("memory", list(many), list(landed)),
        Blocks("cache", [many[0]] * num_slices, [landed[0]] * num_slices),
    ]
    paths = _native.codec_paths()[1:] or _native.codec_paths()
    best: dict[tuple[str, str, str], CodecRow] = {}
    try:
        for _ in range(ROUNDS):
            for blocks in places:
                _keep(best, _copy(blocks))
                for path in paths:
                    _native.use_codec_path(path)
                    for codec in CODECS:
                        _keep(best, _run(codec, path, blocks, shape))
    finally:
        _native.use_codec_path("")
    return list(best.values())


def _slice(num_heads: int, head_dim: int) -> np.ndarray:
    """A frame's layers: bfloat16 of normal values; channels have means and widths of their own."""
    random = np.random.default_rng(0)
    num_layers = max(1, FRAME_BYTES // (4 * num_heads * 32 * head_dim))
    shape = (num_layers, num_heads)
    widths = np.exp(0.7 * random.standard_normal((*shape, head_dim, 1)))
    keys = widths * (2 + random.standard_normal((*shape, head_dim, 32)))
    values = np.swapaxes(widths, 2, 3) * random.standard_normal((*shape, 32, head_dim))
    flat = [part.reshape(num_layers, 1, -1) for part in (keys, values)]
    bits = np.concatenate(flat, axis=1).astype(np.float32).ravel().view(np.uint32) >> 16
    return bits.astype("<u2").view(np.uint8)


def _copy(blocks: Blocks) -> CodecRow:
    def copy() -> None:
        for source, target in zip(blocks.sources, blocks.targets, strict=True):
            np.copyto(target, source)

    rate = blocks.gigabytes / _seconds(copy)
    return CodecRow("memcpy", "", blocks.place, rate, rate, 1.0)


def _run(codec: str, path: str, blocks: Blocks, shape: CodecShape) -> CodecRow:
    slice_bytes = blocks.sources[0].nbytes
    num_layers = slice_bytes // (4 * shape["num_heads"] * 32 * shape["head_dim"])
    encoded = np.empty(_native.codec_bytes_max(codec, **shape, num_layers=num_layers), np.uint8)
    size = 0

    def encode() -> None:
        nonlocal size
        for source in blocks.sources:
            size = _native.codec_encode(codec, source, encoded, **shape)

    def decode() -> None:
        for target in blocks.targets:
            fault = _native.codec_decode(encoded[:size], target, **shape)
            assert not fault, fault

    encode_s = _seconds(encode)
    decode_s = _seconds(decode)
    return CodecRow(
        codec,
        path,
        blocks.place,
        encode_gb_per_s=blocks.gigabytes / encode_s,
        decode_gb_per_s=blocks.gigabytes / decode_s,
        ratio=slice_bytes / size,
    )


def _seconds(work: Callable[[], None]) -> float:
    started_s = time.thread_time()
    work()
    return time.thread_time() - started_s


def _keep(best: dict[tuple[str, str, str], CodecRow], row: CodecRow) -> None:
    """The better rates of both."""
    known = best.setdefault((row.codec, row.path, row.place), row)
    best[row.codec, row.path, row.place] = replace(
        known,
        encode_gb_per_s=max(known.encode_gb_per_s, row.encode_gb_per_s),
        decode_gb_per_s=max(known.decode_gb_per_s, row.decode_gb_per_s),
    )
