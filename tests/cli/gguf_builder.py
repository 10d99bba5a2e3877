"""Writes GGUF files from Hugging Face folders the way llama.cpp's converter does, for tests."""

import json
from pathlib import Path

import gguf
import numpy as np

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate": "ffn_gate_inp",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
}
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
EXPERT_PARTS = {
    "w1": "ffn_gate",
    "w2": "ffn_down",
    "w3": "ffn_up",
    "gate_proj": "ffn_gate",
    "down_proj": "ffn_down",
    "up_proj": "ffn_up",
}
ARCHITECTURES = {
    "mixtral": "llama",
    "mistral": "llama",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a bf16 safetensors file as uint16 arrays."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(
            data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]], "<u2"
        ).reshape(entry["shape"])
        for name, entry in header.items()
    }


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def interleave(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's `permute`: the two halves of each head's rows, one row from each in turn."""
    shape = weights.shape
    halves = weights.reshape(num_heads, 2, shape[0] // num_heads // 2, *shape[1:])
    return halves.swapaxes(1, 2).reshape(shape)


def llama3_divisors(rope: dict, head_dim: int) -> np.ndarray:
    """rope_freqs.weight as llama.cpp's converter computes it."""
    values = []
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (i / head_dim)
        if wavelength < high:
            values.append(1.0)
        elif wavelength > low:
            values.append(rope["factor"])
        else:
            smooth = rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]
            smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
            values.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(values, dtype=np.float32)


def write_gguf(path: Path, model: Path, *, arch: str | None = None, tokenizer: dict) -> None:
    """Write `model` (a Hugging Face folder) as a float32 GGUF file."""
    config = json.loads((model / "config.json").read_text())
    arch = arch or ARCHITECTURES.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"]}
    writer.add_rope_freq_base(rope["rope_theta"])
    add_scaling(writer, config)
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if num_experts := config.get("num_local_experts") or config.get("num_experts"):
        writer.add_expert_count(num_experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if size := config.get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(size)
    if window := config.get("sliding_window"):
        writer.add_sliding_window(window)
    if cap := config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(cap)
    if cap := config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(cap)
    add_tokenizer(writer, **tokenizer)
    for name, values in gguf_tensors(model, config, arch):
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_scaling(writer: gguf.GGUFWriter, config: dict) -> None:
    """Rotary scaling; Llama 3's and LongRoPE's are tensors, with the length of the pretraining."""
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if config["model_type"] == "phi3":
        part = config.get("partial_rotary_factor", 1.0)
        writer.add_rope_dimension_count(int(config["head_dim"] * part))
        length = config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(config.get("original_max_position_embeddings", length))


def gguf_tensors(model: Path, config: dict, arch: str) -> list[tuple[str, np.ndarray]]:
    tensors = read_safetensors(model / "model.safetensors")
    found: list[tuple[str, np.ndarray]] = []
    experts: dict[str, list[np.ndarray]] = {}
    is_gemma = config["model_type"].startswith("gemma")
    names = NAMES | GEMMA_NAMES if is_gemma else NAMES
    for name, bits in tensors.items():
        values = to_float32(bits)
        if ".experts." in name:
            layer, part = name.split(".")[2], EXPERT_PARTS[name.split(".")[-2]]
            experts.setdefault(f"blk.{layer}.{part}_exps.weight", []).append(values)
            continue
        stem, suffix = name.rsplit(".", 1)
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            if is_gemma and stem.endswith("norm"):
                values = values + np.float32(1)
            if arch == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
                key = "num_attention_heads" if "q_proj" in stem else "num_key_value_heads"
                values = interleave(values, config[key])
            found.append((f"blk.{layer}.{names[stem]}.{suffix}", values))
        else:
            if is_gemma and stem == "model.norm":
                values = values + np.float32(1)
            found.append((f"{NAMES[stem]}.{suffix}", values))
    found += [(name, np.stack(parts)) for name, parts in experts.items()]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type") == "llama3":
        rope = {"rope_theta": config.get("rope_theta")} | rope
        found.append(("rope_freqs.weight", llama3_divisors(rope, config["head_dim"])))
    if rope.get("type") == "longrope":
        for name in ("long", "short"):
            factors = np.array(rope[f"{name}_factor"], np.float32)
            found.append((f"rope_factors_{name}.weight", factors))
    return found


def add_tokenizer(
    writer: gguf.GGUFWriter,
    *,
    tokens: list[str],
    merges: list[str],
    types: list[int],
    model: str = "gpt2",
    pre: str = "gpt-2",
    template: str = "{{ messages[0]['content'] }}",
    scores: list[float] | None = None,
    adds_prefix: bool | None = None,
) -> None:
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if scores is not None:
        writer.add_token_scores(scores)
    if merges:
        writer.add_token_merges(merges)
    if adds_prefix is not None:
        writer.add_add_space_prefix(adds_prefix)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(template)


PIECES = "\u2581 h e l o w r d \u2581h el lo \u2581hel \u2581hello \u2581w or ld orld \u2581world"
"""Letters first, then pieces in the order in which they were learnt."""


def pieces_tokenizer(**changes: object) -> dict:
    """A vocabulary as SentencePiece trains one: unknown, control, bytes, then scored pieces."""
    special = ["<unk>", "<s>", "</s>", "<|end|>", "<tool>"]
    pieces = PIECES.split(" ")
    tokens = special + [f"<0x{byte:02X}>" for byte in range(256)] + pieces
    return {
        "tokens": tokens,
        "merges": [],
        "types": [2, 3, 3, 3, 4] + [6] * 256 + [1] * len(pieces),
        "scores": [0.0] * (len(special) + 256) + [-float(i) for i in range(len(pieces))],
        "model": "llama",
        "pre": "default",
    } | changes


def small_tokenizer(**changes: object) -> dict:
    """A vocabulary of 512 tokens: three control tokens, all bytes, merges " a" ... " hu"."""
    from kvasir_cli.models.making import make_vocabulary

    vocabulary = make_vocabulary(512, 2048)
    return {
        "tokens": list(vocabulary.tokens),
        "merges": [" ".join(merge) for merge in vocabulary.merges],
        "types": [3, 3, 3] + [1] * 509,
    } | changes
