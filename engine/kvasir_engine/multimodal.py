"""The language model inside a folder that holds more: Gemma 3 with its image encoder.

Decides which part of config.json and which tensors are the text model's. Images are never read;
what is left is computed as the text model alone.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from kvasir_engine.fields import malformed, unsupported

T = TypeVar("T")

MODEL_TYPE, ARCHITECTURE = "gemma3", "Gemma3ForConditionalGeneration"
TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
"""What such a folder's text_config leaves out: the values of its Hugging Face class."""
TEXT_PREFIXES = {"language_model.": "", "model.language_model.": "model."}
"""Older and newer names of the text model's tensors, and what takes their place."""
OTHER_PREFIXES = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)


def text_part(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's config.json; `raw` itself where there is nothing else."""
    if raw.get("model_type") != MODEL_TYPE:
        return raw
    names, part = raw.get("architectures") or [ARCHITECTURE], raw.get("text_config")
    if names != [ARCHITECTURE]:
        raise unsupported(f"architectures {names!r} is not supported for model_type {MODEL_TYPE!r}")
    if not isinstance(part, Mapping):
        raise malformed(f"config.json: model_type {MODEL_TYPE!r} needs an object text_config")
    shared = {name: raw[name] for name in ("eos_token_id", "bos_token_id") if name in raw}
    own = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    return {**TEXT_DEFAULTS, **shared, **part, **own}


def text_tensors(tensors: Mapping[str, T]) -> dict[str, T]:
    """The text model's tensors alone, under the names that a text model's files have."""
    return {
        _text_name(name): tensor
        for name, tensor in tensors.items()
        if not name.startswith(OTHER_PREFIXES)
    }


def _text_name(name: str) -> str:
    for prefix, place in TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return place + name.removeprefix(prefix)
    return name
