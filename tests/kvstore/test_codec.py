"""Codecs of KV blocks: what they lose, their sizes, their paths, and what they refuse."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvasir_kvstore import _native

LOSSY = ("int8", "int4", "entropy")
HEADER_BYTES = 32
NUM_HEADS, HEAD_DIM, NUM_LAYERS = 2, 64, 3
SECTION = 32 * HEAD_DIM


@dataclass(frozen=True)
class Slice:
    """Some layers of a block: float32 values and their bfloat16 bytes."""

    data: np.ndarray
    num_heads: int
    head_dim: int

    @property
    def values(self) -> np.ndarray:
        return as_floats(self.data)

    @property
    def num_layers(self) -> int:
        return len(self.data) // (2 * self.num_heads * 32 * self.head_dim * 2)

    def encode(self, codec: str, **where: int) -> np.ndarray:
        size = _native.codec_bytes_max(
            codec, num_heads=self.num_heads, head_dim=self.head_dim, num_layers=self.num_layers
        )
        target = np.zeros(size, np.uint8)
        written = _native.codec_encode(
            codec, self.data, target, num_heads=self.num_heads, head_dim=self.head_dim, **where
        )
        return target[:written]

    def decode(self, encoded: np.ndarray) -> tuple[str, np.ndarray]:
        target = np.zeros_like(self.data)
        fault = _native.codec_decode(
            encoded, target, num_heads=self.num_heads, head_dim=self.head_dim
        )
        return fault, target


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2").view(np.uint8)


def as_floats(data: np.ndarray) -> np.ndarray:
    return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)


def make_slice(
    seed: int = 0,
    *,
    num_heads: int = NUM_HEADS,
    head_dim: int = HEAD_DIM,
    num_layers: int = NUM_LAYERS,
) -> Slice:
    """Like a model's: channels of K have means and widths of their own."""
    random = np.random.default_rng(seed)
    layers = []
    for _ in range(num_layers * num_heads):
        widths = np.exp(0.7 * random.standard_normal(head_dim))
        means = 2 * random.standard_normal(head_dim) * widths
        keys = means[:, None] + widths[:, None] * random.standard_normal((head_dim, 32))
        values = widths * random.standard_normal((32, head_dim))
        layers.append((keys.ravel(), values.ravel()))
    shape = (num_layers, num_heads, 2, 32 * head_dim)
    data = np.array(layers).reshape(shape).swapaxes(1, 2)
    return Slice(as_bfloat16(np.ascontiguousarray(data).ravel()), num_heads, head_dim)


@pytest.fixture(autouse=True)
def fastest_path() -> Iterator[None]:
    yield
    _native.use_codec_path("")


def sections(values: np.ndarray, kind: int) -> np.ndarray:
    """K (0) or V (1) as [section][32 * head_dim]."""
    split = values.reshape(NUM_LAYERS, 2, NUM_HEADS, SECTION)
    return split[:, kind].reshape(-1, SECTION)


def test_int8_errs_by_half_a_step_of_the_token_and_head() -> None:
    block = make_slice()
    fault, decoded = block.decode(block.encode("int8"))
    assert fault == ""
    for kind, axis in ((0, 1), (1, 2)):
        shape = (-1, HEAD_DIM, 32) if kind == 0 else (-1, 32, HEAD_DIM)
        before = sections(block.values, kind).reshape(shape)
        after = sections(as_floats(decoded), kind).reshape(shape)
        most = np.abs(before).max(axis=axis, keepdims=True)
        # Half a step, of a scale that is rounded up, and the rounding of what comes out.
        assert (np.abs(after - before) <= most / 127 * 0.51 + np.abs(before) / 250).all()
        assert np.abs(after - before).max() > 0


