"""Logits of a token sequence, for comparing this engine with another from outside."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from kvasir_kvstore.core.block import BLOCK_TOKENS
from kvasir_proto.errors import KvasirError, Reason

from kvasir_engine.formats import KvFormat, WeightFormat
from kvasir_engine.model import KvArrays, LoadedModel, load_model, new_kv_arrays


def sequence_logits(
    model: LoadedModel,
    ids: np.ndarray,
    *,
    chunk: int,
    after_chunk: Callable[[KvArrays, int], None] = lambda *_: None,
) -> np.ndarray:
    """float32 [length, vocab]: logits after each token, computed `chunk` tokens per step.

    `after_chunk` is given the KV and the number of tokens that are in it.
    """
    length = len(ids)
    num_blocks = -(-length // BLOCK_TOKENS)
    arrays = new_kv_arrays(model, num_blocks)
    table = np.arange(num_blocks, dtype=np.int32)[None]
    logits = np.empty((length, model.config.vocab_size), np.float32)
    for start in range(0, length, chunk):
        end = min(length, start + chunk)
        model.native.forward(
            token_ids=np.ascontiguousarray(ids[start:end], np.int32),
            positions=np.arange(start, end, dtype=np.int32),
            seq_token_counts=np.array([end - start], np.int32),
            block_tables=table,
            output_rows=np.arange(end - start, dtype=np.int32),
            logits=logits[start:end],
            completes=np.empty(0, np.int32),
            arrived=np.empty(0, np.int32),
        )
        after_chunk(arrays, end)
    assert arrays.ready.any() == 0, "no block was declared complete"
    return logits


def run_logits(
    model_dir: Path | str,
    ids_path: Path | str,
    out_path: Path | str,
    chunk: int | None = None,
    *,
    num_threads: int = 2,
    weights: WeightFormat = "bf16",
    kv: KvFormat = "bf16",
) -> None:
    """Read int64 [length] ids, write float32 [length, vocab] logits, both .npy.

    `chunk` is the number of tokens per step; None computes the whole sequence in one.
    """
    model = load_model(model_dir, num_threads=num_threads, weights=weights, kv=kv)
    ids = _read_ids(Path(ids_path), model.config.vocab_size)
    if chunk is not None and chunk < 1:
        raise KvasirError(Reason.INVALID_REQUEST, "chunk must be at least 1", param="chunk")
    logits = sequence_logits(model, ids, chunk=chunk or len(ids))
    with Path(out_path).open("wb") as file:
        np.save(file, logits)


def _read_ids(path: Path, vocab_size: int) -> np.ndarray:
    """Checked token ids of a .npy file."""

    def refuse(text: str) -> KvasirError:
        return KvasirError(Reason.INVALID_REQUEST, f"{path}: {text}", param="ids")

    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise refuse(f"not a readable .npy file: {error}") from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise refuse("token ids must be one row of integers")
    if len(ids) == 0:
        raise refuse("it holds no token ids")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise refuse(f"token ids must lie in 0..{vocab_size - 1}")
    return ids
