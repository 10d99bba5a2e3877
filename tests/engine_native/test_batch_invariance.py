"""A token's logits are bitwise the same whatever shares its step, and however its context came."""

from pathlib import Path

import numpy as np
import pytest
from golden_models import GOLDENS, PATHS, RUNNABLE
from kvasir_engine.logits import sequence_logits
from kvasir_engine.model import LoadedModel, load_model, new_kv_arrays
from step_builders import Part, make_odd_model, run_step

NAMES = ("odd", "mixtral-moe", "qwen2-bias")
LENGTH = 200


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    odd = make_odd_model(tmp_path_factory.mktemp("models") / "odd")
    return {"odd": odd} | {name: GOLDENS / name for name in NAMES[1:]}


@pytest.fixture(scope="module", params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    if request.param not in RUNNABLE:
        pytest.skip(f"KERNEL PATH {request.param} DOES NOT RUN ON THIS PROCESSOR")
    return str(request.param)


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, path: str, folders: dict[str, Path]) -> LoadedModel:
    return load_model(folders[request.param], isa=path, num_threads=2)


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 333, LENGTH).astype(np.int32)


@pytest.fixture(scope="module")
def whole(model: LoadedModel, ids: np.ndarray) -> np.ndarray:
    return sequence_logits(model, ids, chunk=LENGTH)


@pytest.mark.parametrize("chunk", [1, 7, 32, 131])
def test_chunk_size_does_not_show(
    model: LoadedModel, ids: np.ndarray, whole: np.ndarray, chunk: int
) -> None:
    assert np.array_equal(sequence_logits(model, ids, chunk=chunk), whole)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_thread_count_does_not_show(
    folders: dict[str, Path],
    path: str,
    ids: np.ndarray,
    num_threads: int,
) -> None:
    for folder in folders.values():
        expected = sequence_logits(load_model(folder, isa=path, num_threads=2), ids, chunk=LENGTH)
        other = load_model(folder, isa=path, num_threads=num_threads)
        assert np.array_equal(sequence_logits(other, ids, chunk=LENGTH), expected)


def test_other_sequences_in_the_step_do_not_show(
    model: LoadedModel, ids: np.ndarray, whole: np.ndarray
) -> None:
    new_kv_arrays(model, 40)
    noise = np.random.default_rng(4).integers(0, 333, 120).astype(np.int32)
    mine, theirs = (9, 3, 30, 11, 2, 25, 17), (0, 1, 4, 5)
    neighbours = [
        Part(noise, 0, 40, theirs),
        Part(noise, 40, 1, theirs),
        Part(noise, 41, 70, theirs),
    ]
    got = [run_step(model, Part(ids, 0, 50, mine), neighbours[0])[0]]
    got.append(run_step(model, neighbours[1], Part(ids, 50, 1, mine))[1])
    got.append(run_step(model, neighbours[2], Part(ids, 51, 149, mine), Part(noise, 0, 9, (7,)))[1])
    assert np.array_equal(np.concatenate(got), whole)


def test_large_decode_batch_equals_single_sequences(model: LoadedModel, ids: np.ndarray) -> None:
    new_kv_arrays(model, 80)
    lengths = list(range(3, 3 + 37))
    parts = [Part(np.roll(ids, i), 0, n, (2 * i, 2 * i + 1)) for i, n in enumerate(lengths)]
    alone = []
    for part in parts:
        run_step(model, part)
        alone.append(run_step(model, Part(part.ids, part.count, 1, part.blocks))[0])
    batch = run_step(model, *[Part(part.ids, part.count, 1, part.blocks) for part in parts])
    assert np.array_equal(np.concatenate(batch), np.concatenate(alone))


def test_prefix_computed_by_another_sequence_does_not_show(
    model: LoadedModel, ids: np.ndarray, whole: np.ndarray
) -> None:
    new_kv_arrays(model, 16)
    other = np.concatenate([ids[:64], np.flip(ids[64:])]).astype(np.int32)
    run_step(model, Part(other, 0, 100, (0, 1, 2, 3)))
    (suffix,) = run_step(model, Part(ids, 64, LENGTH - 64, (0, 1, 4, 5, 6, 7, 8)))
    assert np.array_equal(suffix, whole[64:])


def test_what_a_block_held_before_does_not_show(
    model: LoadedModel, ids: np.ndarray, whole: np.ndarray
) -> None:
    arrays = new_kv_arrays(model, 7)
    arrays.data[:] = 0xFF  # NaN in both element types
    (logits,) = run_step(model, Part(ids, 0, LENGTH, tuple(range(7))))
    assert np.array_equal(logits, whole)


def test_fast_paths_stay_near_the_scalar_path(
    folders: dict[str, Path], path: str, ids: np.ndarray
) -> None:
    scalar = sequence_logits(
        load_model(folders["odd"], isa="scalar", num_threads=1), ids, chunk=LENGTH
    )
    fast = sequence_logits(load_model(folders["odd"], isa=path, num_threads=2), ids, chunk=LENGTH)
    assert np.abs(fast - scalar).max() < 0.05 * np.abs(scalar).max()
