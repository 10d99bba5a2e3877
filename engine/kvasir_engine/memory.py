"""How many bytes a worker needs for a model, before it loads one.

Decides nothing about allocation; the numbers follow the native part's layout: packed weights,
activations of one step, scratch per thread, and the KV pool.
"""

from dataclasses import dataclass
from pathlib import Path

from kvasir_engine import _native
from kvasir_engine.decoder import ModelConfig
from kvasir_engine.formats import WeightFormat

FLOAT_BYTES = 4
STRIDE_PAD = 16
THREAD_SCRATCH_BYTES = 1 << 20
PROCESS_BYTES = 300 << 20
"""Interpreter, libraries, tokenizer and buffers of a worker, measured with room."""

CGROUP_LIMIT_PATHS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes by purpose. Mapped weight files are not in it: the kernel drops those pages at will."""

    weights_bytes: int
    step_bytes: int
    """Activations, logits and scratch of the largest step."""
    kv_bytes: int
    process_bytes: int = PROCESS_BYTES

    @property
    def total_bytes(self) -> int:
        """All purposes together."""
        return self.weights_bytes + self.step_bytes + self.kv_bytes + self.process_bytes

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{_mib(self.total_bytes)} (weights {_mib(self.weights_bytes)}, "
            f"KV cache {_mib(self.kv_bytes)}, one step {_mib(self.step_bytes)}, "
            f"process {_mib(self.process_bytes)})"
        )


def memory_need(
    config: ModelConfig,
    *,
    kv_cache_bytes: int,
    max_batch_tokens: int,
    max_running: int,
    num_threads: int,
    weights: WeightFormat = "bf16",
) -> MemoryNeed:
    """What one worker needs; an estimate from above."""
    logits = max_running * config.vocab_size * FLOAT_BYTES
    step = logits + max_batch_tokens * _token_bytes(config) + num_threads * THREAD_SCRATCH_BYTES
    return MemoryNeed(weights_bytes(config, weights), step, kv_cache_bytes)


def weights_bytes(config: ModelConfig, weights: WeightFormat = "bf16") -> int:
    """Bytes of packed weights; untied embeddings stay in their mapped file."""
    return _native.packed_bytes(config.native_shape(), weights=weights)


def available_bytes() -> int:
    """Bytes that a new process may take: the machine's, or the container's if that is less."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for limit_path, usage_path in CGROUP_LIMIT_PATHS:
        if limit_path.is_file() and usage_path.is_file():
            limit = limit_path.read_text().strip()
            if limit != "max":
                available = min(available, max(0, int(limit) - int(usage_path.read_text())))
    return available


def _attention_widths(config: ModelConfig) -> tuple[int, int]:
    """Elements of all query heads, and of all heads."""
    q_size = config.num_heads * config.head_width
    return q_size, q_size + 2 * config.num_kv_heads * config.head_width


def _token_bytes(config: ModelConfig) -> int:
    """Bytes of activations per token of a step."""
    choices = config.num_experts_per_token
    inner = max(config.intermediate_size, config.expert_size)
    q_size, all_size = _attention_widths(config)
    widths = [config.hidden_size] * (2 + 2 * choices) + [q_size, all_size]
    widths += [len(config.ropes) * config.head_dim, config.num_experts]
    widths += [inner] * max(1, choices)
    widths += [max(config.hidden_size, q_size, inner)] * max(1, choices)  # as products take them
    return FLOAT_BYTES * sum(width + 2 * STRIDE_PAD for width in widths)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.0f} MiB"
