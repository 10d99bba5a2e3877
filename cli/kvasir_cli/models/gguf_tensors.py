"""Which Hugging Face tensor each GGUF tensor becomes, and its values piece by piece.

Three things differ between the two: names; the rows of q and k in architecture `llama`, which
llama.cpp stores with the two halves of each head interleaved; and experts, which it stores as one
tensor. The plan covers every tensor of the file, or the import is refused.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import numpy as np

from kvasir_cli.errors import RefusedError
from kvasir_cli.models.gguf_file import PIECE_VALUES_MAX, GgufFile, dequantise
from kvasir_cli.models.safetensors import TensorSpec, to_bf16

TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "block_sparse_moe.gate",
}
EXPERT = {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}
IGNORED = {"rope_freqs.weight"}  # config.json says the same


@dataclass(frozen=True, slots=True)
class Planned:
    """One tensor to write and where its values come from."""

    spec: TensorSpec
    source: gguf.ReaderTensor
    expert: int | None = None
    interleaved_heads: int = 0  # heads whose rows are to be put back in order; 0: as they are


def plan_tensors(file: GgufFile, config: dict[str, object]) -> list[Planned]:
    """What to write, in the order of the layers.

    Raises:
        RefusedError: a tensor that has no place in a supported model.
    """
    heads: dict[str, int] = {}
    if file.architecture == "llama":
        heads["attn_q"] = file.need("llama.attention.head_count", int)
        heads["attn_k"] = file.get("llama.attention.head_count_kv", int, heads["attn_q"])
    planned: list[Planned] = []
    for tensor in file.tensors.values():
        if tensor.name not in IGNORED:
            planned += _plan(file, tensor, heads)
    num_layers = config["num_hidden_layers"]
    found = {int(match[1]) for name in file.tensors if (match := re.match(r"blk\.(\d+)\.", name))}
    if found != set(range(num_layers if isinstance(num_layers, int) else 0)):
        raise RefusedError(f"{file.path}: it should have {num_layers} layers, has {len(found)}")
    return sorted(planned, key=lambda item: _order(item.spec.name))


def pieces(item: Planned) -> Iterator[np.ndarray]:
    """The tensor's values in order as bf16 bits, at most PIECE_VALUES_MAX at a time or one row."""
    data = item.source.data if item.expert is None else item.source.data[item.expert]
    num_rows = item.spec.shape[0] if len(item.spec.shape) == 2 or item.interleaved_heads else 1
    rows = data.reshape(num_rows, -1)
    order = np.arange(num_rows)
    if heads := item.interleaved_heads:
        order = order.reshape(heads, num_rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
    row_values = max(1, int(np.prod(item.spec.shape)) // num_rows)
    step = max(1, PIECE_VALUES_MAX // row_values)
    for start in range(0, num_rows, step):
        yield to_bf16(dequantise(rows[order[start : start + step]], item.source))


def _plan(file: GgufFile, tensor: gguf.ReaderTensor, heads: dict[str, int]) -> Iterator[Planned]:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if tensor.name in TOP:
        yield Planned(TensorSpec(TOP[tensor.name], shape), tensor)
        return
    match = re.fullmatch(r"blk\.(\d+)\.(\w+?)(_exps)?(?:\.(\d+))?\.(weight|bias)", tensor.name)
    layer, part, is_fused, expert, suffix = match.groups() if match else ("", "", "", "", "")
    prefix = f"model.layers.{layer}"
    if part in EXPERT and is_fused:
        for i in range(shape[0]):
            name = f"{prefix}.block_sparse_moe.experts.{i}.{EXPERT[part]}.{suffix}"
            yield Planned(TensorSpec(name, shape[1:]), tensor, expert=i)
    elif part in EXPERT and expert:
        name = f"{prefix}.block_sparse_moe.experts.{expert}.{EXPERT[part]}.{suffix}"
        yield Planned(TensorSpec(name, shape), tensor)
    elif part in LAYER and not expert:
        name = f"{prefix}.{LAYER[part]}.{suffix}"
        yield Planned(TensorSpec(name, shape), tensor, interleaved_heads=heads.get(part, 0))
    else:
        raise RefusedError(f"{file.path}: tensor {tensor.name} is of no supported model")


def _order(name: str) -> tuple[int, int, str]:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    if match:
        return 1, int(match[1]), name
    return (0 if name.startswith("model.embed") else 2), 0, name
