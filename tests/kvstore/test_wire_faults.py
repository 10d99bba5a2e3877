"""Whatever the wire does to the bytes, nothing wrong becomes ready and nothing hangs."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvasir_kvstore._native import crc32c, crc32c_copy, crc32c_reference
from kvstore_builders import Pair, Wire, make_pair, wait_until

NUM_BLOCKS = 4
LAYERS = 3
LAYER_BYTES = 96
FRAME_BYTES = 64 + LAYERS * LAYER_BYTES


def flip_bit(byte: int, bit: int) -> Callable[[int, bytes], bytes]:
    """Flips one bit of what the server sends, counted from the end of its hello."""

    def change(offset: int, data: bytes) -> bytes:
        at = 40 + byte - offset
        if 0 <= at < len(data):
            return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        return data

    return change


def test_the_checksum_is_castagnolis() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c_reference(b"123456789") == 0xE3069283


@given(st.integers(0, 80_000), st.integers(0, 2**32 - 1), st.integers(0, 2**32))
def test_the_fast_checksum_equals_the_reference(size: int, seed: int, content: int) -> None:
    data = random.Random(content).randbytes(size)
    assert crc32c(data, seed) == crc32c_reference(data, seed)
    assert crc32c_copy(data) == (crc32c_reference(data), data)
    cut = size // 3
    assert crc32c(data[cut:], crc32c(data[:cut], seed)) == crc32c(data, seed)


@dataclass(frozen=True)
class Shape:
    """Where things lie in what the server sends."""

    key: bytes
    greeting_bytes: int
    tag_bytes: int

    @property
    def frame_bytes(self) -> int:
        return FRAME_BYTES + self.tag_bytes

    @property
    def stream_bytes(self) -> int:
        return self.greeting_bytes + NUM_BLOCKS * self.frame_bytes + 64 + self.tag_bytes


SHAPES = {"tcp": Shape(b"", 40, 0), "tcp-encrypted": Shape(b"k" * 32, 40 + 64, 16)}


class Fault:
    """One random disturbance of the stream from the server."""

    def __init__(self, rng: random.Random, shape: Shape) -> None:
        self.kind = rng.choice(["flip", "burst", "cut", "drop", "repeat", "swap", "reorder"])
        self.at = rng.randrange(shape.stream_bytes)
        self.bit = rng.randrange(8)
        self.size = rng.randrange(1, 200)
        self._shape = shape
        self._rng = rng
        self._buffer = b""

    def __call__(self, offset: int, data: bytes) -> bytes | None:
        """Gathers the whole answer after the greeting, then applies the fault to it at once."""
        greeting_bytes = self._shape.greeting_bytes
        is_late = self.at >= greeting_bytes
        if offset < greeting_bytes and is_late:
            return data
        self._buffer += data
        if is_late and len(self._buffer) < self._shape.stream_bytes - greeting_bytes:
            return b""
        stream, self._buffer = self._buffer, b""
        position = self.at - (greeting_bytes if is_late else offset)
        return self._apply(stream, position) if 0 <= position < len(stream) else stream

    def _apply(self, stream: bytes, at: int) -> bytes | None:
        end = at + self.size
        size = self._shape.frame_bytes
        if self.kind == "flip":
            return stream[:at] + bytes([stream[at] ^ 1 << self.bit]) + stream[at + 1 :]
        if self.kind == "burst":
            noise = self._rng.randbytes(len(stream[at:end]))
            return stream[:at] + noise + stream[end:]
        if self.kind == "drop":
            return stream[:at] + stream[end:]
        if self.kind == "repeat":
            return stream[:end] + stream[at:end] + stream[end:]
        if self.kind == "swap":  # payloads change places, their headers do not
            payload = stream[64:size]
            other = stream[size + 64 : 2 * size]
            return stream[:64] + other + stream[size : size + 64] + payload + stream[2 * size :]
        if self.kind == "reorder":
            return stream[size : 2 * size] + stream[:size] + stream[2 * size :]
        return None


def run_fault(pair: Pair, seed: int, shape: Shape) -> str:
    pair.target.ready[:] = 0
    pair.target.data[:] = 0
    with Wire(pair.server.port, Fault(random.Random(seed), shape)) as wire:
        pair.port = wire.port
        result = pair.pull_named(timeout_ms=200)
    for block, ok in enumerate(result.blocks_ok):
        assert pair.target.ready[block] == (LAYERS if ok else 0)
        if ok:
            assert np.array_equal(pair.target.data[block], pair.source.data[block]), (
                f"seed {seed}: wrong bytes in a ready block"
            )
    assert all(result.blocks_ok) or result.error
    return result.error


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("part", range(4))
def test_random_corruption_never_yields_a_wrong_ready_block(part: int, shape: Shape) -> None:
    errors: dict[str, int] = {}
    with make_pair(NUM_BLOCKS, num_layers=LAYERS, layer_bytes=LAYER_BYTES, key=shape.key) as pair:
        pair.publish(NUM_BLOCKS)
        for seed in range(part * 250, part * 250 + 250):
            error = run_fault(pair, seed, shape)
            errors[error] = errors.get(error, 0) + 1
    assert errors.get("bad_frame", 0) > 20
    assert errors.get("unreachable", 0) > 5


def test_a_wrong_payload_costs_its_block_only() -> None:
    with make_pair(NUM_BLOCKS, num_layers=LAYERS, layer_bytes=LAYER_BYTES) as pair:
        pair.publish(NUM_BLOCKS)
        with Wire(pair.server.port, flip_bit(FRAME_BYTES + 64 + 10, 2)) as wire:
            pair.port = wire.port
            result = pair.pull_named()
        assert result.error == "bad_frame"
        assert result.frames_bad == 1
        assert result.blocks_ok == [True, False, True, True]
        assert list(pair.target.ready) == [3, 0, 3, 3]


def test_a_session_with_a_wrong_payload_is_not_acknowledged() -> None:
    with make_pair(NUM_BLOCKS, num_layers=LAYERS, layer_bytes=LAYER_BYTES) as pair:
        pair.publish(2)
        pair.source.open_session(3)
        pair.source.extend_session(3, [0, 1])
        pair.source.finish_session(3)
        with Wire(pair.server.port, flip_bit(64 + 5, 2)) as wire:
            pair.port = wire.port
            result = pair.pull_session(3, [0, 1])
        assert (result.error, result.blocks_ok) == ("bad_frame", [False, True])
        assert not pair.source.session_pulled(3)


ORDINAL_AT = 8


def test_an_abort_is_noticed_between_the_blocks_of_a_slow_transfer() -> None:
    with make_pair(32, layer_bytes=1 << 19) as pair:
        for block in range(32):
            pair.source.ready[block] = pair.source.num_layers
        pair.source.open_session(9)
        pair.source.extend_session(9, list(range(32)))
        pair.source.finish_session(9)

        def abort(offset: int, data: bytes) -> bytes:
            if offset >= 40 and pair.source.num_sessions:  # the hello has passed
                pair.source.abort_session(9)
            return data

        with Wire(pair.server.port, abort) as wire:
            pair.port = wire.port
            result = pair.pull_session(9, list(range(32)))
        assert result.error == "aborted"
        assert result.bytes_moved < pair.source.data.nbytes / 2
        wait_until(lambda: pair.source.close_session(9), "the sender to let go")


def test_no_bit_of_a_frames_header_can_change_unnoticed() -> None:
    bits = [(byte, byte % 8) for byte in range(64)]
    bits += [(ORDINAL_AT, bit) for bit in range(3)]  # another block of the same session
    with make_pair(NUM_BLOCKS, num_layers=LAYERS, layer_bytes=LAYER_BYTES) as pair:
        pair.publish(NUM_BLOCKS)
        for session, (byte, bit) in enumerate(bits):
            pair.source.open_session(session)
            pair.source.extend_session(session, [0, 1, 2, 3])
            pair.source.finish_session(session)
            with Wire(pair.server.port, flip_bit(byte, bit)) as wire:
                pair.port = wire.port
                result = pair.pull_session(session, [3, 2, 1, 0])
            assert (result.error, result.frames_bad) == ("bad_frame", 1), f"byte {byte}, bit {bit}"
            assert not any(result.blocks_ok)
            assert not pair.target.ready.any()
            assert not pair.source.session_pulled(session)
