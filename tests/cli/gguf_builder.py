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
}
EXPERT_PARTS = {"w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}


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
    arch = arch or {"mixtral": "llama"}.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if config.get("num_local_experts"):
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    add_tokenizer(writer, **tokenizer)
    for name, values in gguf_tensors(model, config, arch):
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(model: Path, config: dict, arch: str) -> list[tuple[str, np.ndarray]]:
    tensors = read_safetensors(model / "model.safetensors")
    found: list[tuple[str, np.ndarray]] = []
    experts: dict[str, list[np.ndarray]] = {}
    for name, bits in tensors.items():
        values = to_float32(bits)
        if ".experts." in name:
            layer, part = name.split(".")[2], EXPERT_PARTS[name.split(".")[-2]]
            experts.setdefault(f"blk.{layer}.{part}_exps.weight", []).append(values)
            continue
        stem, suffix = name.rsplit(".", 1)
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            if arch == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
                key = "num_attention_heads" if "q_proj" in stem else "num_key_value_heads"
                values = interleave(values, config[key])
            found.append((f"blk.{layer}.{NAMES[stem]}.{suffix}", values))
        else:
            found.append((f"{NAMES[stem]}.{suffix}", values))
    found += [(name, np.stack(parts)) for name, parts in experts.items()]
    if config["rope_parameters"]["rope_type"] == "llama3":
        divisors = llama3_divisors(config["rope_parameters"], config["head_dim"])
        found.append(("rope_freqs.weight", divisors))
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
) -> None:
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(template)


def small_tokenizer(**changes: object) -> dict:
    """A vocabulary of 512 tokens: three control tokens, all bytes, merges " a" ... " hu"."""
    from kvasir_cli.models.making import make_vocabulary

    vocabulary = make_vocabulary(512, 2048)
    return {
        "tokens": list(vocabulary.tokens),
        "merges": [" ".join(merge) for merge in vocabulary.merges],
        "types": [3, 3, 3] + [1] * 509,
    } | changes