def test_int4_errs_by_half_a_step_of_the_group_of_32() -> None:
    block = make_slice()
    fault, decoded = block.decode(block.encode("int4"))
    assert fault == ""
    before = block.values.reshape(-1, 32)  # a channel of K, or 32 channels of a token's V
    after = as_floats(decoded).reshape(-1, 32)
    step = (before.max(axis=1) - before.min(axis=1))[:, None] / 15
    assert (np.abs(after - before) <= step * 0.51 + np.abs(after) / 250).all()


def test_entropy_is_smaller_than_int4_and_near_to_what_was() -> None:
    block = make_slice()
    encoded = block.encode("entropy")
    fault, decoded = block.decode(encoded)
    assert fault == ""
    assert len(encoded) < len(block.encode("int4")) < len(block.encode("int8"))
    error = np.sqrt(np.mean((as_floats(decoded) - block.values) ** 2))
    assert 0 < error < 0.1 * np.sqrt(np.mean(block.values**2))


def test_early_layers_are_quantised_more_finely_by_entropy() -> None:
    block = make_slice()
    early = block.encode("entropy", layer_first=0, layers_total=30)
    late = block.encode("entropy", layer_first=27, layers_total=30)
    assert len(early) > len(late)


@pytest.mark.parametrize(
    ("codec", "section_bytes"),
    [("int8", 2 * 32 + SECTION), ("int4", 4 * HEAD_DIM + SECTION // 2)],
)
def test_sizes_are_exact(codec: str, section_bytes: int) -> None:
    encoded = make_slice().encode(codec)
    assert len(encoded) == HEADER_BYTES + 2 * NUM_LAYERS * NUM_HEADS * section_bytes


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 256, 1024])
def test_all_paths_give_the_same_bytes(codec: str, head_dim: int) -> None:
    block = make_slice(head_dim, num_heads=3, head_dim=head_dim, num_layers=2)
    results = []
    for path in _native.codec_paths():
        _native.use_codec_path(path)
        encoded = block.encode(codec)
        fault, decoded = block.decode(encoded)
        results.append((encoded.tobytes(), fault, decoded.tobytes()))
    assert results[0][1] == ""
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("codec", LOSSY)
def test_a_second_round_trip_adds_little(codec: str) -> None:
    block = make_slice()
    once = block.decode(block.encode(codec))[1]
    again = Slice(once, NUM_HEADS, HEAD_DIM)
    twice = again.decode(again.encode(codec))[1]

    def error(data: np.ndarray) -> float:
        return float(np.sqrt(np.mean((as_floats(data) - block.values) ** 2)))

    assert error(twice) < 1.25 * error(once)


finite = st.floats(width=16, allow_nan=False, allow_infinity=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(finite, min_size=1, max_size=40), st.integers(0, 2**31), st.sampled_from(LOSSY))
def test_any_finite_values_come_back_on_every_path(
    values: list[float], seed: int, codec: str
) -> None:
    """Constants, outliers, zeros, denormals: near the truth, and equal on all paths."""
    random = np.random.default_rng(seed)
    drawn = random.choice(np.array(values, np.float32), size=4 * 32 * 32)
    block = Slice(as_bfloat16(drawn), 1, 32)
    results = []
    for path in _native.codec_paths():
        _native.use_codec_path(path)
        results.append(block.decode(block.encode(codec)))
    assert [fault for fault, _ in results] == [""] * len(results)
    assert all(np.array_equal(data, results[0][1]) for _, data in results)
    bound = {"int8": 0.01, "int4": 0.08, "entropy": 0.6}[codec]
    error = np.abs(as_floats(results[0][1]) - block.values).max()
    assert error <= bound * np.abs(block.values).max() + 1e-30


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0x7181, 0xF181])
@pytest.mark.parametrize("place", [0, SECTION - 1, 3 * SECTION + 7])
def test_values_out_of_bounds_are_left_raw(codec: str, bits: int, place: int) -> None:
    block = make_slice()
    block.data.view("<u2")[place] = bits
    for path in _native.codec_paths():
        _native.use_codec_path(path)
        assert len(block.encode(codec)) == 0


