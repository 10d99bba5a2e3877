"""Products of every path and weight format against slow models of the same arithmetic."""

import numpy as np
import pytest
from golden_models import BF16_INPUTS, PATHS, RUNNABLE
from kvasir_engine import _native
from kvasir_engine.weights import bf16_from_float32, float32_from_bf16

FORMATS = ("bf16", "int8", "int4")
INT4_GROUP = 32
SPREAD_GROUP = 64
SHAPES = ((333, 1072), (64, 64), (70, 96), (5, 51), (33, 200))
"""(n, k): sizes that fill no panel, no group and no register tile, and some that do."""
ROW_COUNTS = (1, 2, 3, 5, 13, 16, 40, 200)


@pytest.fixture(params=(*PATHS, *_native.model_paths()))
def path(request: pytest.FixtureRequest) -> str:
    if request.param not in (*RUNNABLE, *_native.model_paths()):
        pytest.skip(f"KERNEL PATH {request.param} DOES NOT RUN ON THIS PROCESSOR")
    return str(request.param)


def operands(shape: tuple[int, int], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(bf16 bits [n, k], float32 [rows, k])"""
    source = np.random.default_rng(shape[0] + rows)
    tensor = bf16_from_float32(source.standard_normal(shape, dtype=np.float32) * 0.05)
    return tensor, source.standard_normal((rows, shape[1]), dtype=np.float32)


def multiply(
    tensor: np.ndarray, a: np.ndarray, path: str, weights: str, num_threads: int = 2
) -> np.ndarray:
    c = np.zeros((len(a), len(tensor)), np.float32)
    _native.multiply(tensor=tensor, a=a, c=c, isa=path, weights=weights, num_threads=num_threads)
    return c


def spread(rows: np.ndarray) -> np.ndarray:
    """Rows, zeros behind them to whole groups, times the matrix that spreads their outliers.

    In float32 and in the kernels' order, since a code may hang on the last bit.
    """
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % SPREAD_GROUP)))
    shape, left, twos = padded.shape, padded.shape[1] // SPREAD_GROUP, 0
    while left % 2 == 0:
        left, twos = left // 2, twos + 1
    root_half = np.float32(0.125 * 2.0 ** -(twos // 2)) * np.float32(2**-0.5 if twos % 2 else 1)
    groups = (padded * root_half).reshape(len(rows), -1, SPREAD_GROUP)
    for _ in range(6):
        low, high = np.split(groups, 2, axis=2)
        groups = np.stack([low + high, low - high], axis=3).reshape(groups.shape)
    stride = SPREAD_GROUP
    for _ in range(twos):
        pairs = groups.reshape(len(rows), -1, 2, stride)
        groups = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2)
        stride *= 2
    while shape[1] // stride % 3 == 0:
        parts = groups.reshape(len(rows), -1, 3, stride)
        shift = (parts[:, :, 0] + parts[:, :, 1] + parts[:, :, 2]) * np.float32(2 / 3)
        groups = parts - shift[:, :, None]
        stride *= 3
    return groups.reshape(shape)


def int8_rows(rows: np.ndarray) -> np.ndarray:
    """What 127 steps to the largest magnitude of each row make of them."""
    most = np.abs(rows).max(axis=-1, keepdims=True)
    codes = np.rint(rows * (np.float32(127) / np.where(most > 0, most, np.float32(1))))
    return codes.astype(np.float64) * (most / np.float32(127))


def int4_groups(rows: np.ndarray) -> np.ndarray:
    """[rows, groups, 32], zeros behind each row."""
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % INT4_GROUP)))
    return padded.reshape(len(rows), -1, INT4_GROUP)


def int4_weights(tensor: np.ndarray) -> np.ndarray:
    """What 4-bit codes with a bf16 scale and offset per group of 32 make of the weights."""
    source = float32_from_bf16(tensor)
    decoded = np.zeros(source.shape, np.float64)
    for first in range(0, source.shape[1], INT4_GROUP):
        group = source[:, first : first + INT4_GROUP]
        low = group.min(axis=1, keepdims=True)
        step = (group.max(axis=1, keepdims=True) - low) / np.float32(15)
        scale = float32_from_bf16(bf16_from_float32(step))
        codes = np.clip(np.rint((group - low) / scale), 0, 15)
        decoded[:, first : first + INT4_GROUP] = codes * scale.astype(np.float64) + low
    return decoded


def model_of(tensor: np.ndarray, a: np.ndarray, path: str, weights: str) -> np.ndarray:
    """The product in float64, after the same rounding of weights and activations."""
    if weights == "bf16":
        a = float32_from_bf16(bf16_from_float32(a)) if path in BF16_INPUTS else a
        return a.astype(np.float64) @ float32_from_bf16(tensor).astype(np.float64).T
    if weights == "int4":
        inputs = int8_rows(int4_groups(a)).reshape(len(a), -1)[:, : a.shape[1]]
        return inputs @ int4_weights(tensor).T
    return int8_rows(spread(a)) @ int8_rows(spread(float32_from_bf16(tensor))).T


def spreading_matrix(depth: int) -> np.ndarray:
    """Of a row of so many elements, by its definition."""
    mirror, pair = np.eye(3) - 2 / 3, np.array([[1, 1], [1, -1]]) / 2**0.5
    matrix, left = np.ones((1, 1)), depth
    while left % 2 == 0:
        matrix, left = np.kron(pair, matrix), left // 2
    while left % 3 == 0:
        matrix, left = np.kron(mirror, matrix), left // 3
    return np.kron(np.eye(left), matrix)


@pytest.mark.parametrize("depth", [64, 128, 192, 320, 576, 1536])
def test_spreading_is_a_product_with_an_orthogonal_symmetric_matrix(depth: int) -> None:
    matrix = spreading_matrix(depth)
    assert np.allclose(matrix @ matrix, np.eye(depth), atol=1e-12)
    rows = np.random.default_rng(0).standard_normal((3, depth), dtype=np.float32)
    assert np.allclose(spread(rows), rows @ matrix, atol=1e-5)


@pytest.mark.parametrize("depth", [1536, 2304])
def test_an_outlier_is_spread_over_more_than_its_group(depth: int) -> None:
    """Of a thousand times what else there is; spread over 64, it would cost 27 to 33 times."""
    tensor, a = operands((256, depth), 2)
    a[1, 7] = 1000
    expected = model_of(tensor, a, "scalar", "bf16")
    error = np.sqrt(((multiply(tensor, a, "scalar", "int8") - expected) ** 2).mean(axis=1))
    assert error[1] < 23 * error[0]


@pytest.mark.parametrize("rows", ROW_COUNTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weights", FORMATS)
def test_a_product_is_that_of_the_slow_model(
    path: str, weights: str, shape: tuple[int, int], rows: int
) -> None:
    tensor, a = operands(shape, rows)
    expected = model_of(tensor, a, path, weights)
    error = np.abs(multiply(tensor, a, path, weights) - expected)
    assert error.max() <= 1e-5 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize(("depth", "rows"), [(1536, 320), (3136, 160), (4096, 100)])
@pytest.mark.parametrize("weights", FORMATS)
def test_rows_that_do_not_fit_the_cache_together_are_right(
    path: str, weights: str, depth: int, rows: int
) -> None:
    tensor, a = operands((33, depth), rows)
    expected = model_of(tensor, a, path, weights)
    error = np.abs(multiply(tensor, a, path, weights) - expected)
    assert error.max() <= 1e-5 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("weights", FORMATS)
def test_rows_do_not_depend_on_their_neighbours_or_on_threads(path: str, weights: str) -> None:
    tensor, a = operands((333, 1072), 200)
    whole = multiply(tensor, a, path, weights)
    for first, count in ((0, 1), (199, 1), (3, 2), (17, 13), (50, 16), (60, 41), (1, 150)):
        part = multiply(tensor, a[first : first + count], path, weights, num_threads=1)
        assert np.array_equal(part, whole[first : first + count])


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_products_are_the_same_bits_on_every_path(path: str, weights: str) -> None:
    tensor, a = operands((70, 1072), 45)
    a[3] = 0
    a[4] *= 1e-35
    a[5] *= 1e30
    expected = multiply(tensor, a, "scalar", weights)
    assert np.array_equal(multiply(tensor, a, path, weights), expected)
    assert not expected[3].any()


@pytest.mark.parametrize("weights", FORMATS)
def test_a_product_is_added_to_what_is_there(path: str, weights: str) -> None:
    tensor, a = operands((70, 96), 5)
    once = multiply(tensor, a, path, weights)
    twice = once.copy()
    _native.multiply(tensor=tensor, a=a, c=twice, isa=path, weights=weights, num_threads=2)
    assert np.array_equal(twice, once + once)


def test_extreme_codes_do_not_overflow(path: str) -> None:
    """All products of one sign at their largest, over a depth of a big model."""
    tensor = np.zeros((33, 16384), np.uint16)
    tensor[:, 0] = 0x3F80  # 1.0; spread, all are equal
    a = np.zeros((2, 16384), np.float32)
    a[:, 0] = [1, -1]
    product = multiply(tensor, a, path, "int8")
    assert np.allclose(product[0], 1, rtol=1e-6)
    assert np.array_equal(product[1], -product[0])


def test_unknown_formats_are_refused() -> None:
    tensor, a = operands((5, 51), 1)
    with pytest.raises(ValueError, match="unknown weight format 'int3'"):
        multiply(tensor, a, "scalar", "int3")


@pytest.mark.parametrize("weights", FORMATS)
def test_the_peak_probe_measures_every_format(path: str, weights: str) -> None:
    if path not in _native.model_paths():
        assert _native.PeakProbe(isa=path, weights=weights, num_threads=1).run() > 0
