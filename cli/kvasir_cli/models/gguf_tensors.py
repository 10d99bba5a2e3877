"""Which Hugging Face tensor each GGUF tensor becomes, and its values piece by piece.

Four things differ between the two: names; the rows of q and k in architecture `llama`, which
llama.cpp stores with the two halves of each head interleaved; experts, which it stores as one
tensor; and Gemma's norms, to which it has added one. The plan covers every tensor of the file, or
the import is refused.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

from kvasir_cli.errors import RefusedError
from kvasir_cli.models.gguf_file import PIECE_VALUES_MAX, GgufFile, dequantise
from kvasir_cli.models.gguf_rope import ROPE_TENSORS
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
    "ffn_gate_inp": "mlp.gate",
}
DIFFERENT = {
    "mixtral": {"ffn_gate_inp": "block_sparse_moe.gate"},
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    "gemma": {
        "ffn_norm": "pre_feedforward_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
"""Parts of a layer that a kind of model has beside those of LAYER, or names otherwise."""
EXPERT = {"ffn_gate": "gate_proj", "ffn_down": "down_proj", "ffn_up": "up_proj"}
MIXTRAL_EXPERT = {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}


@dataclass(frozen=True, slots=True)
class Planned:
    """One tensor to write and where its values come from."""

    spec: TensorSpec
    source: gguf.ReaderTensor
    expert: int | None = None
    interleaved_heads: int = 0  # heads whose rows are to be put back in order; 0: as they are
    offset: float = 0.0  # added to every value


@dataclass(frozen=True, slots=True)
class _Names:
    """How one kind of model calls the parts of a layer."""

    layer: Mapping[str, str]
    expert: Mapping[str, str]
    expert_prefix: str
    heads: Mapping[str, int]
    norm_offset: float

    @classmethod
    def of(cls, file: GgufFile, config: Mapping[str, Any]) -> "_Names":
        kind = config["model_type"]
        is_gemma, is_mixtral = kind.startswith("gemma"), kind == "mixtral"
        interleaved = {
            "attn_q": config["num_attention_heads"],
            "attn_k": config["num_key_value_heads"],
        }
        return cls(
            layer=LAYER | DIFFERENT.get("gemma" if is_gemma else kind, {}),
            expert=MIXTRAL_EXPERT if is_mixtral else EXPERT,
            expert_prefix="block_sparse_moe.experts" if is_mixtral else "mlp.experts",
            heads=interleaved if file.architecture == "llama" else {},
            norm_offset=-1.0 if is_gemma else 0.0,
        )

    def offset(self, name: str) -> float:
        """What to add to the values of this tensor."""
        return self.norm_offset if name.endswith("norm.weight") else 0.0


def plan_tensors(file: GgufFile, config: Mapping[str, Any]) -> list[Planned]:
    """What to write, in the order of the layers.

    Raises:
        RefusedError: a tensor that has no place in a supported model.
    """
    names = _Names.of(file, config)
    planned: list[Planned] = []
    for tensor in file.tensors.values():
        if tensor.name not in ROPE_TENSORS:
            planned += _plan(file, tensor, names)
    num_layers = config["num_hidden_layers"]
    found = {int(match[1]) for name in file.tensors if (match := re.match(r"blk\.(\d+)\.", name))}
    if found != set(range(num_layers)):
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
        values = dequantise(rows[order[start : start + step]], item.source)
        yield to_bf16(values + np.float32(item.offset))


def _plan(file: GgufFile, tensor: gguf.ReaderTensor, names: _Names) -> Iterator[Planned]:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if tensor.name in TOP:
        offset = names.offset(tensor.name)
        yield Planned(TensorSpec(TOP[tensor.name], shape), tensor, offset=offset)
        return
    match = re.fullmatch(r"blk\.(\d+)\.(\w+?)(_exps)?(?:\.(\d+))?\.(weight|bias)", tensor.name)
    layer, part, is_fused, expert, suffix = match.groups() if match else ("", "", "", "", "")
    prefix = f"model.layers.{layer}"
    if part in EXPERT and is_fused:
        for i in range(shape[0]):
            name = f"{prefix}.{names.expert_prefix}.{i}.{names.expert[part]}.{suffix}"
            yield Planned(TensorSpec(name, shape[1:]), tensor, expert=i)
    elif part in EXPERT and expert:
        name = f"{prefix}.{names.expert_prefix}.{expert}.{names.expert[part]}.{suffix}"
        yield Planned(TensorSpec(name, shape), tensor)
    elif part in names.layer and not expert:
        yield Planned(
            TensorSpec(f"{prefix}.{names.layer[part]}.{suffix}", shape),
            tensor,
            interleaved_heads=names.heads.get(part, 0),
            offset=names.offset(tensor.name),
        )
    else:
        raise RefusedError(f"{file.path}: tensor {tensor.name} is of no supported model")


def _order(name: str) -> tuple[int, int, str]:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    if match:
        return 1, int(match[1]), name
    return (0 if name.startswith("model.embed") else 2), 0, name
