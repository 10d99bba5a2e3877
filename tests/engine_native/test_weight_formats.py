"""Models with quantised weights: near the original, in less memory, and batch-invariant."""

from pathlib import Path

import numpy as np
import pytest
from golden_models import GOLDENS, PATHS, RUNNABLE, read_golden
from kvasir_engine import _native
from kvasir_engine.logits import sequence_logits
from kvasir_engine.model import ARITHMETIC, load_model
from kvasir_proto.errors import KvasirError
from step_builders import make_odd_model

NAMES = ("llama-gqa-tied", "qwen2-bias")
LENGTH = 64
ERROR_MAX = {"int8": 0.05, "int4": 0.35}
"""Root mean square of the difference, in those of the logits."""


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    if request.param not in RUNNABLE:
        pytest.skip(f"KERNEL PATH {request.param} DOES NOT RUN ON THIS PROCESSOR")
    return str(request.param)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_odd_model(tmp_path_factory.mktemp("models") / "odd")


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_stay_near_the_reference(name: str, weights: str, path: str) -> None:
    golden = read_golden(name)
    model = load_model(golden.folder, num_threads=2, isa=path, weights=weights)
    expected = golden.logits(LENGTH)
    error = sequence_logits(model, golden.ids(LENGTH), chunk=LENGTH) - expected
    assert np.sqrt(np.mean(error**2)) <= ERROR_MAX[weights] * np.sqrt(np.mean(expected**2))


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", ["odd", "mixtral-moe"])
def test_chunks_and_threads_do_not_show(odd: Path, name: str, weights: str, path: str) -> None:
    folder = odd if name == "odd" else GOLDENS / name
    ids = np.random.default_rng(3).integers(0, 333, 80).astype(np.int32)
    model = load_model(folder, num_threads=2, isa=path, weights=weights)
    whole = sequence_logits(model, ids, chunk=80)
    single = load_model(folder, num_threads=1, isa=path, weights=weights)
    for chunk in (1, 7, 64):
        assert np.array_equal(sequence_logits(single, ids, chunk=chunk), whole)


def test_memory_follows_the_format() -> None:
    models = {
        weights: load_model(GOLDENS / "qwen2-bias", num_threads=1, weights=weights)
        for weights in ("bf16", "int8", "int4")
    }
    sizes = {
        weights: _native.packed_bytes(model.config.native_shape(), weights=weights)
        for weights, model in models.items()
    }
    assert sizes["int4"] < sizes["int8"] < 0.6 * sizes["bf16"]
    for weights, model in models.items():
        assert sizes[weights] <= model.weights_bytes <= sizes[weights] + (2 << 20)


def test_formats_have_fingerprints_of_their_own() -> None:
    prints = {
        load_model(GOLDENS / "qwen2-bias", num_threads=1, weights=weights).fingerprint
        for weights in ("bf16", "int8", "int4")
    }
    assert len(prints) == 3


def test_a_format_that_rounds_in_another_way_has_another_fingerprint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def prints() -> list[bytes]:
        return [
            load_model(GOLDENS / "qwen2-bias", num_threads=1, weights=weights).fingerprint
            for weights in ARITHMETIC
        ]

    before = prints()
    monkeypatch.setitem(ARITHMETIC, "int8", "int8 as it was before")
    after = prints()
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_an_unknown_format_is_refused_with_those_there_are() -> None:
    with pytest.raises(KvasirError, match="'int3'; there are: bf16, int8, int4"):
        load_model(GOLDENS / "qwen2-bias", num_threads=1, weights="int3")
