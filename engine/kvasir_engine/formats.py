"""How weights and KV are kept in memory: the names of the formats."""

from typing import Literal

WeightFormat = Literal["bf16", "int8", "int4"]
"""bf16; int8 with a scale per output channel; or int4 in groups with scale and offset."""
KvFormat = Literal["bf16", "int8"]
"""bf16 (float32 on the scalar path), or int8 with a scale per token and head."""
