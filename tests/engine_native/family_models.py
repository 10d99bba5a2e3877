"""Tiny random models of every supported family, made by the tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from golden_models import write_safetensors
from kvasir_engine.weights import bf16_from_float32

CONTEXT = 256
BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 200,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
GEMMA: dict[str, Any] = {
    "num_hidden_layers": 4,
    "sliding_window": 40,
    "query_pre_attn_scalar": 24,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
}
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "norm_topk_prob": True}


def llama(**scaling: Any) -> dict[str, Any]:
    return BASE | {"model_type": "llama", "rope_scaling": scaling}


def phi3(**changes: Any) -> dict[str, Any]:
    pairs = 6
    return (
        BASE
        | {
            "model_type": "phi3",
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 64,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
                "long_factor": [1.0 + 0.7 * i for i in range(pairs)],
            },
        }
        | changes
    )


def qwen3_moe(**changes: Any) -> dict[str, Any]:
    return (
        BASE
        | MOE
        | {"model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 48}
        | changes
    )


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": BASE | {"model_type": "llama", "attention_bias": True},
    "llama-linear": llama(rope_type="linear", factor=4.0),
    "llama-dynamic": llama(rope_type="dynamic", factor=2.0),
    "llama-dynamic-long": llama(
        rope_type="dynamic", factor=2.0, original_max_position_embeddings=64
    ),
    "llama-3.1": llama(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    "llama-odd-sizes": BASE
    | {
        "model_type": "llama",
        "hidden_size": 70,
        "intermediate_size": 101,
        "head_dim": 18,
        "attention_bias": True,
    },
    "mistral": BASE | {"model_type": "mistral", "sliding_window": 40},
    "mistral-window-of-a-block": BASE | {"model_type": "mistral", "sliding_window": 32},
    "mistral-narrow": BASE | {"model_type": "mistral", "sliding_window": 1},
    "mixtral": BASE | MOE | {"model_type": "mixtral", "num_local_experts": 4},
    "mixtral-window": BASE
    | MOE
    | {"model_type": "mixtral", "num_local_experts": 4, "sliding_window": 50},
    "qwen2-yarn": BASE | {"model_type": "qwen2", "rope_scaling": YARN},
    "qwen2-upper-windows": BASE
    | {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 40,
        "max_window_layers": 1,
    },
    "qwen3-yarn": BASE | {"model_type": "qwen3", "head_dim": 32, "rope_scaling": YARN},
    "qwen3-odd-head": BASE | {"model_type": "qwen3", "head_dim": 20},
    "qwen3-moe": qwen3_moe(),
    "qwen3-moe-plain-shares": qwen3_moe(norm_topk_prob=False),
    "qwen3-moe-mixed-layers": qwen3_moe(
        num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[1]
    ),
    "gemma2": BASE
    | GEMMA
    | {
        "model_type": "gemma2",
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3": BASE
    | GEMMA
    | {
        "model_type": "gemma3_text",
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 3,
    },
    "gemma3-capped": BASE
    | GEMMA
    | {
        "model_type": "gemma3_text",
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "phi3": phi3(),
    "phi3-short": phi3(original_max_position_embeddings=CONTEXT, sliding_window=47),
    "phi3-plain": phi3(rope_scaling=None, partial_rotary_factor=1.0),
}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors that files of this family hold."""
    kind, hidden = config["model_type"], config["hidden_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        part: dict[str, tuple[int, ...]] = {"self_attn.o_proj.weight": (hidden, query)}
        rows = {"qkv": query + 2 * key} if kind == "phi3" else {"q": query, "k": key, "v": key}
        for name, size in rows.items():
            part[f"self_attn.{name}_proj.weight"] = (size, hidden)
            if kind == "qwen2" or config.get("attention_bias"):
                part[f"self_attn.{name}_proj.bias"] = (size,)
        if config.get("attention_bias"):
            part["self_attn.o_proj.bias"] = (hidden,)
        if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
            part |= {f"self_attn.{n}_norm.weight": (config["head_dim"],) for n in "qk"}
        norms = ["input", "post_attention"]
        norms += ["pre_feedforward", "post_feedforward"] if kind.startswith("gemma") else []
        part |= {f"{name}_layernorm.weight": (hidden,) for name in norms}
        part |= feed_forward_shapes(config, layer)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in part.items()}
    return shapes


def feed_forward_shapes(config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    kind, hidden, inner = config["model_type"], config["hidden_size"], config["intermediate_size"]
    if kind == "phi3":
        return {
            "mlp.gate_up_proj.weight": (2 * inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
    is_dense = layer in config.get("mlp_only_layers", ())
    is_dense |= (layer + 1) % config.get("decoder_sparse_step", 1) != 0
    names, prefix, num_experts = ("gate_proj", "up_proj", "down_proj"), "mlp.", 0
    if kind == "mixtral":
        names, prefix, num_experts = ("w1", "w3", "w2"), "block_sparse_moe.", 4
    if kind == "qwen3_moe" and not is_dense:
        num_experts, inner = config["num_experts"], config["moe_intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {}
    if num_experts:
        shapes[f"{prefix}gate.weight"] = (num_experts, hidden)
    for expert in range(max(1, num_experts)):
        stem = f"{prefix}experts.{expert}." if num_experts else prefix
        for name in names:
            is_down = name in ("w2", "down_proj")
            shapes[f"{stem}{name}.weight"] = (hidden, inner) if is_down else (inner, hidden)
    return shapes


def random_tensors(config: dict[str, Any], seed: int = 5) -> dict[str, np.ndarray]:
    """bf16 bits. Queries and keys are large, so that attention is far from even."""
    source = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        values = source.standard_normal(shape, dtype=np.float32)
        if "norm" in name:
            centre = 0.0 if config["model_type"].startswith("gemma") else 1.0
            values = centre + 0.2 * values
        elif len(shape) == 1:
            values *= 0.1
        else:
            values *= (1.4 if "embed" not in name else 1.0) / np.sqrt(shape[1])
        tensors[name] = bf16_from_float32(values)
    return tensors


def make_family_model(family: str, folder: Path, **changes: Any) -> Path:
    """A model folder of one of FAMILIES, with fields of its config.json replaced."""
    config = FAMILIES[family] | changes
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", random_tensors(config))
    return folder
