"""Logits of every position of a token sequence, computed by the engine's forward pass alone."""

from pathlib import Path

import numpy as np

from kvasir_cli.errors import RefusedError


def check_ids(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """The ids as int32.

    Raises:
        RefusedError: not a sequence of token ids of this vocabulary.
    """
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or not len(ids):
        raise RefusedError(f"--ids: expected integers [length], got {ids.dtype} {list(ids.shape)}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise RefusedError(f"--ids: token ids must be in 0..{vocab_size - 1}")
    return ids.astype(np.int32)


def all_logits(
    model: Path, ids: np.ndarray, *, chunk_tokens: int | None, num_threads: int
) -> np.ndarray:
    """float32 [length, vocab]."""
    raise RefusedError(f"{model}: this build has no engine")
