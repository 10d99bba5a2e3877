"""Model folders: what loads, what is refused, and what the fingerprint follows."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_models import (
    GOLDENS,
    MODELS,
    copy_folder,
    read_golden,
    read_safetensors,
    write_safetensors,
)
from kvasir_engine import _native
from kvasir_engine.config import parse_config, read_config
from kvasir_engine.logits import run_logits, sequence_logits
from kvasir_engine.memory import available_bytes, memory_need, weights_bytes
from kvasir_engine.model import choose_path, load_model
from kvasir_engine.weights import bf16_from_float32, float32_from_bf16
from kvasir_proto.errors import KvasirError, Reason
from step_builders import make_odd_model

NAME = "llama-gqa-tied"
ADOPTED: dict[str, Any] = json.loads((GOLDENS / NAME / "config.json").read_text())


def logits_of(folder: Path) -> np.ndarray:
    ids = read_golden(NAME).ids(5)
    return sequence_logits(load_model(folder, num_threads=1), ids, chunk=5)


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    tensors = change(read_safetensors(folder / "model.safetensors"))
    write_safetensors(folder / "model.safetensors", tensors)


def shard(folder: Path, num_shards: int) -> None:
    """Split model.safetensors as large models are."""
    tensors = read_safetensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for index in range(num_shards):
        name = f"model-{index + 1:05}-of-{num_shards:05}.safetensors"
        part = dict(list(tensors.items())[index::num_shards])
        write_safetensors(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_compute_what_the_single_file_computes(tmp_path: Path) -> None:
    folder = copy_folder(NAME, tmp_path / "model")
    expected = logits_of(folder)
    shard(folder, 3)
    assert np.array_equal(logits_of(folder), expected)


def test_weights_at_odd_addresses_compute_the_same(tmp_path: Path) -> None:
    folder = copy_folder(NAME, tmp_path / "model")
    expected = logits_of(folder)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip() + b" "
    header += b" " * (1 - len(header) % 2)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert np.array_equal(logits_of(folder), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["f32", "f16"])
def test_wider_weights_are_rounded_to_bf16(tmp_path: Path, dtype: type) -> None:
    folder = copy_folder(NAME, tmp_path / "model")

    def widen(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: float32_from_bf16(bits).astype(dtype) for name, bits in tensors.items()}

    def narrow(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: bf16_from_float32(values) for name, values in widen(tensors).items()}

    wide = copy_folder(NAME, tmp_path / "wide")
    rewrite(wide, widen)
    rewrite(folder, narrow)  # f16 has rounded away small weights: compare with the same
    assert np.array_equal(logits_of(wide), logits_of(folder))


def test_bf16_rounding_is_to_nearest_even_and_keeps_nan() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, 1.004, -0.0, np.inf, np.nan], np.float32)
    back = float32_from_bf16(bf16_from_float32(values))
    assert back[:6].tolist() == [1.0, 1.0, 1.015625, 1.0078125, -0.0, np.inf]
    assert np.isnan(back[6])


def test_older_rope_fields_mean_the_same(tmp_path: Path) -> None:
    new = read_config(GOLDENS / "llama3-rope-scaled")
    raw = json.loads((GOLDENS / "llama3-rope-scaled" / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = rope
    assert parse_config(raw) == new


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "gemma3n": {"model_type": "gemma3n"},
    "['LlamaForSequenceClassification']": {"architectures": ["LlamaForSequenceClassification"]},
    "['Qwen2ForCausalLM']": {"architectures": ["Qwen2ForCausalLM"]},
    "architectures": {"architectures": ["MambaForCausalLM"], "model_type": "mamba"},
    "no model_type": {"model_type": None},
    "gelu": {"hidden_act": "gelu"},
    "mlp_bias": {"mlp_bias": True},
    "use_sliding_window": {"use_sliding_window": True},
    "attention_bias": {"attention_bias": True, "model_type": "mistral", "architectures": None},
    "quantization_config": {"quantization_config": {"quant_method": "awq"}},
    "mrope": {"rope_parameters": {"rope_type": "mrope", "factor": 2.0}},
    "layer_types": {"layer_types": ["sliding_attention"]},
    "layer_types of no list": {"layer_types": 5},
    "layer_types nested": {"layer_types": [["full_attention"]]},
    "rope per layer": {"rope_parameters": {"full_attention": {"rope_theta": 5e5}}},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "head_dim 15": {"head_dim": 15},
}


@pytest.mark.parametrize("case", UNSUPPORTED, ids=str)
def test_unsupported_arithmetic_is_named(case: str) -> None:
    with pytest.raises(KvasirError) as caught:
        parse_config(ADOPTED | UNSUPPORTED[case])
    assert caught.value.reason is Reason.UNSUPPORTED
    (field, value) = next(iter(UNSUPPORTED[case].items()))
    assert field.removeprefix("rope_parameters") in caught.value.message or str(value) in str(
        caught.value
    )


MALFORMED: dict[str, dict[str, Any]] = {
    "hidden_size": {"hidden_size": "64"},
    "num_hidden_layers": {"num_hidden_layers": 0},
    "vocab_size": {"vocab_size": True},
    "vocab_size must be at most": {"vocab_size": 1 << 40},
    "tie_word_embeddings": {"tie_word_embeddings": "false"},
    "sliding_window": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": "64",
    },
    "architectures": {"architectures": "LlamaForCausalLM"},
    "needs an object text_config": {"model_type": "gemma3", "architectures": None},
    "num_hidden_layers must be at most": {"num_hidden_layers": 100_000},
    "head_dim must be at most": {"head_dim": 1 << 20},
    "num_local_experts must be at most": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 1 << 20,
        "num_experts_per_tok": 2,
    },
    "layer_types names 1 of 3": {"layer_types": ["full_attention"]},
    "use_sliding_window needs": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": True,
    },
    "long_factor must be a list of 8": {
        "original_max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "longrope", "long_factor": [1.0] * 7},
    },
    "lacks an object sliding_attention": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "sliding_window": 64,
        "rope_parameters": {"full_attention": {"rope_theta": 1e6}},
    },
    "rms_norm_eps": {"rms_norm_eps": float("nan")},
    "num_key_value_heads": {"num_key_value_heads": 3},
    "factor": {"rope_parameters": {"rope_type": "linear"}},
    "low_freq_factor": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 4.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
}


@pytest.mark.parametrize("field", MALFORMED, ids=str)
def test_malformed_field_is_named(field: str) -> None:
    with pytest.raises(KvasirError, match=field) as caught:
        parse_config(ADOPTED | MALFORMED[field])
    assert caught.value.reason is Reason.INVALID_REQUEST


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2])


def empty_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def huge_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def garbled_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:12] = b"\xff\xfe\x00{"
    path.write_bytes(data)


def bottomless_header(folder: Path) -> None:
    header = b"[" * 100_000
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def bottomless_config(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def missing_tensor(folder: Path) -> None:
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"})


def misshapen_tensor(folder: Path) -> None:
    rewrite(folder, lambda t: t | {"model.norm.weight": t["model.norm.weight"][:-1]})


def integer_tensor(folder: Path) -> None:
    rewrite(folder, lambda t: t | {"model.norm.weight": np.zeros(64, np.int8)})


def tensor_of_another_model(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(folder, lambda t: t | {name: np.zeros(64, np.uint16)})


def layer_beyond_the_last(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(ADOPTED | {"num_hidden_layers": 2}))


def missing_shard(folder: Path) -> None:
    shard(folder, 2)
    (folder / "model-00002-of-00002.safetensors").unlink()


def shard_outside(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../other/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def untied_without_head(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(ADOPTED | {"tie_word_embeddings": False}))


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


BROKEN: dict[Callable[[Path], None], str] = {
    no_weights: "holds neither",
    pickled_weights: "no safetensors weights",
    truncated: r"beyond the file's \d+ bytes: it is cut off",
    empty_file: "header length",
    huge_header: "header length",
    garbled_header: "not JSON",
    bottomless_header: "not JSON",
    bottomless_config: "not JSON",
    missing_tensor: r"lack the tensor model\.norm\.weight",
    misshapen_tensor: r"model\.norm\.weight has shape \[63\] .* \[64\]",
    integer_tensor: "is I8",
    tensor_of_another_model: r"self_attn\.q_proj\.bias has no place in a llama model",
    layer_beyond_the_last: r"model\.layers\.2\..* has no place",
    missing_shard: "lacks the shard",
    shard_outside: "outside its folder",
    untied_without_head: r"lack the tensor lm_head\.weight",
    broken_config: "not JSON",
    no_config: "lacks config.json",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_broken_folder_is_refused_with_its_reason(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = copy_folder(NAME, tmp_path / "model")
    damage(folder)
    with pytest.raises(KvasirError, match=BROKEN[damage]):
        load_model(folder, num_threads=1)


def test_absent_folder_is_an_unknown_model(tmp_path: Path) -> None:
    with pytest.raises(KvasirError, match="no model folder") as caught:
        load_model(tmp_path / "nothing", num_threads=1)
    assert caught.value.reason is Reason.UNKNOWN_MODEL


def test_fingerprint_follows_weights_and_arithmetic(tmp_path: Path) -> None:
    original = copy_folder(NAME, tmp_path / "original")
    other_eps = copy_folder(NAME, tmp_path / "eps", rms_norm_eps=1e-5)
    other_rope = copy_folder(NAME, tmp_path / "rope", rope_parameters={"rope_theta": 5e5})
    other_weight = copy_folder(NAME, tmp_path / "weight")
    data = bytearray((other_weight / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other_weight / "model.safetensors").write_bytes(data)
    folders = (original, other_eps, other_rope, other_weight)
    prints = [load_model(folder, num_threads=2).fingerprint for folder in folders]
    assert len(set(prints)) == 4
    again = load_model(copy_folder(NAME, tmp_path / "again"), num_threads=1)
    assert again.fingerprint == prints[0]


def test_scalar_path_shares_no_blocks_with_the_others() -> None:
    prints = {
        load_model(GOLDENS / NAME, isa=isa, num_threads=1).fingerprint
        for isa in ("scalar", _native.cpu_paths()[-1])
    }
    assert len(prints) == len({"scalar", _native.cpu_paths()[-1]})


def test_progress_reaches_the_end() -> None:
    seen: list[tuple[str, int, int]] = []
    load_model(GOLDENS / NAME, num_threads=1, progress=lambda *args: seen.append(args))
    assert {stage for stage, _, _ in seen} == {"digest", "pack"}
    assert seen[-1][1] <= seen[-1][2]


def test_error_in_progress_stops_the_load() -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "pack":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_model(GOLDENS / NAME, num_threads=2, progress=stop)


def test_path_comes_from_argument_then_environment_then_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("KVASIR_ISA", raising=False)
    assert choose_path() == _native.cpu_paths()[-1]
    monkeypatch.setenv("KVASIR_ISA", "scalar")
    assert choose_path() == "scalar"
    assert choose_path(_native.cpu_paths()[-1]) == _native.cpu_paths()[-1]
    monkeypatch.setenv("KVASIR_ISA", "sse9")
    with pytest.raises(KvasirError, match="unknown kernel path 'sse9'; there are: scalar"):
        choose_path()
    monkeypatch.setenv("KVASIR_ISA", "amx-model")
    for name in (None, "avx512bf16-model"):
        with pytest.raises(KvasirError, match="model of instructions, for tests; here run: scalar"):
            choose_path(name)


@pytest.mark.parametrize("name", [*MODELS, "odd"])
def test_weights_are_estimated_before_they_are_loaded(name: str, tmp_path: Path) -> None:
    folder = make_odd_model(tmp_path / "odd") if name == "odd" else GOLDENS / name
    model = load_model(folder, num_threads=1)
    estimate = weights_bytes(model.config)
    assert estimate <= model.weights_bytes <= estimate + (4 << 20)


def test_memory_need_adds_up_and_says_so() -> None:
    config = read_config(GOLDENS / NAME)
    need = memory_need(
        config, kv_cache_bytes=1 << 30, max_batch_tokens=512, max_running=8, num_threads=2
    )
    parts = need.weights_bytes + need.step_bytes + need.kv_bytes + need.process_bytes
    assert need.total_bytes == parts > 1 << 30
    assert "KV cache 1,024 MiB" in need.describe()
    assert available_bytes() > 1 << 20


def test_a_step_needs_room_for_inputs_as_products_take_them() -> None:
    """Of the widest product, beside what it makes: two bytes an element, and scales."""
    config = read_config(GOLDENS / NAME)

    def step_bytes(inner: int) -> int:
        wide = replace(config, intermediate_size=inner)
        need = memory_need(
            wide, kv_cache_bytes=0, max_batch_tokens=512, max_running=8, num_threads=2
        )
        return need.step_bytes

    assert step_bytes(9192) - step_bytes(8192) >= 512 * 1000 * (4 + 2.25)


@pytest.mark.parametrize("chunk", [None, 7])
def test_logits_command_writes_what_the_reference_holds(tmp_path: Path, chunk: int | None) -> None:
    golden = read_golden(NAME)
    np.save(tmp_path / "ids.npy", golden.ids(64).astype(np.int64))
    run_logits(golden.folder, tmp_path / "ids.npy", tmp_path / "out.npy", chunk)
    out = np.load(tmp_path / "out.npy")
    assert out.dtype == np.float32
    assert np.abs(out - golden.logits(64)).max() < 5e-2


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (np.zeros((2, 3), np.int64), "one row"),
        (np.zeros(3), "integers"),
        (np.zeros(0, np.int64), "no token ids"),
        (np.array([512]), "0..511"),
        (np.array([-1]), "0..511"),
    ],
    ids=["two rows", "floats", "empty", "too large", "negative"],
)
def test_logits_command_refuses_bad_ids(tmp_path: Path, ids: np.ndarray, text: str) -> None:
    np.save(tmp_path / "ids.npy", ids)
    with pytest.raises(KvasirError, match=text):
        run_logits(GOLDENS / NAME, tmp_path / "ids.npy", tmp_path / "out.npy")


def test_logits_command_refuses_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "ids.npy").write_text("1 2 3")
    with pytest.raises(KvasirError, match="not a readable"):
        run_logits(GOLDENS / NAME, tmp_path / "ids.npy", tmp_path / "out.npy")
