"""What a model is, read from a Hugging Face folder's config.json.

Decides which models this engine computes, by `model_type` and `architectures`, and what each
family leaves out of its config.json. Invariant: a ModelConfig that exists is computed exactly;
whatever would need other arithmetic is refused by name. Weights are left to `weights`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvasir_proto.errors import KvasirError, Reason

from kvasir_engine.decoder import LayerConfig, ModelConfig
from kvasir_engine.fields import boolean, integer, malformed, number, unsupported
from kvasir_engine.multimodal import text_part
from kvasir_engine.rope import Rope, RopeContext, longest_context, make_rope, rope_type

FULL, SLIDING = "full_attention", "sliding_attention"
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
LAYERS_MAX, EXPERTS_MAX, HEAD_DIM_MAX = 4096, 4096, 4096
"""Far beyond any model: what a broken file may make the reader allocate."""


@dataclass(frozen=True, slots=True)
class Family:
    """What a model_type implies; the defaults are those of its Hugging Face class."""

    architecture: str
    eps: float = 1e-6
    theta: float = 10000.0
    head_dim: int = 0
    """0: hidden_size / num_attention_heads."""
    windows: str = "none"
    """Which layers slide where `layer_types` does not say: none, all, upper, or pattern."""
    pattern: int = 0
    """Of so many layers in turn the last sees everything, the others slide."""
    bias: str = "none"
    """Of attention: none, qkv, or field (`attention_bias`, on all four projections)."""
    experts_field: str = ""
    has_qk_norm: bool = False
    is_gemma: bool = False
    has_partial_rotary: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM", bias="field"),
    "mistral": Family("MistralForCausalLM", windows="all"),
    "mixtral": Family(
        "MixtralForCausalLM", 1e-5, 1e6, windows="all", experts_field="num_local_experts"
    ),
    "qwen2": Family("Qwen2ForCausalLM", windows="upper", bias="qkv"),
    "qwen3": Family(
        "Qwen3ForCausalLM", head_dim=128, windows="upper", bias="field", has_qk_norm=True
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", bias="field", experts_field="num_experts", has_qk_norm=True
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        head_dim=256,
        windows="pattern",
        pattern=2,
        bias="field",
        is_gemma=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        theta=1e6,
        head_dim=256,
        windows="pattern",
        pattern=6,
        bias="field",
        has_qk_norm=True,
        is_gemma=True,
    ),
    "phi3": Family("Phi3ForCausalLM", 1e-5, windows="all", has_partial_rotary=True),
}


def read_config(model_dir: Path | str) -> ModelConfig:
    """The model in `model_dir`. Raises KvasirError that says what is missing or unsupported."""
    path = Path(model_dir) / "config.json"
    if not Path(model_dir).is_dir():
        raise KvasirError(Reason.UNKNOWN_MODEL, f"no model folder at {model_dir}", param="model")
    if not path.is_file():
        raise malformed(f"{model_dir} is no Hugging Face model folder: it lacks config.json")
    try:
        raw = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise malformed(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise malformed(f"{path} holds no JSON object")
    return parse_config(raw)


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig from config.json's object. Raises KvasirError that names the field."""
    raw = text_part(raw)
    family = _family(raw)
    _refuse_other_arithmetic(raw, family)
    num_layers = integer(raw, "num_hidden_layers", most=LAYERS_MAX)
    hidden_size, num_heads = integer(raw, "hidden_size"), integer(raw, "num_attention_heads")
    usual = family.head_dim or hidden_size // num_heads
    head_dim = integer(raw, "head_dim", default=usual, most=HEAD_DIM_MAX)
    ropes, rope_of = _ropes(raw, family, head_dim)
    kinds = _layer_kinds(raw, family, num_layers)
    window, sparse = _window(raw, family), _sparse_layers(raw, family, num_layers)
    has_bias = family.bias == "field" and boolean(raw, "attention_bias")
    config = ModelConfig(
        model_type=str(raw["model_type"]),
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=integer(raw, "num_key_value_heads", default=num_heads),
        head_dim=head_dim,
        intermediate_size=integer(raw, "intermediate_size"),
        vocab_size=integer(raw, "vocab_size"),
        max_position=longest_context(raw),
        rms_norm_eps=number(raw, "rms_norm_eps", default=family.eps),
        ropes=ropes,
        layers=tuple(
            LayerConfig(window if kind == SLIDING else 0, rope_of[kind], index in sparse)
            for index, kind in enumerate(kinds)
        ),
        query_scale=_query_scale(raw, family, head_dim),
        activation=_activation(raw, family),
        has_tied_embeddings=boolean(raw, "tie_word_embeddings", default=family.is_gemma),
        has_qkv_bias=has_bias or family.bias == "qkv",
        has_output_bias=has_bias,
        has_qk_norm=family.has_qk_norm,
        **_expert_fields(raw, family),
        **(_gemma_fields(raw, hidden_size) if family.is_gemma else {}),
    )
    _check_sizes(config)
    return config


