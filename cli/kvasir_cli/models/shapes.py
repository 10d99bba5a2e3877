"""Named shapes of models that `kvasir model make` fills with random weights.

Decides the config.json of each shape; its tensors are those that the engine asks for, their values
are left to making.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvasir_engine.config import FAMILIES, parse_config
from kvasir_engine.tensors import tensor_shapes

from kvasir_cli.models.safetensors import TensorSpec


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one model."""

    model_type: str
    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    context: int
    theta: float = 10000.0
    eps: float = 1e-6
    tied: bool = True
    num_experts: int = 0
    num_experts_used: int = 2
    more: Mapping[str, Any] = field(default_factory=dict)
    """Fields that this kind of model has beside the usual ones."""

    def config(self) -> dict[str, Any]:
        """The contents of config.json, without the ids of special tokens."""
        config: dict[str, Any] = {
            "architectures": [FAMILIES[self.model_type].architecture],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.eps,
            "rope_theta": self.theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.theta},
            "tie_word_embeddings": self.tied,
            "vocab_size": self.vocab,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
        }
        if self.num_experts:
            config["num_local_experts"] = self.num_experts
            config["num_experts_per_tok"] = self.num_experts_used
            config["sliding_window"] = None
        return config | dict(self.more)

    def tensors(self) -> list[TensorSpec]:
        """All tensors in the order of the layers."""
        shapes = tensor_shapes(parse_config(self.config()))
        return [TensorSpec(name, shape) for name, shape in shapes.items()]


_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True}
_GEMMA3 = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 32,
    "rope_local_base_freq": 10000.0,
    "rope_parameters": None,
}
SHAPES = {
    "tiny": Shape("llama", 3, 64, 160, 4, 2, 16, 512, 2048),
    "tiny-qwen2": Shape("qwen2", 3, 64, 160, 4, 2, 16, 512, 2048),
    "tiny-qwen3": Shape("qwen3", 3, 64, 160, 4, 2, 32, 512, 2048),
    "tiny-moe": Shape("mixtral", 3, 64, 160, 4, 2, 16, 512, 2048, tied=False, num_experts=4),
    "tiny-mistral": Shape(
        "mistral", 3, 64, 160, 4, 2, 16, 512, 2048, tied=False, more={"sliding_window": 128}
    ),
    "tiny-qwen3-moe": Shape(
        "qwen3_moe", 3, 64, 160, 4, 2, 32, 512, 2048, tied=False, more=_EXPERTS | {"num_experts": 8}
    ),
    "tiny-gemma3": Shape(
        "gemma3_text", 6, 64, 160, 4, 1, 32, 512, 2048, 1e6, more=_GEMMA3 | {"sliding_window": 128}
    ),
    "tiny-phi3": Shape("phi3", 3, 64, 160, 4, 2, 16, 512, 2048, tied=False),
    "llama-100m": Shape("llama", 12, 768, 2048, 12, 4, 64, 32000, 8192, 100000.0, 1e-5),
    "qwen2-0.5b": Shape("qwen2", 24, 896, 4864, 14, 2, 64, 151936, 32768, 1e6),
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, 40960, 1e6),
    "llama-1b": Shape("llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072, 500000.0, 1e-5),
    "qwen3-1.7b": Shape("qwen3", 28, 2048, 6144, 16, 8, 128, 151936, 40960, 1e6),
    "moe-8x100m": Shape(
        "mixtral", 12, 768, 2048, 12, 4, 64, 32000, 8192, 1e6, 1e-5, tied=False, num_experts=8
    ),
}
