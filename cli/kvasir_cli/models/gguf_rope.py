"""Rotary embeddings in a GGUF file, in the words of config.json.

Llama 3 scaling is kept as a tensor of divisors alone, LongRoPE as two; the other kinds are
metadata. A scaling that would be computed otherwise than llama.cpp computes it is refused.
"""

from typing import Any

import numpy as np

from kvasir_cli.errors import RefusedError
from kvasir_cli.models.gguf_file import GgufFile, float32_text

LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0
"""low_freq_factor and high_freq_factor of every released Llama 3.1 and later model."""
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = {"rope_freqs.weight", LONG, SHORT}
"""Tensors whose values become fields of config.json."""


def rope_scaling(file: GgufFile, *, theta: float, head_dim: int) -> dict[str, Any] | None:
    """The object rope_scaling, or None for plain rotation.

    Raises:
        RefusedError: a scaling that is not supported; it says which.
    """
    prefix = f"{file.architecture}.rope.scaling."
    factors = file.tensors.get("rope_freqs.weight")
    if factors is not None:
        scaling = _llama3_scaling(np.asarray(factors.data, dtype=np.float64), theta, head_dim)
        if scaling is None:
            raise RefusedError(f"{file.path}: its rope_freqs are not those of Llama 3 scaling")
        return scaling
    if LONG in file.tensors and SHORT in file.tensors:
        return {
            "rope_type": "longrope",
            "long_factor": _numbers(file, LONG),
            "short_factor": _numbers(file, SHORT),
        }
    kind = file.get(f"{prefix}type", str, "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": float32_text(file.need(f"{prefix}factor", float))}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = file.need(
            f"{prefix}original_context_length", int
        )
        for name in ("beta_fast", "beta_slow"):
            if f"{prefix}yarn_{name}" in file.fields:
                scaling[name] = float32_text(file.need(f"{prefix}yarn_{name}", float))
    elif kind != "linear":
        raise RefusedError(f"{file.path}: rotary scaling of type {kind!r} is not supported")
    if (grown := file.get(f"{prefix}attn_factor", float, 1.0)) != 1.0:
        raise RefusedError(f"{file.path}: {prefix}attn_factor {grown} is not supported")
    return scaling


def _numbers(file: GgufFile, name: str) -> list[float]:
    return [float32_text(value) for value in np.asarray(file.tensors[name].data).ravel()]


def _llama3_scaling(factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any] | None:
    """The Llama 3 parameters that give these divisors of frequencies, or None.

    GGUF keeps only the divisors; the training length is found by trying powers of two, the rest
    is the same in every released model.
    """
    inverse = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths = 2 * np.pi / inverse
    scale = float(np.round(factors.max(), 4))
    for length in (2**power for power in range(6, 21)):
        smooth = (length / wavelengths - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)
        expected = 1 / ((1 - smooth) / scale + smooth)
        expected = np.where(wavelengths < length / LLAMA3_HIGH, 1.0, expected)
        expected = np.where(wavelengths > length / LLAMA3_LOW, scale, expected)
        if np.allclose(expected, factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": scale,
                "low_freq_factor": LLAMA3_LOW,
                "high_freq_factor": LLAMA3_HIGH,
                "original_max_position_embeddings": length,
            }
    return None