def _family(raw: Mapping[str, Any]) -> Family:
    """The family that model_type and architectures name."""
    model_type, names = raw.get("model_type"), raw.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise malformed(f"config.json: architectures must be a list of names, not {names!r}")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    known = ", ".join(FAMILIES)
    if family is None:
        raise unsupported(
            f"model_type {model_type!r} (architectures {names!r}) is not supported; "
            f"there are: {known}"
        )
    if names and names != [family.architecture]:
        raise unsupported(
            f"architectures {names!r} is not supported: a {model_type} model is computed as "
            f"{family.architecture}"
        )
    return family


def _refuse_other_arithmetic(raw: Mapping[str, Any], family: Family) -> None:
    """Raise for fields whose values ask for arithmetic that this engine does not have."""
    if boolean(raw, "mlp_bias"):
        raise unsupported("mlp_bias is not supported")
    if raw.get("quantization_config"):
        raise unsupported("quantization_config is not supported: weights must be bf16, f16 or f32")
    if family.windows != "upper" and boolean(raw, "use_sliding_window"):
        raise unsupported(f"use_sliding_window of a {raw['model_type']} model is not supported")
    if family.bias == "none" and raw.get("attention_bias"):
        raise unsupported(f"attention_bias of a {raw['model_type']} model is not supported")
    if boolean(raw, "use_bidirectional_attention"):
        raise unsupported("use_bidirectional_attention is not supported")


def _activation(raw: Mapping[str, Any], family: Family) -> str:
    if family.is_gemma:  # its older field hidden_act was never meant
        name = raw.get("hidden_activation") or "gelu_pytorch_tanh"
    else:
        name = raw.get("hidden_act") or "silu"
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise unsupported(f"hidden_act {name!r} is not supported, only {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


# ---- layers --------------------------------------------------------------------------------------


def _window(raw: Mapping[str, Any], family: Family) -> int:
    """Tokens that a sliding layer sees; 0 where the longest context fits into it."""
    is_off = family.windows == "upper" and not boolean(raw, "use_sliding_window")
    if is_off or raw.get("sliding_window") is None:
        return 0
    window = integer(raw, "sliding_window")
    return 0 if window >= longest_context(raw) else window


def _layer_kinds(raw: Mapping[str, Any], family: Family, num_layers: int) -> list[str]:
    """full_attention or sliding_attention for each layer."""
    kinds = raw.get("layer_types")
    if kinds is None:
        return _usual_kinds(raw, family, num_layers)
    known = (FULL,) if family.windows == "none" else (FULL, SLIDING)
    if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
        raise unsupported(f"layer_types {kinds!r} is not supported, only {' and '.join(known)}")
    if len(kinds) != num_layers:
        raise malformed(f"config.json: layer_types names {len(kinds)} of {num_layers} layers")
    if SLIDING in kinds and raw.get("sliding_window") is None:
        raise malformed("config.json: layer_types has sliding_attention without sliding_window")
    return kinds


def _usual_kinds(raw: Mapping[str, Any], family: Family, num_layers: int) -> list[str]:
    """What the family's class takes where config.json has no layer_types."""
    slides = range(0)
    if raw.get("sliding_window") is not None and family.windows == "all":
        slides = range(num_layers)
    if family.windows == "upper" and boolean(raw, "use_sliding_window"):
        slides = range(integer(raw, "max_window_layers", default=28), num_layers)
        if raw.get("sliding_window") is None:
            raise malformed("config.json: use_sliding_window needs sliding_window")
    if family.windows == "pattern":
        integer(raw, "sliding_window")
        every = integer(raw, "sliding_window_pattern", default=family.pattern)
        return [FULL if (index + 1) % every == 0 else SLIDING for index in range(num_layers)]
    return [SLIDING if index in slides else FULL for index in range(num_layers)]


def _sparse_layers(raw: Mapping[str, Any], family: Family, num_layers: int) -> frozenset[int]:
    """The layers with a mixture of experts."""
    if not family.experts_field:
        return frozenset()
    dense = raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(index) is int for index in dense):
        raise malformed(f"config.json: mlp_only_layers must be a list of layers, not {dense!r}")
    step = integer(raw, "decoder_sparse_step", default=1)
    return frozenset(
        index for index in range(num_layers) if index not in dense and (index + 1) % step == 0
    )


