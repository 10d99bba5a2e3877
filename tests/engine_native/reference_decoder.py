"""What the supported models are, in NumPy and float64, one formula after the other.

Written from the published definitions: RoFormer, NTK-aware scaling, YaRN, LongRoPE, Llama 3.1's
scaling; the papers of Mistral (sliding window), Mixtral, Qwen2, Qwen3, Gemma 2 and 3, Phi-3. It
reads config.json by itself, shares no code with the engine, and is slow.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Tensors = Mapping[str, np.ndarray]
"""float64 values under the names of the model's files."""


def reference_logits(config: Mapping[str, Any], tensors: Tensors, ids: np.ndarray) -> np.ndarray:
    """[length, vocab] logits of the whole sequence at once."""
    is_gemma = config["model_type"].startswith("gemma")
    x = tensors["model.embed_tokens.weight"][ids]
    if is_gemma:
        x = x * math.sqrt(config["hidden_size"])
    for layer in range(config["num_hidden_layers"]):
        part = {
            name.removeprefix(f"model.layers.{layer}."): values
            for name, values in tensors.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        x = decoder_layer(config, part, x, layer)
    x = rms_norm(config, x, tensors["model.norm.weight"])
    is_tied = config.get("tie_word_embeddings", is_gemma)
    head = tensors["model.embed_tokens.weight" if is_tied else "lm_head.weight"]
    logits = x @ head.T
    if cap := config.get("final_logit_softcapping"):
        logits = cap * np.tanh(logits / cap)
    return logits


class Bf16Inputs(np.ndarray):
    """A matrix of weights whose products round what it is multiplied with to bf16."""

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        operands = [
            value.view(np.ndarray)
            if isinstance(value, Bf16Inputs)
            else (rounded_to_bf16(value) if ufunc is np.matmul else value)
            for value in inputs
        ]
        return getattr(ufunc, method)(*operands, **options)


def rounded_to_bf16(values: np.ndarray) -> np.ndarray:
    """To the nearest, ties to even; through float32."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    nearest = bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000
    return nearest.astype(np.uint32).view(np.float32).astype(np.float64)


def decoder_layer(config: Mapping[str, Any], part: Tensors, x: np.ndarray, layer: int):
    def norm(values: np.ndarray, name: str) -> np.ndarray:
        return rms_norm(config, values, part[f"{name}.weight"])

    attended = attention(config, part, norm(x, "input_layernorm"), layer)
    if config["model_type"].startswith("gemma"):
        x = x + norm(attended, "post_attention_layernorm")
        inner = feed_forward(config, part, norm(x, "pre_feedforward_layernorm"), layer)
        return x + norm(inner, "post_feedforward_layernorm")
    x = x + attended
    return x + feed_forward(config, part, norm(x, "post_attention_layernorm"), layer)


def rms_norm(config: Mapping[str, Any], x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    if config["model_type"].startswith("gemma"):
        weight = 1 + weight
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config["rms_norm_eps"]) * weight


# ---- attention -----------------------------------------------------------------------------------


def attention(config: Mapping[str, Any], part: Tensors, x: np.ndarray, layer: int) -> np.ndarray:
    length, num_heads = len(x), config["num_attention_heads"]
    num_kv_heads = config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // num_heads
    q, k, v = (values.reshape(length, -1, size) for values in projections(part, x, num_heads, size))
    if "self_attn.q_norm.weight" in part:
        q = rms_norm(config, q, part["self_attn.q_norm.weight"])
        k = rms_norm(config, k, part["self_attn.k_norm.weight"])
    is_sliding = slides(config, layer)
    q, k = (rotated(config, values, size, is_sliding) for values in (q, k))
    scale = 1 / math.sqrt(config.get("query_pre_attn_scalar") or size)
    sees = np.tril(np.ones((length, length), bool))
    if is_sliding:  # a token and window - 1 before it
        sees &= ~np.tril(np.ones((length, length), bool), -config["sliding_window"])
    heads = []
    for head in range(num_heads):
        shared = head // (num_heads // num_kv_heads)
        scores = q[:, head] @ k[:, shared].T * scale
        if cap := config.get("attn_logit_softcapping"):
            scores = cap * np.tanh(scores / cap)
        scores = np.where(sees, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        heads.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, shared])
    out = np.concatenate(heads, axis=1) @ part["self_attn.o_proj.weight"].T
    return out + part.get("self_attn.o_proj.bias", 0)


def projections(part: Tensors, x: np.ndarray, num_heads: int, size: int) -> list[np.ndarray]:
    if "self_attn.qkv_proj.weight" in part:
        fused = x @ part["self_attn.qkv_proj.weight"].T
        num_query = num_heads * size
        num_key = (fused.shape[1] - num_query) // 2
        return [
            fused[:, :num_query],
            fused[:, num_query : num_query + num_key],
            fused[:, num_query + num_key :],
        ]
    return [
        x @ part[f"self_attn.{n}_proj.weight"].T + part.get(f"self_attn.{n}_proj.bias", 0)
        for n in "qkv"
    ]


def slides(config: Mapping[str, Any], layer: int) -> bool:
    """Whether attention of this layer has a window."""
    if kinds := config.get("layer_types"):
        return bool(kinds[layer] == "sliding_attention")
    kind = config["model_type"]
    if kind == "gemma3_text":  # five local layers, then a global one
        return (layer + 1) % config.get("sliding_window_pattern", 6) != 0
    if kind == "gemma2":  # in turn
        return layer % 2 == 0
    if kind in ("qwen2", "qwen3"):
        return bool(config.get("use_sliding_window")) and layer >= config["max_window_layers"]
    return kind in ("mistral", "mixtral", "phi3") and config.get("sliding_window") is not None


# ---- rotary embeddings ---------------------------------------------------------------------------


def rotated(
    config: Mapping[str, Any], heads: np.ndarray, size: int, is_sliding: bool
) -> np.ndarray:
    """Pairs (i, i + half) of each head turned by their angle at each position."""
    dim = int(size * config.get("partial_rotary_factor", 1.0))
    inverse, scale = frequencies(config, dim, is_sliding)
    angles = np.arange(len(heads))[:, None, None] * inverse
    cos, sin = np.cos(angles) * scale, np.sin(angles) * scale
    first, second = heads[..., : dim // 2], heads[..., dim // 2 : dim]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return np.concatenate([*turned, heads[..., dim:]], axis=-1)


def frequencies(config: Mapping[str, Any], dim: int, is_sliding: bool) -> tuple[np.ndarray, float]:
    """Radians per position of each pair, and what multiplies cosines and sines."""
    scaling = config.get("rope_scaling") or {}
    base = config.get("rope_theta", 10000.0)
    if config["model_type"] == "gemma3_text" and is_sliding:
        base, scaling = config["rope_local_base_freq"], {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    longest = config["max_position_embeddings"]
    trained = scaling.get("original_max_position_embeddings", longest)
    trained = config.get("original_max_position_embeddings", trained)
    plain = np.array([base ** (-2 * i / dim) for i in range(dim // 2)])
    if kind == "linear":
        return plain / scaling["factor"], 1.0
    if kind == "dynamic":  # the base for sequences of the longest length
        ratio = longest / trained
        alpha = scaling["factor"] * ratio - (scaling["factor"] - 1)
        base = base * alpha ** (dim / (dim - 2))
        return np.array([base ** (-2 * i / dim) for i in range(dim // 2)]), 1.0
    if kind == "llama3":
        return np.array([llama3(scaling, value, trained) for value in plain]), 1.0
    if kind == "yarn":
        ramp = np.array([yarn_share(scaling, base, dim, i, trained) for i in range(dim // 2)])
        mixed = (1 - ramp) * plain / scaling["factor"] + ramp * plain
        return mixed, 0.1 * math.log(scaling["factor"]) + 1
    if kind in ("longrope", "su"):
        divisors = scaling["long_factor" if longest > trained else "short_factor"]
        ratio = longest / trained
        scale = math.sqrt(1 + math.log(ratio) / math.log(trained)) if ratio > 1 else 1.0
        return plain / np.array(divisors), scale
    assert kind == "default"
    return plain, 1.0


def llama3(scaling: Mapping[str, Any], frequency: float, trained: int) -> float:
    turns = trained * frequency / (2 * math.pi)  # within the pretraining's length
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if turns < low:
        return frequency / scaling["factor"]
    if turns > high:
        return frequency
    share = (turns - low) / (high - low)
    return (1 - share) * frequency / scaling["factor"] + share * frequency


def yarn_share(scaling: Mapping[str, Any], base: float, dim: int, i: int, trained: int) -> float:
    """How much of a pair's own frequency stays: the paper's ramp, in pairs as its code has it."""

    def pair(turns: float) -> float:
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(pair(scaling.get("beta_slow", 1))), dim - 1)
    return 1 - min(max((i - low) / max(high - low, 0.001), 0.0), 1.0)


# ---- feed-forward --------------------------------------------------------------------------------


def feed_forward(config: Mapping[str, Any], part: Tensors, x: np.ndarray, layer: int):
    if "block_sparse_moe.gate.weight" in part:
        return experts(config, part, x, "block_sparse_moe.", ("w1", "w3", "w2"))
    if "mlp.gate.weight" in part:
        return experts(config, part, x, "mlp.", ("gate_proj", "up_proj", "down_proj"))
    if "mlp.gate_up_proj.weight" in part:
        gate, up = np.split(part["mlp.gate_up_proj.weight"], 2)
    else:
        gate, up = part["mlp.gate_proj.weight"], part["mlp.up_proj.weight"]
    return activate(config, x @ gate.T) * (x @ up.T) @ part["mlp.down_proj.weight"].T


def activate(config: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    if config["model_type"].startswith("gemma"):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / (1 + np.exp(-x))


def experts(
    config: Mapping[str, Any], part: Tensors, x: np.ndarray, prefix: str, names: tuple[str, ...]
) -> np.ndarray:
    out = np.zeros_like(x)
    logits = x @ part[f"{prefix}gate.weight"].T
    for token, row in enumerate(logits):
        shares = np.exp(row - row.max())
        shares /= shares.sum()
        chosen = np.argsort(-shares, kind="stable")[: config["num_experts_per_tok"]]
        if config["model_type"] == "mixtral" or config["norm_topk_prob"]:
            shares = shares / shares[chosen].sum()
        for expert in chosen:
            gate, up, down = (part[f"{prefix}experts.{expert}.{name}.weight"] for name in names)
            hidden = activate(config, gate @ x[token]) * (up @ x[token])
            out[token] += shares[expert] * (down @ hidden)
    return out
