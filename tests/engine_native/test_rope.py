"""Rotary embeddings: fields of config.json that mean the same, contexts, and bad parameters."""

import math
from typing import Any

import numpy as np
import pytest
from family_models import FAMILIES, YARN
from kvasir_engine.config import parse_config
from kvasir_engine.rope import RopeContext, longest_context, make_rope
from kvasir_proto.errors import KvasirError

CONTEXT = RopeContext(theta=10000.0, rotary_dim=16, positions_max=4096)


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


SAME: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "gemma3",
        without(FAMILIES["gemma3"], "rope_theta", "rope_local_base_freq", "rope_scaling")
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }
        },
    ),
    "layer types": (
        "qwen2-upper-windows",
        FAMILIES["qwen2-upper-windows"]
        | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    ),
    "yarn": (
        "qwen2-yarn",
        without(FAMILIES["qwen2-yarn"], "rope_theta", "rope_scaling")
        | {"rope_parameters": YARN | {"rope_theta": 10000.0}},
    ),
    "su": (
        "phi3",
        FAMILIES["phi3"] | {"rope_scaling": FAMILIES["phi3"]["rope_scaling"] | {"type": "su"}},
    ),
    "part of a head": (
        "phi3",
        without(FAMILIES["phi3"], "rope_scaling", "partial_rotary_factor")
        | {"rope_parameters": FAMILIES["phi3"]["rope_scaling"] | {"partial_rotary_factor": 0.75}},
    ),
}


def test_windows_that_are_switched_off_do_not_count() -> None:
    config = FAMILIES["qwen2-upper-windows"] | {"use_sliding_window": False}
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    assert all(layer.window == 0 for layer in parse_config(config).layers)
    assert parse_config(config | {"layer_types": kinds}) == parse_config(config)


@pytest.mark.parametrize("case", SAME, ids=str)
def test_older_and_newer_fields_mean_the_same(case: str) -> None:
    family, config = SAME[case]
    assert parse_config(config) == parse_config(FAMILIES[family])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 2048),
        ({"max_position_embeddings": 40960}, 40960),
        ({"max_position_embeddings": 64, "rope_scaling": YARN}, 256),
        ({"max_position_embeddings": 512, "rope_scaling": YARN}, 512),
        ({"max_position_embeddings": 64, "rope_parameters": YARN}, 256),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 2.0}}, 64),
    ],
    ids=["nothing", "plain", "yarn", "yarn-within", "newer-field", "linear"],
)
def test_longest_context(config: dict[str, Any], expected: int) -> None:
    assert longest_context(config) == expected


def test_dynamic_scaling_is_plain_up_to_the_length_of_the_pretraining() -> None:
    plain = make_rope({}, CONTEXT)
    assert make_rope({"rope_type": "dynamic", "factor": 4.0}, CONTEXT) == plain
    beyond = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 1024}
    frequencies = np.array(make_rope(beyond, CONTEXT).inverse_frequencies)
    assert frequencies[0] == 1.0
    assert (frequencies[1:] < plain.inverse_frequencies[1:]).all()


def test_yarn_scales_attention_as_its_parameters_say() -> None:
    parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    assert make_rope(parameters, CONTEXT).scale == pytest.approx(0.1 * math.log(4) + 1)
    assert make_rope(parameters | {"attention_factor": 1.5}, CONTEXT).scale == 1.5
    both = parameters | {"mscale": 2.0, "mscale_all_dim": 1.0}
    expected = (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)
    assert make_rope(both, CONTEXT).scale == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"rope_type": "mrope"}, "rope_type 'mrope' is not supported"),
        ({"rope_type": ["yarn"]}, "rope_type"),
        ({"rope_type": "linear"}, "factor must be a positive number"),
        ({"rope_type": "dynamic", "factor": "2"}, "factor must be a positive number"),
        ({"rope_type": "longrope", "long_factor": [1] * 8}, "short_factor must be a list of 8"),
        ({"rope_type": "longrope", "short_factor": [0] * 8}, "short_factor must be a positive"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": -1}, "beta_fast"),
        ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1}, "rope_theta must be above 1"),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1},
            "original_max_position_embeddings must be above 1",
        ),
    ],
    ids=["unknown", "list", "no-factor", "text", "no-short", "zero", "negative", "base", "length"],
)
def test_bad_parameter_is_named(values: dict[str, Any], text: str) -> None:
    with pytest.raises(KvasirError, match=text):
        make_rope(values, CONTEXT)
