"""Which tensors a model's files must hold, and how the native part calls them.

Decides from headers alone, before any weight is read, whether a folder's files fit its
config.json: a tensor that is missing, misshapen or of no known use is refused by name. The native
part knows one set of names, that of Llama and Qwen3-MoE; fused projections are cut into views.
"""

import re
from collections.abc import Mapping

import numpy as np

from kvasir_engine.decoder import ModelConfig
from kvasir_engine.fields import malformed, unsupported

Shape = tuple[int, ...]

UNUSED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Tensors of a layer that older files hold and nobody reads."""
MIXTRAL_EXPERT = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
MIXTRAL_NAME = re.compile(r"(model\.layers\.\d+)\.block_sparse_moe\.(?:experts\.(\d+)\.(w\d)|gate)")


def check_tensors(config: ModelConfig, shapes: Mapping[str, Shape]) -> None:
    """Raise KvasirError that names a tensor which does not fit the model."""
    wanted = tensor_shapes(config)
    for name, shape in wanted.items():
        if name not in shapes:
            raise malformed(f"weights lack the tensor {name}")
        if shapes[name] != shape:
            raise malformed(
                f"tensor {name} has shape {list(shapes[name])} where config.json implies "
                f"{list(shape)}"
            )
    for name in shapes:
        if name.startswith("model.layers.") and name not in wanted and not UNUSED.fullmatch(name):
            raise unsupported(
                f"tensor {name} has no place in a {config.model_type} model of this config.json"
            )


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor that the model is computed from, as its family's files name them."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index, layer in enumerate(config.layers):
        parts = _norms(config) | _attention(config)
        parts |= _experts(config) if layer.is_sparse else _dense(config)
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in parts.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.has_tied_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def native_tensors(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under the native part's names; views, no copies."""
    if config.model_type == "phi3":
        return _split_fused(config, tensors)
    if config.model_type == "mixtral":
        return {_unmixed(name): values for name, values in tensors.items()}
    return dict(tensors)


def _norms(config: ModelConfig) -> dict[str, Shape]:
    names = ["input_layernorm", "post_attention_layernorm"]
    if config.has_post_norms:
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    return {f"{name}.weight": (config.hidden_size,) for name in names}


def _attention(config: ModelConfig) -> dict[str, Shape]:
    hidden, head_dim = config.hidden_size, config.head_dim
    query, key = config.num_heads * head_dim, config.num_kv_heads * head_dim
    shapes: dict[str, Shape] = {"self_attn.o_proj.weight": (hidden, query)}
    if config.model_type == "phi3":
        return shapes | {"self_attn.qkv_proj.weight": (query + 2 * key, hidden)}
    for name, rows in (("q", query), ("k", key), ("v", key)):
        shapes[f"self_attn.{name}_proj.weight"] = (rows, hidden)
        if config.has_qkv_bias:
            shapes[f"self_attn.{name}_proj.bias"] = (rows,)
    if config.has_output_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if config.has_qk_norm:
        shapes |= {f"self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
    return shapes


def _dense(config: ModelConfig) -> dict[str, Shape]:
    hidden, inner = config.hidden_size, config.intermediate_size
    down: dict[str, Shape] = {"mlp.down_proj.weight": (hidden, inner)}
    if config.model_type == "phi3":
        return down | {"mlp.gate_up_proj.weight": (2 * inner, hidden)}
    return down | {f"mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}


def _experts(config: ModelConfig) -> dict[str, Shape]:
    hidden, inner = config.hidden_size, config.expert_size
    is_mixtral = config.model_type == "mixtral"
    prefix = "block_sparse_moe." if is_mixtral else "mlp."
    names = MIXTRAL_EXPERT if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    shapes: dict[str, Shape] = {f"{prefix}gate.weight": (config.num_experts, hidden)}
    for expert in range(config.num_experts):
        for name in names:
            is_down = name in ("w2", "down_proj")
            shape = (hidden, inner) if is_down else (inner, hidden)
            shapes[f"{prefix}experts.{expert}.{name}.weight"] = shape
    return shapes


def _unmixed(name: str) -> str:
    """Mixtral's name of a tensor in the native part's words."""
    match = MIXTRAL_NAME.match(name)
    if match is None:
        return name
    layer, expert, part = match.groups()
    if expert is None:
        return f"{layer}.mlp.gate.weight"
    return f"{layer}.mlp.experts.{expert}.{MIXTRAL_EXPERT[part]}.weight"


def _split_fused(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Phi-3's qkv_proj and gate_up_proj as their parts."""
    query = config.num_heads * config.head_dim
    key = query + config.num_kv_heads * config.head_dim
    split: dict[str, np.ndarray] = {}
    for name, values in tensors.items():
        if name.endswith(".qkv_proj.weight"):
            parts = zip("qkv", np.split(values, [query, key]), strict=True)
            split |= {name.replace("qkv_proj", f"{part}_proj"): rows for part, rows in parts}
        elif name.endswith(".gate_up_proj.weight"):
            gate, up = np.split(values, 2)
            split[name.replace("gate_up_proj", "gate_proj")] = gate
            split[name.replace("gate_up_proj", "up_proj")] = up
        else:
            split[name] = values
    return split
