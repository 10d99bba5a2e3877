"""config.json from a GGUF file's metadata.

Decides which architectures are imported and how llama.cpp's keys are called by Hugging Face.
"""

from typing import Any

import numpy as np

from kvasir_cli.errors import RefusedError
from kvasir_cli.models.gguf_file import GgufFile

MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
MIXTRAL = ("mixtral", "MixtralForCausalLM")
LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0
"""low_freq_factor and high_freq_factor of every released Llama 3.1 and later model."""


def has_experts(file: GgufFile) -> bool:
    """Whether the model is a mixture of experts (llama.cpp keeps Mixtral under `llama`)."""
    return file.get(f"{file.architecture}.expert_count", int, 0) > 0


def hf_config(file: GgufFile) -> dict[str, Any]:
    """The contents of config.json.

    Raises:
        RefusedError: an architecture or a feature that is not supported; it says which.
    """
    arch = file.architecture
    if arch not in MODEL_TYPES:
        raise RefusedError(
            f"{file.path}: architecture {arch!r} is not supported "
            f"(supported: {', '.join(MODEL_TYPES)}, and llama with experts)"
        )
    num_heads = file.need(f"{arch}.attention.head_count", int)
    hidden = file.need(f"{arch}.embedding_length", int)
    head_dim = file.get(f"{arch}.attention.key_length", int, 0) or hidden // num_heads
    _refuse_odd_heads(file, head_dim)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise RefusedError(f"{file.path}: it has no tensor token_embd.weight")
    config: dict[str, Any] = {
        "architectures": [MODEL_TYPES[arch]],
        "model_type": arch,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": file.need(f"{arch}.feed_forward_length", int),
        "num_hidden_layers": file.need(f"{arch}.block_count", int),
        "num_attention_heads": num_heads,
        "num_key_value_heads": file.get(f"{arch}.attention.head_count_kv", int, num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.need(f"{arch}.context_length", int),
        "rms_norm_eps": _float(file.need(f"{arch}.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _float(file.get(f"{arch}.rope.freq_base", float, 10000.0)),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "vocab_size": int(embedding.shape[1]),
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    if arch != "qwen2":  # where biases are part of the type
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if has_experts(file):
        _add_experts(file, config)
    _add_rope(file, config)
    for key in ("bos", "eos", "padding"):
        name = f"tokenizer.ggml.{key}_token_id"
        if name in file.fields:
            config[f"{key.replace('padding', 'pad')}_token_id"] = file.need(name, int)
    return config


def _float(value: float) -> float:
    """The shortest decimal of a float32: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _refuse_odd_heads(file: GgufFile, head_dim: int) -> None:
    arch = file.architecture
    for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        if (value := file.get(key, int, head_dim)) != head_dim:
            raise RefusedError(f"{file.path}: {key} {value} differs from the head size {head_dim}")


def _add_experts(file: GgufFile, config: dict[str, Any]) -> None:
    arch = file.architecture
    if arch != "llama":
        raise RefusedError(f"{file.path}: experts are supported for architecture llama alone")
    config["model_type"], architecture = MIXTRAL
    config["architectures"] = [architecture]
    config["num_local_experts"] = file.need(f"{arch}.expert_count", int)
    config["num_experts_per_tok"] = file.need(f"{arch}.expert_used_count", int)
    config["sliding_window"] = None


def _add_rope(file: GgufFile, config: dict[str, Any]) -> None:
    arch = file.architecture
    kind = file.get(f"{arch}.rope.scaling.type", str, "none")
    if kind != "none":
        raise RefusedError(f"{file.path}: rotary scaling of type {kind!r} is not supported")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    factors = file.tensors.get("rope_freqs.weight")
    if factors is not None:
        scaling = _llama3_scaling(
            np.asarray(factors.data, dtype=np.float64), config["rope_theta"], config["head_dim"]
        )
        if scaling is None:
            raise RefusedError(f"{file.path}: its rope_freqs are not those of Llama 3 scaling")
        rope |= scaling
        config["rope_scaling"] = scaling
    config["rope_parameters"] = rope


def _llama3_scaling(factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any] | None:
    """The Llama 3 parameters that give these divisors of frequencies, or None.

    GGUF keeps only the divisors; the training length is found by trying powers of two, the rest
    is the same in every released model.
    """
    inverse = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths = 2 * np.pi / inverse
    scale = float(np.round(factors.max(), 4))
    for length in (2**power for power in range(6, 21)):
        smooth = (length / wavelengths - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)
        expected = 1 / ((1 - smooth) / scale + smooth)
        expected = np.where(wavelengths < length / LLAMA3_HIGH, 1.0, expected)
        expected = np.where(wavelengths > length / LLAMA3_LOW, scale, expected)
        if np.allclose(expected, factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": scale,
                "low_freq_factor": LLAMA3_LOW,
                "high_freq_factor": LLAMA3_HIGH,
                "original_max_position_embeddings": length,
            }
    return None
