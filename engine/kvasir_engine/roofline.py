"""The least time that a machine's limits leave to a step: what it must read, what it must compute.

A step is cut into parts; each takes at least max(bytes / memory read, operations / peak), and they
follow one another. Pure arithmetic on a model's shape: sizes are nominal, without padding.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from kvasir_engine.decoder import LayerConfig, ModelConfig
from kvasir_engine.formats import KvFormat, WeightFormat

WEIGHT_BYTES: dict[WeightFormat, float] = {"bf16": 2.0, "int8": 1.0, "int4": 0.5 + 4 / 32}
"""Per weight. int4: with the scale and offset of its group of 32."""
HEAD_BYTES: dict[WeightFormat, float] = {"bf16": 2.0, "int8": 1.0, "int4": 1.0}
"""Per weight of the output head, which int4 keeps as int8."""
KV_BYTES: dict[KvFormat, float] = {"bf16": 2.0, "int8": 1.0}
SCALE_BYTES: dict[KvFormat, float] = {"bf16": 0.0, "int8": 4.0}
"""Of one token and head."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine reaches at best, at one moment. Operations: two per multiply-add."""

    read_bytes_per_s: float
    float_operations_per_s: float
    integer_operations_per_s: float


@dataclass(frozen=True, slots=True)
class Work:
    """One part of a step."""

    num_bytes: float
    operations: float
    is_integer: bool = False

    def seconds(self, limits: Limits) -> float:
        """At least so long."""
        peak = limits.integer_operations_per_s if self.is_integer else limits.float_operations_per_s
        return max(self.num_bytes / limits.read_bytes_per_s, self.operations / peak)


@dataclass(frozen=True, slots=True)
class StepShape:
    """`num_sequences` sequences that each compute the positions [start, end), one output each."""

    num_sequences: int
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        """Tokens computed."""
        return self.num_sequences * (self.end - self.start)


def step_work(
    config: ModelConfig, step: StepShape, *, weights: WeightFormat, kv: KvFormat
) -> list[Work]:
    """The parts of a step: of each layer its matrices and its attention, then the output head."""
    is_integer = weights != "bf16"
    parts = []
    for layer in config.layers:
        read, used = _layer_weights(config, layer, step.num_tokens)
        operations = 2.0 * used * step.num_tokens
        parts.append(Work(read * WEIGHT_BYTES[weights], operations, is_integer))
        parts.append(_attention(config, layer, step, kv))
    head = float(config.hidden_size * config.vocab_size)
    parts.append(Work(head * HEAD_BYTES[weights], 2 * head * step.num_sequences, is_integer))
    return parts


def least_seconds(parts: Iterable[Work], limits: Limits) -> float:
    """Of a step made of these parts."""
    return sum(part.seconds(limits) for part in parts)


def _layer_weights(config: ModelConfig, layer: LayerConfig, num_tokens: int) -> tuple[float, float]:
    """(weights read once in a step, weights that one token is multiplied with) of a layer."""
    hidden, width = config.hidden_size, config.head_dim
    attention = hidden * width * (2 * config.num_heads + 2 * config.num_kv_heads)
    if not layer.is_sparse:
        total = attention + 3 * hidden * config.intermediate_size
        return total, total
    expert, chosen = 3 * hidden * config.expert_size, config.num_experts_per_token
    common = attention + hidden * config.num_experts
    touched = min(config.num_experts, num_tokens * chosen)
    return common + touched * expert, common + chosen * expert


def _attention(config: ModelConfig, layer: LayerConfig, step: StepShape, kv: KvFormat) -> Work:
    window = layer.window or step.end
    seen = sum(min(position + 1, window) for position in range(step.start, step.end))
    read = min(step.end, step.end - step.start + window - 1)
    token_bytes = 2 * config.num_kv_heads * (config.head_dim * KV_BYTES[kv] + SCALE_BYTES[kv])
    operations = 4.0 * config.num_heads * config.head_dim * seen
    return Work(step.num_sequences * read * token_bytes, step.num_sequences * operations)
