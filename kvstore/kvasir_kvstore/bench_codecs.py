"""How fast the codecs are on one core, beside memcpy: 16 MiB of KV, slice by slice as frames are.

Blocks stream from memory and encoded frames stay in the cache, as on the wire. Rounds of all codecs
and of memcpy are interleaved; the best round counts. Rates are in raw bytes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

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
    encode_gb_per_s: float
    decode_gb_per_s: float
    ratio: float


def run_bench_codecs(*, num_heads: int = 8, head_dim: int = 64) -> list[CodecRow]:
    """memcpy, then every codec on every path with vectors that runs here (else on the scalar one).

    Times are of this thread's CPU, so that a busy machine does not count.
    """
    shape = CodecShape(num_heads=num_heads, head_dim=head_dim)
    blocks = _blocks(num_heads, head_dim)
    landed = np.empty_like(blocks)
    best: dict[tuple[str, str, str], float] = {}
    sizes: dict[str, int] = {}
    paths = _native.codec_paths()[1:] or _native.codec_paths()
    try:
        for _ in range(ROUNDS):
            _keep(best, ("memcpy", "", "encode"), lambda: np.copyto(landed, blocks))
            for path in paths:
                _native.use_codec_path(path)
                for codec in CODECS:
                    sizes[codec] = _run(codec, path, blocks, landed, shape, best)
    finally:
        _native.use_codec_path("")
    gigabytes = blocks.nbytes / 1e9
    copied = gigabytes / best["memcpy", "", "encode"]
    return [CodecRow("memcpy", "", copied, copied, 1.0)] + [
        CodecRow(
            codec,
            path,
            gigabytes / best[codec, path, "encode"],
            gigabytes / best[codec, path, "decode"],
            blocks.shape[1] / sizes[codec],
        )
        for path in paths
        for codec in CODECS
    ]


def _blocks(num_heads: int, head_dim: int) -> np.ndarray:
    """[slice][bytes]: bfloat16 of normal values, whose channels have means and widths of their own.

    A slice is a frame's layers.
    """
    random = np.random.default_rng(0)
    num_layers = max(1, FRAME_BYTES // (4 * num_heads * 32 * head_dim))
    shape = (num_layers, num_heads)
    widths = np.exp(0.7 * random.standard_normal((*shape, head_dim, 1)))
    keys = widths * (2 + random.standard_normal((*shape, head_dim, 32)))
    values = np.swapaxes(widths, 2, 3) * random.standard_normal((*shape, 32, head_dim))
    flat = [part.reshape(num_layers, 1, -1) for part in (keys, values)]
    bits = np.concatenate(flat, axis=1).astype(np.float32).ravel().view(np.uint32) >> 16
    one = bits.astype("<u2").view(np.uint8)
    return np.tile(one, (TOTAL_BYTES // len(one), 1))


def _run(
    codec: str,
    path: str,
    blocks: np.ndarray,
    landed: np.ndarray,
    shape: CodecShape,
    best: dict[tuple[str, str, str], float],
) -> int:
    """One round; the bytes of a slice encoded."""
    num_layers = blocks.shape[1] // (4 * shape["num_heads"] * 32 * shape["head_dim"])
    encoded = np.empty(_native.codec_bytes_max(codec, **shape, num_layers=num_layers), np.uint8)
    size = 0

    def encode() -> None:
        nonlocal size
        for block in blocks:
            size = _native.codec_encode(codec, block, encoded, **shape)

    def decode() -> None:
        for block in landed:
            fault = _native.codec_decode(encoded[:size], block, **shape)
            assert not fault, fault

    _keep(best, (codec, path, "encode"), encode)
    _keep(best, (codec, path, "decode"), decode)
    return size


def _keep(
    best: dict[tuple[str, str, str], float], key: tuple[str, str, str], work: Callable[[], None]
) -> None:
    started_s = time.thread_time()
    work()
    best[key] = min(best.get(key, float("inf")), time.thread_time() - started_s)
