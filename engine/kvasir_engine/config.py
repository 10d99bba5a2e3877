"""What a model is, read from a Hugging Face folder's config.json.

Decides which models this engine computes: Llama, Qwen2, Qwen3 and Mixtral type decoders with
standard, linear or llama3 rotary embeddings. Invariant: a ModelConfig that exists is computed
exactly; whatever would need other arithmetic is refused by name. Weights are left to `weights`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from kvasir_kvstore.core.block import KvLayout
from kvasir_proto.errors import KvasirError, Reason

MODEL_TYPES = ("llama", "qwen2", "qwen3", "mixtral")
ROPE_TYPES = ("default", "linear", "llama3")
SIZE_MULTIPLE = 16
SIZE_MAX = (1 << 31) - 1
POSITIONS_DEFAULT = 2048
"""Longest context of a config.json that does not say: what the oldest supported models had."""


def unsupported(text: str) -> KvasirError:
    """The error for a model that is well-formed but beyond this engine."""
    return KvasirError(Reason.UNSUPPORTED, text, param="model")


def malformed(text: str) -> KvasirError:
    """The error for a model folder that is broken."""
    return KvasirError(Reason.INVALID_REQUEST, text, param="model")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: angle of pair i at position p is p * inverse_frequencies[i]."""

    type: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position, float32 [head_dim / 2], rounded as the reference rounds."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        plain = (1.0 / np.power(self.theta, exponents.astype(np.float64))).astype(np.float32)
        if self.type == "linear":
            return plain / np.float32(self.factor)
        return self._llama3(plain) if self.type == "llama3" else plain

    def _llama3(self, plain: np.ndarray) -> np.ndarray:
        """Llama 3.1's scaling: long wavelengths by `factor`, short ones kept, smooth between."""
        wavelengths = 2 * math.pi / plain
        longest = self.original_max_position / self.low_freq_factor
        shortest = self.original_max_position / self.high_freq_factor
        smooth = (self.original_max_position / wavelengths - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        between = (1 - smooth) * plain / self.factor + smooth * plain
        scaled = np.where(wavelengths > longest, plain / self.factor, between)
        return np.where(wavelengths < shortest, plain, scaled).astype(np.float32)

    def canonical(self) -> str:
        """One text per arithmetic: equal texts rotate equally."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps(values, sort_keys=True)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The numbers of a decoder. Sizes in elements, counts in heads, layers or experts."""

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    """Longest context in tokens."""
    rms_norm_eps: float
    rope: Rope
    num_experts: int
    num_experts_per_token: int
    has_tied_embeddings: bool
    has_qkv_bias: bool
    has_output_bias: bool
    has_qk_norm: bool

    def layout(self, kv_dtype: str = "bfloat16") -> KvLayout:
        """How this model's KV lies in a block."""
        return KvLayout(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=kv_dtype,
            rope=self.rope.canonical(),
        )

    def native_shape(self) -> dict[str, Any]:
        """The dictionary that _native.Model takes."""
        shape = {name: getattr(self, name) for name in self.__slots__}
        rope = shape.pop("rope")
        for name in ("model_type", "max_position"):
            shape.pop(name)
        frequencies = [float(x) for x in rope.inverse_frequencies(self.head_dim)]
        return shape | {"inverse_frequencies": frequencies, "rope_scale": 1.0}

    def numerics(self) -> str:
        """Canonical JSON of all that changes results besides weights; part of the fingerprint."""
        return json.dumps(self.native_shape() | {"model_type": self.model_type}, sort_keys=True)


def read_config(model_dir: Path | str) -> ModelConfig:
    """The model in `model_dir`. Raises KvasirError that says what is missing or unsupported."""
    path = Path(model_dir) / "config.json"
    if not Path(model_dir).is_dir():
        raise KvasirError(Reason.UNKNOWN_MODEL, f"no model folder at {model_dir}", param="model")
    if not path.is_file():
        raise malformed(f"{model_dir} is no Hugging Face model folder: it lacks config.json")
    try:
        raw = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise malformed(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise malformed(f"{path} holds no JSON object")
    return parse_config(raw)


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig from config.json's object."""
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise unsupported(
            f"model_type {model_type!r} is not supported; there are: {', '.join(MODEL_TYPES)}"
        )
    _refuse_other_arithmetic(raw)
    num_heads = _integer(raw, "num_attention_heads")
    hidden_size = _integer(raw, "hidden_size")
    has_bias = _boolean(raw, "attention_bias")
    is_mixture = model_type == "mixtral"
    config = ModelConfig(
        model_type=model_type,
        num_layers=_integer(raw, "num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=_integer(raw, "num_key_value_heads", default=num_heads),
        head_dim=_integer(raw, "head_dim", default=hidden_size // num_heads),
        intermediate_size=_integer(raw, "intermediate_size"),
        vocab_size=_integer(raw, "vocab_size"),
        max_position=_integer(raw, "max_position_embeddings", default=POSITIONS_DEFAULT),
        rms_norm_eps=_number(raw, "rms_norm_eps", default=1e-6),
        rope=_parse_rope(raw),
        num_experts=_integer(raw, "num_local_experts") if is_mixture else 0,
        num_experts_per_token=_integer(raw, "num_experts_per_tok") if is_mixture else 0,
        has_tied_embeddings=_boolean(raw, "tie_word_embeddings"),
        has_qkv_bias=model_type == "qwen2" or has_bias,
        has_output_bias=model_type in ("llama", "qwen3") and has_bias,
        has_qk_norm=model_type == "qwen3",
    )
    _check_sizes(config)
    return config


def _refuse_other_arithmetic(raw: Mapping[str, Any]) -> None:
    """Raise for fields whose values ask for arithmetic that this engine does not have."""
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise unsupported(f"hidden_act {activation!r} is not supported, only silu")
    for name in ("mlp_bias", "use_sliding_window"):
        if _boolean(raw, name):
            raise unsupported(f"{name} is not supported")
    if raw.get("quantization_config"):
        raise unsupported("quantization_config is not supported: weights must be bf16, f16 or f32")
    if raw["model_type"] == "mixtral" and raw.get("sliding_window") is not None:
        longest = _integer(raw, "max_position_embeddings", default=POSITIONS_DEFAULT)
        if _integer(raw, "sliding_window") < longest:
            raise unsupported("sliding_window is not supported")
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise unsupported(f"layer_types {kinds!r} is not supported, only full_attention")
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise unsupported("partial_rotary_factor is not supported")
    if raw["model_type"] == "mixtral" and raw.get("attention_bias"):
        raise unsupported("attention_bias of a mixtral model is not supported")


def _parse_rope(raw: Mapping[str, Any]) -> Rope:
    """The rotary embedding, from `rope_parameters` or the older rope_theta and rope_scaling."""
    values = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(values, Mapping):
        raise malformed("rope_parameters is no object in config.json")
    if any(isinstance(value, Mapping) for value in values.values()):
        raise unsupported("rope_parameters that differ between layers are not supported")
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise unsupported(
            f"rope_type {kind!r} is not supported; there are: {', '.join(ROPE_TYPES)}"
        )
    theta = _number(values, "rope_theta", default=_number(raw, "rope_theta", default=10000.0))
    if kind == "default":
        return Rope(type=kind, theta=theta)
    factor = _number(values, "factor")
    if kind == "linear":
        return Rope(type=kind, theta=theta, factor=factor)
    low, high = _number(values, "low_freq_factor"), _number(values, "high_freq_factor")
    if low >= high:
        raise malformed("config.json: low_freq_factor must be below high_freq_factor")
    return Rope(
        type=kind,
        theta=theta,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=_integer(values, "original_max_position_embeddings"),
    )


def _check_sizes(config: ModelConfig) -> None:
    """Raise for sizes that contradict one another or that no kernel handles."""
    for name in ("hidden_size", "head_dim", "intermediate_size"):
        if getattr(config, name) % SIZE_MULTIPLE:
            raise unsupported(
                f"{name} {getattr(config, name)} is not supported: no multiple of {SIZE_MULTIPLE}"
            )
    if config.num_heads % config.num_kv_heads:
        raise malformed("num_attention_heads is no multiple of num_key_value_heads")
    if config.num_experts_per_token > config.num_experts:
        raise malformed("num_experts_per_tok exceeds num_local_experts")


def _integer(raw: Mapping[str, Any], name: str, *, default: int | None = None) -> int:
    """A positive integer field; an absent or null one takes the default."""
    value = raw.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise malformed(f"config.json: {name} must be a positive integer, not {value!r}")
    if value > SIZE_MAX:
        raise malformed(f"config.json: {name} must be at most {SIZE_MAX}, not {value}")
    return value


def _boolean(raw: Mapping[str, Any], name: str) -> bool:
    """A true or false field; an absent or null one is false."""
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise malformed(f"config.json: {name} must be true or false, not {value!r}")
    return bool(value)


def _number(raw: Mapping[str, Any], name: str, *, default: float | None = None) -> float:
    """A positive finite number field; an absent or null one takes the default."""
    value = raw.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise malformed(f"config.json: {name} must be a positive number, not {value!r}")
    return float(value)
