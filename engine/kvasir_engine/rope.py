"""Rotary embeddings: from config.json's parameters to the angle of each pair per position.

Decides the frequencies and the scale of cosines for every published kind of scaling. Invariant:
both are the same at every position of every request, because KV blocks are shared between
requests. Kinds whose definition depends on the length of the sequence (dynamic, longrope) are
therefore taken at the model's longest context.

Sources: RoFormer (arXiv 2104.09864); YaRN (2309.00071), sections 3.2 to 3.4; LongRoPE
(2402.13753); Llama 3.1's scaling, and defaults where papers leave them open, as in Hugging Face's
`modeling_rope_utils`.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvasir_engine.fields import integer, malformed, number, unsupported

POSITIONS_DEFAULT = 2048
"""Longest context of a config.json that does not say: what the oldest supported models had."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Pair i at position p turns by p * inverse_frequencies[i]; cos and sin are times `scale`."""

    inverse_frequencies: tuple[float, ...]
    """Radians per position, float32 values; a head's further pairs are not rotated."""
    scale: float = 1.0

    def canonical(self) -> str:
        """One short text per arithmetic: equal texts rotate equally."""
        values = np.array(self.inverse_frequencies, np.float32).tobytes()
        digest = hashlib.blake2b(values, digest_size=16).hexdigest()
        return json.dumps({"frequencies": digest, "scale": self.scale}, sort_keys=True)


@dataclass(frozen=True, slots=True)
class RopeContext:
    """What a rotary embedding's definition refers to outside its own parameters."""

    theta: float
    """The base, where the parameters hold none."""
    rotary_dim: int
    """Elements of a head that rotate, an even number."""
    positions_max: int
    original_positions: int | None = None
    """Length of the pretraining, where config.json says it beside the parameters."""


def longest_context(raw: Mapping[str, Any]) -> int:
    """The longest context in tokens that config.json promises.

    It is max_position_embeddings, but YaRN is by custom switched on by its parameters alone, and
    then multiplies the length of the pretraining.
    """
    longest = integer(raw, "max_position_embeddings", default=POSITIONS_DEFAULT)
    values = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(values, Mapping) or rope_type(values) != "yarn":
        return longest
    original = values.get("original_max_position_embeddings")
    if original is None or values.get("factor") is None:
        return longest
    scaled = integer(values, "original_max_position_embeddings") * number(values, "factor")
    return max(longest, int(scaled))


def rope_type(values: Mapping[str, Any]) -> Any:
    """The kind that rope parameters name, in the newer or the older field."""
    return values.get("rope_type") or values.get("type") or "default"


def make_rope(values: Mapping[str, Any], context: RopeContext) -> Rope:
    """The rotary embedding of these parameters. Raises KvasirError that names a bad one."""
    kind = rope_type(values)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise unsupported(f"rope_type {kind!r} is not supported; there are: {', '.join(_KINDS)}")
    frequencies, scale = _KINDS[kind](values, context)
    return Rope(tuple(float(x) for x in frequencies.astype(np.float32)), scale)


Frequencies = tuple[np.ndarray, float]
"""Inverse frequencies [rotary_dim / 2] and the scale of cosines and sines."""


def _plain(values: Mapping[str, Any], context: RopeContext) -> np.ndarray:
    """theta^(-2i / d), float32, rounded as the reference rounds."""
    theta = _theta(values, context)
    return _powers(theta, context.rotary_dim)


def _theta(values: Mapping[str, Any], context: RopeContext) -> float:
    """The base; at 1 or below it pairs would not differ."""
    theta = number(values, "rope_theta", default=context.theta)
    if theta <= 1:
        raise malformed(f"config.json: rope_theta must be above 1, not {theta}")
    return theta


def _powers(theta: float, dim: int) -> np.ndarray:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return (1.0 / np.power(theta, exponents.astype(np.float64))).astype(np.float32)


def _default(values: Mapping[str, Any], context: RopeContext) -> Frequencies:
    return _plain(values, context), 1.0


