"""The numbers of a decoder, and how the native part takes them.

Where they come from is left to `config`, weights to `weights`.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from kvasir_kvstore.core.block import KvLayout

from kvasir_engine.rope import Rope

HEAD_MULTIPLE = 16
"""A head is stored in whole vectors of this many elements; the rest is zero."""


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ from layer to layer."""

    window: int = 0
    """Tokens that a token sees, itself included; 0: all before it."""
    rope: int = 0
    """Index of its rotary embedding."""
    is_sparse: bool = False
    """Whether its feed-forward part is a mixture of experts."""


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
    ropes: tuple[Rope, ...]
    layers: tuple[LayerConfig, ...]
    query_scale: float
    """Multiplies scores."""
    num_experts: int = 0
    num_experts_per_token: int = 0
    expert_size: int = 0
    """Feed-forward size of one expert."""
    activation: str = "silu"
    norm_offset: float = 0.0
    """Added to the weights of every norm."""
    embedding_scale: float = 1.0
    score_cap: float = 0.0
    """Scores become cap * tanh(score / cap); 0: they stay."""
    logit_cap: float = 0.0
    has_tied_embeddings: bool = False
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_qk_norm: bool = False
    has_post_norms: bool = False
    """Whether what attention and feed-forward add to the stream is normalised first."""
    has_scaled_experts: bool = True
    """Whether the weights of the chosen experts are scaled to sum to 1."""

    def layout(self, kv_dtype: str = "bfloat16") -> KvLayout:
        """How this model's KV lies in a block."""
        return KvLayout(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_width,
            dtype=kv_dtype,
            rope=json.dumps([rope.canonical() for rope in self.ropes]),
        )

    @property
    def head_width(self) -> int:
        """Elements that a head takes in memory."""
        return -(-self.head_dim // HEAD_MULTIPLE) * HEAD_MULTIPLE

    @property
    def num_sparse_layers(self) -> int:
        """Layers with a mixture of experts."""
        return sum(layer.is_sparse for layer in self.layers)

    def native_shape(self) -> dict[str, Any]:
        """The dictionary that _native.Model takes."""
        shape = asdict(self)
        for name in ("model_type", "max_position"):
            shape.pop(name)
        return shape | {name: list(shape[name]) for name in ("ropes", "layers")}

    def numerics(self) -> str:
        """Canonical JSON of all that changes results besides weights; part of the fingerprint."""
        return json.dumps(self.native_shape() | {"model_type": self.model_type}, sort_keys=True)
