"""Whether a worker fits into its memory limit: model, KV blocks and the process itself.

Checked before any pod is made: a worker that cannot fit would be killed again and again.
"""

from dataclasses import dataclass

MIB = 1 << 20
PROCESS_MB = 300  # interpreter, libraries, tokenizer, buffers; as the engine counts them


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """Memory by purpose, in MiB, against the limit."""

    model_mb: int  # weights as they are computed with, and one step
    kv_cache_mb: int
    limit_bytes: int

    @property
    def needed_mb(self) -> int:
        """All purposes together."""
        return self.model_mb + self.kv_cache_mb + PROCESS_MB

    @property
    def fits(self) -> bool:
        """Whether the limit covers what is needed."""
        return self.needed_mb * MIB <= self.limit_bytes

    def describe(self) -> str:
        """One line for people."""
        return (
            f"a worker needs {self.needed_mb} MiB (model {self.model_mb}, KV cache "
            f"{self.kv_cache_mb}, process {PROCESS_MB}); its limit is "
            f"{self.limit_bytes // MIB} MiB"
        )
