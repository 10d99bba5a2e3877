"""config.json from a GGUF file's metadata.

Decides which architectures are imported and how llama.cpp's keys are called by Hugging Face.
"""

from typing import Any

from kvasir_engine.config import FAMILIES

from kvasir_cli.errors import RefusedError
from kvasir_cli.models.gguf_file import GgufFile, float32_text
from kvasir_cli.models.gguf_rope import rope_scaling

MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
}
"""llama.cpp keeps Mistral and Mixtral under `llama` too."""
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
"""The one size whose scores are scaled by hidden_size / heads and not by the head size: the file
does not say, llama.cpp tells it by its layers."""


def hf_config(file: GgufFile) -> dict[str, Any]:
    """The contents of config.json.

    Raises:
        RefusedError: an architecture or a feature that is not supported; it says which.
    """
    arch, kind = file.architecture, model_type(file)
    num_heads = file.need(f"{arch}.attention.head_count", int)
    hidden = file.need(f"{arch}.embedding_length", int)
    head_dim = file.get(f"{arch}.attention.key_length", int, 0) or hidden // num_heads
    theta = float32_text(file.get(f"{arch}.rope.freq_base", float, 10000.0))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise RefusedError(f"{file.path}: it has no tensor token_embd.weight")
    config: dict[str, Any] = {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": file.need(f"{arch}.feed_forward_length", int),
        "num_hidden_layers": file.need(f"{arch}.block_count", int),
        "num_attention_heads": num_heads,
        "num_key_value_heads": file.get(f"{arch}.attention.head_count_kv", int, num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.need(f"{arch}.context_length", int),
        "rms_norm_eps": float32_text(file.need(f"{arch}.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": theta,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "vocab_size": int(embedding.shape[1]),
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    if FAMILIES[kind].bias == "field":  # elsewhere biases are part of the type
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    config |= _rotary_part(file, head_dim) | _experts(file, kind) | _windows(file, kind)
    config |= _gemma(file, config) if arch.startswith("gemma") else {}
    scaling = rope_scaling(file, theta=theta, head_dim=head_dim)
    config |= _rope(kind, theta, scaling)
    if kind == "phi3":
        config["original_max_position_embeddings"] = file.get(
            f"{arch}.rope.scaling.original_context_length", int, config["max_position_embeddings"]
        )
    for key in ("bos", "eos", "padding"):
        name = f"tokenizer.ggml.{key}_token_id"
        if name in file.fields:
            config[f"{key.replace('padding', 'pad')}_token_id"] = file.need(name, int)
    return config


def model_type(file: GgufFile) -> str:
    """Hugging Face's name of the kind of model.

    Raises:
        RefusedError: the architecture is not supported.
    """
    arch = file.architecture
    if arch not in MODEL_TYPES:
        raise RefusedError(
            f"{file.path}: architecture {arch!r} is not supported "
            f"(supported: {', '.join(MODEL_TYPES)})"
        )
    has_experts = file.get(f"{arch}.expert_count", int, 0) > 0
    if has_experts and arch not in ("llama", "qwen3moe"):
        raise RefusedError(f"{file.path}: experts of architecture {arch!r} are not supported")
    if arch == "llama" and has_experts:
        return "mixtral"
    has_window = file.get(f"{arch}.attention.sliding_window", int, 0) > 0
    return "mistral" if arch == "llama" and has_window else MODEL_TYPES[arch]


def _rotary_part(file: GgufFile, head_dim: int) -> dict[str, Any]:
    """How much of a head rotates; values must be as wide as keys."""
    arch = file.architecture
    rotary = file.get(f"{arch}.rope.dimension_count", int, head_dim)
    for key, value in (
        ("attention.value_length", file.get(f"{arch}.attention.value_length", int, head_dim)),
        ("rope.dimension_count", head_dim if arch == "phi3" else rotary),
    ):
        if value != head_dim:
            text = f"{arch}.{key} {value} differs from the head size {head_dim}"
            raise RefusedError(f"{file.path}: {text}")
    return {} if rotary == head_dim else {"partial_rotary_factor": rotary / head_dim}


def _experts(file: GgufFile, kind: str) -> dict[str, Any]:
    field = FAMILIES[kind].experts_field
    if not field:
        return {}
    arch = file.architecture
    found: dict[str, Any] = {
        field: file.need(f"{arch}.expert_count", int),
        "num_experts_per_tok": file.need(f"{arch}.expert_used_count", int),
    }
    if kind == "qwen3_moe":  # llama.cpp always scales the shares of the chosen
        found["norm_topk_prob"] = True
        found["moe_intermediate_size"] = file.need(f"{arch}.expert_feed_forward_length", int)
    return found


def _windows(file: GgufFile, kind: str) -> dict[str, Any]:
    """The sliding window, where the type has one."""
    arch = file.architecture
    window = file.get(f"{arch}.attention.sliding_window", int, 0) or None
    if FAMILIES[kind].windows in ("all", "pattern"):
        return {"sliding_window": window}
    if window is not None:
        raise RefusedError(f"{file.path}: {arch}.attention.sliding_window is not supported")
    return {}


def _gemma(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    arch, num_heads = file.architecture, config["num_attention_heads"]
    is_largest = config["num_hidden_layers"] == GEMMA_27B_LAYERS[arch]
    found: dict[str, Any] = {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": (
            config["hidden_size"] // num_heads if is_largest else config["head_dim"]
        ),
    }
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if f"{arch}.{name}" in file.fields:
            found[name] = float32_text(file.need(f"{arch}.{name}", float))
    pattern = f"{arch}.attention.sliding_window_pattern"
    if pattern in file.fields:
        found["sliding_window_pattern"] = file.need(pattern, int)
    if arch == "gemma3":
        local = file.get(f"{arch}.rope.freq_base_swa", float, 10000.0)
        found["rope_local_base_freq"] = float32_text(local)
    return found


def _rope(kind: str, theta: float, scaling: dict[str, Any] | None) -> dict[str, Any]:
    """The fields that older and newer readers look at."""
    found: dict[str, Any] = {"rope_scaling": scaling} if scaling else {}
    if kind != "gemma3_text":  # there the newer field has an object for each kind of layer
        found["rope_parameters"] = (scaling or {"rope_type": "default"}) | {"rope_theta": theta}
    return found