@pytest.mark.parametrize("codec", LOSSY)
def test_damage_is_refused_with_its_reason(codec: str) -> None:
    block = make_slice()
    good = block.encode(codec)
    cases = {
        "truncated": [
            good[:-1],
            good[:HEADER_BYTES],
            good[:31],
            good[:0],
            np.append(good, good[:1]),
        ],
        "bad_header": [flipped(good, bit) for bit in range(8 * HEADER_BYTES)],
        "bad_checksum": [flipped(good, bit) for bit in range(8 * HEADER_BYTES, 8 * len(good), 997)],
    }
    for reason, damaged in cases.items():
        assert {block.decode(np.ascontiguousarray(data))[0] for data in damaged} == {reason}
    other = make_slice(num_layers=2)
    assert other.decode(good)[0] == "other_shape"


@pytest.mark.parametrize("codec", LOSSY)
def test_a_payload_behind_a_right_checksum_is_still_bounded(codec: str) -> None:
    """Whatever a peer wrote: refused or decoded, never beyond the buffers."""
    block = make_slice(num_layers=1)
    good = block.encode(codec)
    random = np.random.default_rng(1)
    seen = set()
    for round_number in range(600):
        damaged = good.copy()
        for place in random.integers(HEADER_BYTES, len(good), 1 + round_number % 40):
            damaged[place] = random.integers(256)
        if round_number % 3 == 0:
            damaged = damaged[: random.integers(HEADER_BYTES, len(good))]
        damaged = signed(damaged)
        results = []
        for path in _native.codec_paths():
            _native.use_codec_path(path)
            fault, decoded = block.decode(damaged)
            results.append((fault, b"" if fault else decoded.tobytes()))
        assert all(result == results[0] for result in results)
        seen.add(results[0][0])
    assert "bad_payload" in seen
    assert seen <= {"", "bad_payload"}


def test_a_row_wider_than_symbols_takes_coarser_steps_on_every_path() -> None:
    """A channel of K that is still but for one value, among many that are quite still."""
    keys = np.zeros((1024, 32))
    keys[0] = 2047
    keys[1, 7] = 1200
    block = Slice(as_bfloat16(np.concatenate([keys.ravel(), np.zeros(32 * 1024)])), 1, 1024)
    results = []
    for path in _native.codec_paths():
        _native.use_codec_path(path)
        encoded = block.encode("entropy", layers_total=3)
        fault, decoded = block.decode(encoded)
        results.append((encoded.tobytes(), fault))
        assert np.abs(as_floats(decoded) - block.values).max() <= 16
    assert results[0][1] == ""
    assert all(result == results[0] for result in results)


def flipped(data: np.ndarray, bit: int) -> np.ndarray:
    damaged = data.copy()
    damaged[bit // 8] ^= 1 << bit % 8
    return damaged


def signed(data: np.ndarray) -> np.ndarray:
    """With a header that is right for the payload."""
    payload = data[HEADER_BYTES:].tobytes()
    start = data[:20].tobytes() + struct.pack("<II", len(payload), _native.crc32c(payload))
    header = start + struct.pack("<I", _native.crc32c(start))
    return np.frombuffer(header + payload, np.uint8)


def test_wrong_arguments_are_refused() -> None:
    block = make_slice()
    with pytest.raises(ValueError, match="codec"):
        block.encode("zip")
    with pytest.raises(ValueError, match="shorter"):
        _native.codec_encode("int8", block.data, np.zeros(8, np.uint8), num_heads=2, head_dim=64)
    with pytest.raises(ValueError, match="whole layers"):
        Slice(block.data[:-2], NUM_HEADS, HEAD_DIM).decode(block.encode("int8"))
    with pytest.raises(ValueError, match="multiple of 32"):
        _native.codec_bytes_max("int8", num_heads=2, head_dim=48, num_layers=1)
    with pytest.raises(ValueError, match="no codec path"):
        _native.use_codec_path("abacus")
