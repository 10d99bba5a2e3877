"""Steps of a mixed batch and small random models, for tests of the native forward pass."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from golden_models import write_safetensors
from kvasir_engine.model import LoadedModel
from kvasir_engine.weights import bf16_from_float32

BLOCK = 32


@dataclass(frozen=True, slots=True)
class Part:
    """What one sequence contributes to a step: tokens [start, start + count) of `ids`."""

    ids: np.ndarray
    start: int
    count: int
    blocks: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + self.count


def step_arguments(model: LoadedModel, *parts: Part) -> dict[str, Any]:
    """Arguments of `forward` for a step of these parts, logits of every row wanted."""
    width = max(len(part.blocks) for part in parts)
    tables = np.full((len(parts), width), -1, np.int32)
    for row, part in zip(tables, parts, strict=True):
        row[: len(part.blocks)] = part.blocks
    total = sum(part.count for part in parts)
    return {
        "token_ids": np.concatenate([p.ids[p.start : p.end] for p in parts]).astype(np.int32),
        "positions": np.concatenate([np.arange(p.start, p.end, dtype=np.int32) for p in parts]),
        "seq_token_counts": np.array([p.count for p in parts], np.int32),
        "block_tables": tables,
        "output_rows": np.arange(total, dtype=np.int32),
        "logits": np.full((total, model.config.vocab_size), np.nan, np.float32),
        "completes": np.empty(0, np.int32),
        "arrived": np.empty(0, np.int32),
    }


def run_step(model: LoadedModel, *parts: Part) -> list[np.ndarray]:
    """Logits of every token, one array per part."""
    arguments = step_arguments(model, *parts)
    model.native.forward(**arguments)
    splits = np.cumsum([part.count for part in parts])[:-1]
    return np.split(arguments["logits"], splits)


ODD_CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 96,
    "intermediate_size": 1072,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "vocab_size": 333,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": True,
}
"""Sizes that fill no panel and no register tile, and sums longer than one piece of a panel."""


def make_odd_model(folder: Path) -> Path:
    """A random model of ODD_CONFIG."""
    source = np.random.default_rng(11)
    c = ODD_CONFIG
    hidden, inner, head = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q_size, kv_size = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c["vocab_size"], hidden),
        "lm_head.weight": (c["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(c["num_hidden_layers"]):
        attention = f"model.layers.{layer}.self_attn."
        for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
            shapes[f"{attention}{name}_proj.weight"] = (size, hidden)
            shapes[f"{attention}{name}_proj.bias"] = (size,)
        shapes[f"{attention}o_proj.weight"] = (hidden, q_size)
        shapes[f"{attention}o_proj.bias"] = (hidden,)
        shapes[f"{attention}q_norm.weight"] = shapes[f"{attention}k_norm.weight"] = (head,)
        mlp = f"model.layers.{layer}.mlp."
        shapes[f"{mlp}gate_proj.weight"] = shapes[f"{mlp}up_proj.weight"] = (inner, hidden)
        shapes[f"{mlp}down_proj.weight"] = (hidden, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (hidden,)
    tensors = {}
    for name, shape in shapes.items():
        values = source.standard_normal(shape, dtype=np.float32) * 0.08
        tensors[name] = bf16_from_float32(values + 1 if "norm" in name else values)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(ODD_CONFIG))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder
