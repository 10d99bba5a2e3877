"""KV moved to another place is what that place would have given; layers can be computed apart."""

from typing import Any

import numpy as np
import pytest
from golden_models import GOLDENS, MODELS, RUNNABLE
from kvasir_engine.model import LoadedModel, load_model, new_kv_arrays
from step_builders import Part, run_step, step_arguments

IDS = np.arange(7, 107) % 500
NUM_BLOCKS = 12
TOLERANCE = {"bfloat16": 0.02, "float32": 2e-4, "int8": 0.05}
"""Of the largest element: the angle is rounded once more, and so is what is stored."""


def blocks(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def read(model: LoadedModel, layer: int, table: np.ndarray, first: int, count: int) -> np.ndarray:
    """[count, K|V, elements]."""
    width = model.config.num_kv_heads * model.config.head_width
    out = np.full((count, 2 * width), np.nan, np.float32)
    model.native.read_kv(layer=layer, blocks=table, first=first, out=out)
    return out.reshape(count, 2, width)


def move(model: LoadedModel, **changes: Any) -> None:
    arguments = {
        "source_blocks": blocks(0, 1, 2, 3),
        "source_first": 3,
        "target_blocks": blocks(8, 7, 6, 5, 4),
        "target_first": 45,
        "count": 90,
    }
    model.native.move_kv(**arguments | changes)


@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("name", MODELS)
def test_moved_kv_is_that_of_the_new_positions(name: str, isa: str, kv: Any) -> None:
    """In the first layer, whose K and V depend on nothing but the token and its position."""
    model = load_model(GOLDENS / name, num_threads=1, isa=isa, kv=kv)
    new_kv_arrays(model, NUM_BLOCKS)
    run_step(model, Part(IDS, 0, 100, (0, 1, 2, 3)))
    shifted = np.concatenate([np.zeros(42, IDS.dtype), IDS])
    run_step(model, Part(shifted, 0, 142, (8, 7, 6, 5, 4)))
    expected = read(model, 0, blocks(8, 7, 6, 5, 4), 45, 90)
    at_source = read(model, 0, blocks(0, 1, 2, 3), 3, 90)
    assert not np.allclose(expected[:, 0], at_source[:, 0], atol=0.1)
    move(model, target_blocks=blocks(9, 10, 11, 5, 4))
    moved = read(model, 0, blocks(9, 10, 11, 5, 4), 45, 90)
    bound = TOLERANCE[model.layout.dtype] * np.abs(expected).max()
    np.testing.assert_allclose(moved, expected, atol=bound)
    np.testing.assert_array_equal(moved[:, 1], at_source[:, 1])


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_kv_moved_to_its_own_position_keeps_every_bit(kv: Any) -> None:
    model = load_model(GOLDENS / "qwen3-qknorm", num_threads=2, kv=kv)
    arrays = new_kv_arrays(model, NUM_BLOCKS)
    run_step(model, Part(IDS, 0, 96, (0, 1, 2)))
    move(model, source_first=0, target_blocks=blocks(9, 8, 7), target_first=0, count=96)
    np.testing.assert_array_equal(arrays.data[[0, 1, 2]], arrays.data[[9, 8, 7]])


def test_tokens_around_the_target_stay() -> None:
    model = load_model(GOLDENS / "llama-gqa-tied", num_threads=1)
    new_kv_arrays(model, NUM_BLOCKS)
    run_step(model, Part(IDS, 0, 100, (0, 1, 2, 3)))
    before = [read(model, layer, blocks(8, 7), 0, 64) for layer in range(3)]
    move(model, source_first=5, target_blocks=blocks(8, 7), target_first=30, count=4)
    for layer, kept in enumerate(before):
        after = read(model, layer, blocks(8, 7), 0, 64)
        changed = np.flatnonzero((after != kept).any(axis=(1, 2)))
        assert changed.tolist() == [30, 31, 32, 33]


def test_first_layers_alone_leave_their_kv_and_that_of_the_next() -> None:
    model = load_model(GOLDENS / "llama-gqa-tied", num_threads=1)
    new_kv_arrays(model, NUM_BLOCKS)
    run_step(model, Part(IDS, 0, 96, (0, 1, 2)))
    step = step_arguments(model, Part(IDS, 0, 96, (3, 4, 5)))
    no_logits = {"output_rows": blocks(), "logits": np.empty((0, 512), np.float32)}
    model.native.forward(**step | no_logits, num_layers=1)
    for layer, is_there in enumerate([True, True, False]):
        whole, part = (
            read(model, layer, table, 0, 96) for table in (blocks(0, 1, 2), blocks(3, 4, 5))
        )
        assert np.array_equal(whole, part) == is_there


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"num_layers": 4}, "num_layers"),
        ({"num_layers": 1}, "logits"),
    ],
)
def test_bad_layers_are_refused(changes: dict[str, Any], what: str) -> None:
    model = load_model(GOLDENS / "llama-gqa-tied", num_threads=1)
    new_kv_arrays(model, NUM_BLOCKS)
    with pytest.raises(ValueError, match=what):
        model.native.forward(**step_arguments(model, Part(IDS, 0, 8, (0,))) | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"source_first": -1},
        {"target_first": -3},
        {"count": 0},
        {"source_first": 60},
        {"target_first": 100},
        {"source_blocks": blocks(0, 1, NUM_BLOCKS, 3)},
        {"target_blocks": blocks(8, -1, 6, 5, 4)},
    ],
)
def test_moves_outside_the_pool_are_refused(changes: dict[str, Any]) -> None:
    model = load_model(GOLDENS / "llama-gqa-tied", num_threads=1)
    new_kv_arrays(model, NUM_BLOCKS)
    with pytest.raises(ValueError, match=r"span|block"):
        move(model, **changes)


def test_reads_outside_model_and_pool_are_refused() -> None:
    model = load_model(GOLDENS / "llama-gqa-tied", num_threads=1)
    new_kv_arrays(model, NUM_BLOCKS)
    with pytest.raises(ValueError, match="layer"):
        read(model, 3, blocks(0), 0, 1)
    with pytest.raises(ValueError, match="span"):
        read(model, 0, blocks(0), 30, 3)
    with pytest.raises(ValueError, match="column"):
        model.native.read_kv(layer=0, blocks=blocks(0), first=0, out=np.empty((1, 3), np.float32))