def _linear(values: Mapping[str, Any], context: RopeContext) -> Frequencies:
    """Positions divided by `factor`."""
    return _plain(values, context) / np.float32(number(values, "factor")), 1.0


def _dynamic(values: Mapping[str, Any], context: RopeContext) -> Frequencies:
    """NTK-aware: the base grows with the length beyond that of the pretraining."""
    factor, dim = number(values, "factor"), context.rotary_dim
    original = _original(values, context)
    length = max(context.positions_max, original)
    growth = factor * length / original - (factor - 1)
    theta = _theta(values, context)
    if dim < 4:
        raise unsupported(f"rope_type 'dynamic' needs heads of more than {dim} rotated elements")
    return _powers(theta * growth ** (dim / (dim - 2)), dim), 1.0


def _llama3(values: Mapping[str, Any], context: RopeContext) -> Frequencies:
    """Llama 3.1's scaling: long wavelengths by `factor`, short ones kept, smooth between."""
    plain, factor = _plain(values, context), number(values, "factor")
    low, high = number(values, "low_freq_factor"), number(values, "high_freq_factor")
    if low >= high:
        raise malformed("config.json: low_freq_factor must be below high_freq_factor")
    original = integer(values, "original_max_position_embeddings")
    wavelengths = 2 * math.pi / plain
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    scaled = np.where(wavelengths > original / low, plain / factor, between)
    return np.where(wavelengths < original / high, plain, scaled), 1.0


def _yarn(values: Mapping[str, Any], context: RopeContext) -> Frequencies:
    """Pairs that turn often are kept, those that turn rarely interpolated, a ramp between."""
    original = _original(values, context)
    factor = number(values, "factor", default=context.positions_max / original)
    fast = number(values, "beta_fast", default=32.0)
    slow = number(values, "beta_slow", default=1.0)
    theta, dim = _theta(values, context), context.rotary_dim

    def pair_that_turns(times: float) -> float:
        """The pair, a fraction, that turns so often within the pretraining's length."""
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(fast), pair_that_turns(slow)
    if values.get("truncate") is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    last += 0.001 if first == last else 0
    ramp = np.clip((np.arange(dim // 2) - first) / (last - first), 0, 1)
    plain = _powers(theta, dim).astype(np.float64)
    return plain / factor * ramp + plain * (1 - ramp), _yarn_scale(values, factor)


def _yarn_scale(values: Mapping[str, Any], factor: float) -> float:
    """Attention grows with the logarithm of the factor (YaRN, equation 22)."""
    given = values.get("attention_factor")
    if given is not None:
        return number(values, "attention_factor")

    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    if values.get("mscale") and values.get("mscale_all_dim"):
        return grown(number(values, "mscale")) / grown(number(values, "mscale_all_dim"))
    return grown(1.0)


def _longrope(values: Mapping[str, Any], context: RopeContext) -> Frequencies:
    """Searched divisors per pair: short ones up to the pretraining's length, long ones beyond."""
    original = _original(values, context)
    is_long = context.positions_max > original
    name = "long_factor" if is_long else "short_factor"
    divisors = values.get(name)
    num_pairs = context.rotary_dim // 2
    if not isinstance(divisors, list) or len(divisors) != num_pairs:
        raise malformed(f"config.json: {name} must be a list of {num_pairs} numbers")
    checked = [number({name: divisor}, name) for divisor in divisors]
    plain = _plain(values, context)
    ratio = number(values, "factor", default=context.positions_max / original)
    scale = 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original))
    if values.get("attention_factor") is not None:
        scale = number(values, "attention_factor")
    return plain / np.array(checked, np.float32), scale


def _original(values: Mapping[str, Any], context: RopeContext) -> int:
    """Tokens of the pretraining's context."""
    default = context.original_positions or context.positions_max
    original = integer(values, "original_max_position_embeddings", default=default)
    if original == 1:
        raise malformed("config.json: original_max_position_embeddings must be above 1")
    return original


_KINDS: dict[str, Callable[[Mapping[str, Any], RopeContext], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
