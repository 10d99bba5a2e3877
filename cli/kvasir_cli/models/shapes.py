"""Named shapes of models that `kvasir model make` fills with random weights.

Decides the config.json of each shape and lists its tensors; the values are left to making.py.
"""

from dataclasses import dataclass
from typing import Any

from kvasir_cli.models.safetensors import TensorSpec

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
}


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

    def config(self) -> dict[str, Any]:
        """The contents of config.json, without the ids of special tokens."""
        config: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.model_type]],
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
        return config

    def tensors(self) -> list[TensorSpec]:
        """All tensors in the order of the layers."""
        specs = [TensorSpec("model.embed_tokens.weight", (self.vocab, self.hidden))]
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            specs += [
                TensorSpec(prefix + name, shape)
                for name, shape in self._attention() + self._feed_forward()
            ]
        specs.append(TensorSpec("model.norm.weight", (self.hidden,)))
        if not self.tied:
            specs.append(TensorSpec("lm_head.weight", (self.vocab, self.hidden)))
        return specs

    def _attention(self) -> list[tuple[str, tuple[int, ...]]]:
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        rows = {"q": query, "k": key, "v": key}
        found: list[tuple[str, tuple[int, ...]]] = [("input_layernorm.weight", (self.hidden,))]
        found += [(f"self_attn.{n}_proj.weight", (rows[n], self.hidden)) for n in rows]
        if self.model_type == "qwen2":
            found += [(f"self_attn.{n}_proj.bias", (rows[n],)) for n in rows]
        if self.model_type == "qwen3":
            found += [(f"self_attn.{n}_norm.weight", (self.head_dim,)) for n in "qk"]
        found.append(("self_attn.o_proj.weight", (self.hidden, query)))
        return found

    def _feed_forward(self) -> list[tuple[str, tuple[int, ...]]]:
        up, down = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        found: list[tuple[str, tuple[int, ...]]] = [
            ("post_attention_layernorm.weight", (self.hidden,))
        ]
        if not self.num_experts:
            parts = {"gate": up, "up": up, "down": down}
            return found + [(f"mlp.{n}_proj.weight", shape) for n, shape in parts.items()]
        found.append(("block_sparse_moe.gate.weight", (self.num_experts, self.hidden)))
        for expert in range(self.num_experts):
            prefix = f"block_sparse_moe.experts.{expert}."
            parts = {"w1": up, "w2": down, "w3": up}
            found += [(f"{prefix}{n}.weight", shape) for n, shape in parts.items()]
        return found


SHAPES = {
    "tiny": Shape("llama", 3, 64, 160, 4, 2, 16, 512, 2048),
    "tiny-qwen2": Shape("qwen2", 3, 64, 160, 4, 2, 16, 512, 2048),
    "tiny-qwen3": Shape("qwen3", 3, 64, 160, 4, 2, 32, 512, 2048),
    "tiny-moe": Shape("mixtral", 3, 64, 160, 4, 2, 16, 512, 2048, tied=False, num_experts=4),
    "llama-100m": Shape("llama", 12, 768, 2048, 12, 4, 64, 32000, 8192, 100000.0, 1e-5),
    "qwen2-0.5b": Shape("qwen2", 24, 896, 4864, 14, 2, 64, 151936, 32768, 1e6),
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, 40960, 1e6),
    "llama-1b": Shape("llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072, 500000.0, 1e-5),
    "qwen3-1.7b": Shape("qwen3", 28, 2048, 6144, 16, 8, 128, 151936, 40960, 1e6),
    "moe-8x100m": Shape(
        "mixtral", 12, 768, 2048, 12, 4, 64, 32000, 8192, 1e6, 1e-5, tied=False, num_experts=8
    ),
}