# ---- parts that differ between families ----------------------------------------------------------


def _expert_fields(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    if not family.experts_field:
        return {}
    is_mixtral = raw["model_type"] == "mixtral"
    size = "intermediate_size" if is_mixtral else "moe_intermediate_size"
    return {
        "num_experts": integer(raw, family.experts_field, most=EXPERTS_MAX),
        "num_experts_per_token": integer(raw, "num_experts_per_tok"),
        "expert_size": integer(raw, size),
        "has_scaled_experts": is_mixtral or boolean(raw, "norm_topk_prob"),
    }


def _query_scale(raw: Mapping[str, Any], family: Family, head_dim: int) -> float:
    if family.is_gemma:
        return float(number(raw, "query_pre_attn_scalar", default=256.0) ** -0.5)
    return float(head_dim**-0.5)


def _gemma_fields(raw: Mapping[str, Any], hidden_size: int) -> dict[str, Any]:
    def cap(name: str) -> float:
        return 0.0 if raw.get(name) is None else number(raw, name)

    return {
        "norm_offset": 1.0,
        "embedding_scale": hidden_size**0.5,
        "score_cap": cap("attn_logit_softcapping"),
        "logit_cap": cap("final_logit_softcapping"),
        "has_post_norms": True,
    }


def _ropes(
    raw: Mapping[str, Any], family: Family, head_dim: int
) -> tuple[tuple[Rope, ...], dict[str, int]]:
    """The rotary embeddings, and which of them each kind of layer uses."""
    values = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(values, Mapping):
        raise malformed("rope_parameters is no object in config.json")
    context = RopeContext(
        theta=number(raw, "rope_theta", default=family.theta),
        rotary_dim=_rotary_dim(raw, values, family, head_dim),
        positions_max=longest_context(raw),
        original_positions=_optional(raw, "original_max_position_embeddings"),
    )
    is_by_kind = any(isinstance(value, Mapping) for value in values.values())
    if raw["model_type"] != "gemma3_text":
        if is_by_kind:
            raise unsupported("rope_parameters that differ between layers are not supported")
        if raw["model_type"] == "phi3" and rope_type(values) in ("su", "yarn"):
            values = {**values, "rope_type": "longrope"}  # what early Phi-3 files call it
        return (make_rope(values, context),), {FULL: 0, SLIDING: 0}
    by_kind: Mapping[str, Any] = values
    if not is_by_kind:
        local = {"rope_theta": number(raw, "rope_local_base_freq", default=10000.0)}
        by_kind = {FULL: values, SLIDING: local}
    for name in (FULL, SLIDING):
        if not isinstance(by_kind.get(name), Mapping):
            raise malformed(f"config.json: rope_parameters lacks an object {name}")
    ropes = tuple(make_rope(by_kind[name], context) for name in (FULL, SLIDING))
    return ropes, {FULL: 0, SLIDING: 1}


def _optional(raw: Mapping[str, Any], name: str) -> int | None:
    return None if raw.get(name) is None else integer(raw, name)


def _rotary_dim(
    raw: Mapping[str, Any], values: Mapping[str, Any], family: Family, head_dim: int
) -> int:
    """Elements of a head that rotate."""
    source = values if values.get("partial_rotary_factor") is not None else raw
    part = number(source, "partial_rotary_factor", default=1.0)
    if part != 1.0 and not family.has_partial_rotary:
        raise unsupported(f"partial_rotary_factor of a {raw['model_type']} model is not supported")
    rotary_dim = int(head_dim * part)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise unsupported(
            f"head_dim {head_dim} with partial_rotary_factor {part} is not supported: "
            f"{rotary_dim} elements cannot rotate in pairs"
        )
    return rotary_dim


def _check_sizes(config: ModelConfig) -> None:
    """Raise for sizes that contradict one another."""
    if config.num_heads % config.num_kv_heads:
        raise malformed("num_attention_heads is no multiple of num_key_value_heads")
    if config.num_experts_per_token > config.num_experts:
        raise malformed("num_experts_per_tok exceeds the number of experts")
