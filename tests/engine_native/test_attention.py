"""Attention over long contexts and over int8 KV: numbers do not depend on how a context is cut."""

from pathlib import Path

import numpy as np
import pytest
from family_models import make_family_model
from golden_models import PATHS, RUNNABLE
from kvasir_engine.formats import KvFormat
from kvasir_engine.logits import sequence_logits
from kvasir_engine.model import (
    INT8_KV_HEAD_DIM_MAX,
    LoadedModel,
    load_model,
    new_kv_arrays,
)
from kvasir_proto.errors import KvasirError
from step_builders import Part, make_odd_model, run_step

LENGTH = 600
"""Three segments of the context, the last in part."""
KV_FORMATS: tuple[KvFormat, ...] = ("bf16", "int8")
MODELS = {
    "odd": {},
    "mistral": {"sliding_window": 300, "max_position_embeddings": 4096},
    "gemma2": {"max_position_embeddings": 4096, "num_key_value_heads": 1},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("attention")
    families = {n: make_family_model(n, root / n, **c) for n, c in MODELS.items() if c}
    return families | {"odd": make_odd_model(root / "odd")}


@pytest.fixture(scope="module", params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    if request.param not in RUNNABLE:
        pytest.skip(f"KERNEL PATH {request.param} DOES NOT RUN ON THIS PROCESSOR")
    return str(request.param)


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 96, LENGTH).astype(np.int32)


def decoded(model: LoadedModel, ids: np.ndarray, starts: tuple[int, ...]) -> list[np.ndarray]:
    """Logits of single tokens after prefixes of the sequence, each alone in its step."""
    num_blocks = LENGTH // 32 + 1
    new_kv_arrays(model, num_blocks)
    blocks = tuple(range(num_blocks))
    run_step(model, Part(ids, 0, LENGTH, blocks))
    return [run_step(model, Part(ids, start, 1, blocks))[0][0] for start in starts]


@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_chunks_and_splits_of_a_long_context_do_not_show(
    name: str, kv: KvFormat, path: str, folders: dict[str, Path], ids: np.ndarray
) -> None:
    model = load_model(folders[name], isa=path, kv=kv, num_threads=1)
    whole = sequence_logits(model, ids, chunk=LENGTH)
    for chunk in (49, 257):
        assert np.array_equal(sequence_logits(model, ids, chunk=chunk), whole), chunk
    starts = (0, 31, 255, 256, 511, 512, 599)
    for num_threads in (1, 4):  # several threads split the context of a lone token
        model = load_model(folders[name], isa=path, kv=kv, num_threads=num_threads)
        assert np.array_equal(decoded(model, ids, starts), whole[list(starts)]), num_threads


@pytest.mark.parametrize("name", MODELS)
def test_int8_kv_means_the_same_on_every_path(
    name: str, path: str, folders: dict[str, Path], ids: np.ndarray
) -> None:
    reference = load_model(folders[name], isa="scalar", kv="int8", num_threads=2)
    model = load_model(folders[name], isa=path, kv="int8", num_threads=2)
    expected = sequence_logits(reference, ids, chunk=LENGTH)
    error = sequence_logits(model, ids, chunk=LENGTH) - expected
    assert np.sqrt(np.mean(np.square(error))) < 0.01 * expected.std()


@pytest.mark.parametrize("name", MODELS)
def test_int8_kv_is_near_kv_of_full_width(
    name: str, folders: dict[str, Path], ids: np.ndarray
) -> None:
    plain = load_model(folders[name], isa="scalar", num_threads=2)
    codes = load_model(folders[name], isa="scalar", kv="int8", num_threads=2)
    expected = sequence_logits(plain, ids, chunk=LENGTH)
    error = sequence_logits(codes, ids, chunk=LENGTH) - expected
    assert 0 < np.sqrt(np.mean(np.square(error))) < 0.05 * expected.std()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kv", KV_FORMATS)
def test_vector_paths_agree_bitwise(
    name: str, kv: KvFormat, folders: dict[str, Path], ids: np.ndarray
) -> None:
    if not {"avx2", "avx512"} <= set(RUNNABLE):
        pytest.skip("NOT BOTH VECTOR PATHS RUN ON THIS PROCESSOR")
    wide, narrow = (
        sequence_logits(load_model(folders[name], isa=isa, kv=kv, num_threads=2), ids, chunk=LENGTH)
        for isa in ("avx512", "avx2")
    )
    assert np.array_equal(wide, narrow)


@pytest.mark.parametrize("kv", KV_FORMATS)
def test_what_nobody_sees_may_be_anything(
    kv: KvFormat, path: str, folders: dict[str, Path], ids: np.ndarray
) -> None:
    model = load_model(folders["mistral"], isa=path, kv=kv, num_threads=2)
    whole = sequence_logits(model, ids, chunk=LENGTH)
    arrays = new_kv_arrays(model, 19)
    arrays.data[:] = 0xFF
    blocks = tuple(range(19))
    run_step(model, Part(ids, 0, 590, blocks))
    arrays.data[:9] = 0xFF  # position 590 sees 291 and later
    (rest,) = run_step(model, Part(ids, 590, LENGTH - 590, blocks))
    assert np.array_equal(rest, whole[590:])


@pytest.mark.parametrize("head_dim", [512, 528])
def test_int8_kv_refuses_heads_whose_sums_could_overflow(tmp_path: Path, head_dim: int) -> None:
    folder = make_family_model("gemma2", tmp_path / "wide", head_dim=head_dim)
    if head_dim > INT8_KV_HEAD_DIM_MAX:
        with pytest.raises(KvasirError, match="up to 512 values, not 528"):
            load_model(folder, isa=RUNNABLE[-1], kv="int8", num_threads=1)
        return
    model = load_model(folder, isa=RUNNABLE[-1], kv="int8", num_threads=1)
    reference = load_model(folder, isa="scalar", kv="int8", num_threads=1)
    ids = np.arange(40, dtype=np.int32)
    expected = sequence_logits(reference, ids, chunk=40)
    error = sequence_logits(model, ids, chunk=40) - expected
    assert np.sqrt(np.mean(np.square(error))) < 0.01 * expected.std()


def test_layout_of_int8_kv_holds_codes_and_scales(folders: dict[str, Path]) -> None:
    plain = load_model(folders["odd"], isa=RUNNABLE[-1], num_threads=1)
    codes = load_model(folders["odd"], isa=RUNNABLE[-1], kv="int8", num_threads=1)
    heads, width, layers = 2, 48, 2
    assert codes.layout.block_bytes == layers * 2 * heads * 32 * (width + 4)
    assert codes.layout.digest != plain.layout.digest
    assert codes.fingerprint != plain.fingerprint
