"""The engine's native part (engine/native): forward pass, sampler, memory probe."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

def cpu_paths() -> list[str]: ...
def model_paths() -> list[str]: ...
def kv_element_bytes(isa: str, kv: str = "bf16") -> int: ...
def packed_bytes(config: dict[str, Any], *, weights: str) -> int: ...
def sample(
    *,
    logits: NDArray[np.float32],
    temperature: NDArray[np.float32],
    top_k: NDArray[np.int32],
    top_p: NDArray[np.float32],
    seed: NDArray[np.uint64],
    position: NDArray[np.int64],
) -> NDArray[np.int32]: ...
def philox_uniform(seed: int, position: int) -> float: ...

class Model:
    def __init__(
        self,
        config: dict[str, Any],
        tensors: dict[str, NDArray[np.uint16]],
        *,
        isa: str,
        kv: str = "bf16",
        num_threads: int,
        weights: str = "bf16",
        progress: Callable[[int, int], None] | None = None,
        kept: NDArray[np.uint8] | None = None,
        is_balanced: bool = False,
    ) -> None:
        """`kept`: what `packed` was when these weights were packed before. `is_balanced`: columns
        of weights are scaled to fit their inputs, as int8 needs; not for int4."""
    isa: str
    num_threads: int
    weight_bytes: int
    layer_bytes: int
    packed: NDArray[np.uint8]
    """Read-only."""
    def attach_pool(
        self, data: NDArray[np.uint8], ready: NDArray[np.uint32], progress: NDArray[np.uint32]
    ) -> None: ...
    def forward(
        self,
        *,
        token_ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        seq_token_counts: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        output_rows: NDArray[np.int32],
        logits: NDArray[np.float32],
        completes: NDArray[np.int32],
        arrived: NDArray[np.int32],
        num_layers: int | None = None,
    ) -> None:
        """`num_layers`: only the first ones, and of the next one K and V; then without logits."""
    def sample(
        self,
        *,
        logits: NDArray[np.float32],
        temperature: NDArray[np.float32],
        top_k: NDArray[np.int32],
        top_p: NDArray[np.float32],
        seed: NDArray[np.uint64],
        position: NDArray[np.int64],
    ) -> NDArray[np.int32]:
        """The same as the function `sample`, by the threads that steps are computed with."""
    def move_kv(
        self,
        *,
        source_blocks: NDArray[np.int32],
        source_first: int,
        target_blocks: NDArray[np.int32],
        target_first: int,
        count: int,
    ) -> None:
        """KV of `count` tokens to other positions in other blocks."""
    def read_kv(
        self, *, layer: int, blocks: NDArray[np.int32], first: int, out: NDArray[np.float32]
    ) -> None:
        """K, then V, of consecutive tokens: `out` is [tokens, 2 * kv_heads * head_width]."""

class MemoryProbe:
    def __init__(self, *, num_bytes: int, num_threads: int) -> None: ...
    def read(self) -> float: ...

class PeakProbe:
    def __init__(self, *, isa: str, weights: str, num_threads: int) -> None: ...
    def run(self) -> float: ...

def multiply(
    *,
    tensor: NDArray[np.uint16],
    a: NDArray[np.float32],
    c: NDArray[np.float32],
    isa: str,
    weights: str,
    num_threads: int,
) -> None: ...
def spread_threads(*, folder: str, allowed: list[int], num_threads: int) -> list[list[int]]: ...
