"""The CUDA device against the reference; emulated where there is no GPU."""

from pathlib import Path

import numpy as np
import pytest
from golden_models import GOLDENS, MODELS, read_golden
from kvasir_engine.logits import sequence_logits
from kvasir_engine.model import LoadedModel, load_model, new_kv_arrays
from kvasir_proto.errors import KvasirError
from step_builders import Part, make_odd_model, run_step, step_arguments

pytestmark = pytest.mark.timeout(600)
"""The first test compiles the device; a busy machine takes its time over that."""

LENGTH = 70
LONG = 150
"""More than two of the parts that the emulated device splits a context into."""


def load(folder: Path, isa: str = "cuda") -> LoadedModel:
    return load_model(folder, isa=isa, num_threads=2)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_odd_model(tmp_path_factory.mktemp("models") / "odd")


@pytest.mark.parametrize("name", MODELS)
def test_logits_match_the_reference(name: str) -> None:
    golden = read_golden(name)
    model = load(golden.folder)
    assert model.native.isa == "cuda"
    error = sequence_logits(model, golden.ids(64), chunk=50) - golden.logits(64)
    assert np.abs(error).max() <= 5e-2
    assert np.sqrt(np.mean(np.square(error))) <= (2e-2 if "moe" in name else 6e-3)


def test_sizes_that_fill_no_tile_match_the_scalar_path(odd: Path) -> None:
    ids = np.random.default_rng(3).integers(0, 333, LENGTH)
    error = sequence_logits(load(odd), ids, chunk=LENGTH)
    error -= sequence_logits(load(odd, "scalar"), ids, chunk=LENGTH)
    assert np.abs(error).max() <= 5e-2


@pytest.mark.parametrize("name", ["mixtral-moe", "qwen2-bias"])
def test_neither_chunks_nor_neighbours_show(name: str) -> None:
    model = load(GOLDENS / name)
    source = np.random.default_rng(3)
    ids, noise = (source.integers(0, 333, LENGTH).astype(np.int32) for _ in range(2))
    whole = sequence_logits(model, ids, chunk=LENGTH)
    assert np.array_equal(sequence_logits(model, ids, chunk=17), whole)
    new_kv_arrays(model, 12)
    mine, theirs = (9, 3, 11), (0, 1, 4)
    got = [run_step(model, Part(ids, 0, 40, mine), Part(noise, 0, 30, theirs))[0]]
    got.append(run_step(model, Part(noise, 30, 1, theirs), Part(ids, 40, 30, mine))[1])
    assert np.array_equal(np.concatenate(got), whole)


def test_parts_of_a_long_context_merge_alike_in_one_block_and_in_several(odd: Path) -> None:
    """One token alone splits its context over blocks; among many each block works on all of it."""
    model = load(odd)
    ids = np.random.default_rng(5).integers(0, 333, LONG).astype(np.int32)
    num_blocks = -(-LONG // 32)
    new_kv_arrays(model, 2 * num_blocks)
    table, other = tuple(range(num_blocks)), tuple(range(num_blocks, 2 * num_blocks))
    run_step(model, Part(ids, 0, LONG - 1, table))
    last = Part(ids, LONG - 1, 1, table)
    alone = run_step(model, last)[0]
    assert np.array_equal(run_step(model, last, Part(ids, 0, 60, other))[0], alone)


def test_blocks_leave_the_device_when_complete_and_enter_it_when_they_arrived(odd: Path) -> None:
    source, ids = load(odd), np.random.default_rng(7).integers(0, 333, LENGTH).astype(np.int32)
    arrays = new_kv_arrays(source, 4)
    step = step_arguments(source, Part(ids, 0, 64, (3, 1)))
    source.native.forward(**step | {"completes": np.array([3, 1], np.int32)})
    assert arrays.ready.tolist() == [0, 2, 0, 2]
    assert arrays.data[3].any()
    assert not arrays.data[0].any()
    expected = run_step(source, Part(ids, 64, 6, (3, 1, 0)))[0]

    target = load(odd)
    moved = new_kv_arrays(target, 4)
    moved.data[2], moved.data[0] = arrays.data[3], arrays.data[1]
    rest = step_arguments(target, Part(ids, 64, 6, (2, 0, 1)))
    target.native.forward(**rest | {"arrived": np.array([2, 0], np.int32)})
    assert np.array_equal(rest["logits"], expected)


def test_blocks_mean_the_same_on_the_processor(odd: Path) -> None:
    """A prefill on one kind of worker serves a decode on the other."""
    ids = np.random.default_rng(8).integers(0, 333, LENGTH).astype(np.int32)
    device, host = load(odd), load(odd, "avx2")
    assert device.fingerprint == host.fingerprint
    arrays, there = new_kv_arrays(device, 3), new_kv_arrays(host, 3)
    step = step_arguments(device, Part(ids, 0, 64, (0, 1)))
    device.native.forward(**step | {"completes": np.array([0, 1], np.int32)})
    there.data[:2] = arrays.data[:2]
    got = run_step(host, Part(ids, 64, 6, (0, 1, 2)))[0]
    assert np.abs(got - sequence_logits(host, ids, chunk=LENGTH)[64:]).max() <= 5e-2


def test_a_missing_library_is_named(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVASIR_CUDA_LIBRARY", "/nowhere/libkvasir_cuda.so")
    with pytest.raises(KvasirError, match="make cuda"):
        load(odd)


def test_kv_in_int8_is_refused(odd: Path) -> None:
    with pytest.raises(KvasirError, match="KV in bf16"):
        load_model(odd, isa="cuda", kv="int8", num_threads=1)
