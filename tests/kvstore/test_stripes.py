"""Large pulls go over several connections: equal bytes, counted once, nothing half visible."""

import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from kvasir_kvstore._native import BlockClient, BlockServer, PullResult, crc32c
from kvstore_builders import EPOCH, UID, InThread, Pair, Wire, make_pair, name_of, wait_until

KEY = bytes(range(32))
NUM_BLOCKS = 8
NUM_LAYERS = 4
LAYER_BYTES = 256 << 10  # a frame; 8 MiB in all, enough for four connections
FRAME_BYTES = 64 + LAYER_BYTES
KEYS = pytest.mark.parametrize("key", [b"", KEY], ids=["tcp", "tcp-encrypted"])


@contextmanager
def striped_pair(key: bytes = b"", *, connections_max: int = 8) -> Iterator[Pair]:
    """8 connections let a pull take 4."""
    shape = {"num_layers": NUM_LAYERS, "layer_bytes": LAYER_BYTES}
    with make_pair(NUM_BLOCKS, **shape, key=key) as pair:
        pair.client.close()
        pair.client = BlockClient(pair.target, key=key, connections_per_peer_max=connections_max)
        pair.publish(NUM_BLOCKS)
        yield pair


class Lanes:
    """Tells the connections of a wire apart, by the thread that carries what the server sends."""

    def __init__(self, change: Callable[[int, int, bytes], bytes | None]) -> None:
        """`change` gets the connection's number first."""
        self._change = change
        self._threads: list[int] = []
        self._lock = threading.Lock()

    def __call__(self, offset: int, data: bytes) -> bytes | None:
        with self._lock:
            ident = threading.get_ident()
            if offset == 0:
                self._threads.append(ident)
            lane = len(self._threads) - 1 - self._threads[::-1].index(ident)
        return self._change(lane, offset, data)

    def __len__(self) -> int:
        return len(self._threads)


def flipped(data: bytes, at: int) -> bytes:
    """One bit of the byte at `at`, if the piece has it."""
    if not 0 <= at < len(data):
        return data
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]


def assert_whole_or_nothing(pair: Pair, result: PullResult) -> None:
    for block, ok in enumerate(result.blocks_ok):
        assert pair.target.ready[block] == (NUM_LAYERS if ok else 0)
    pair.assert_only_right_bytes_are_ready(list(range(NUM_BLOCKS)), list(range(NUM_BLOCKS)))


@KEYS
def test_a_large_pull_takes_several_connections_and_is_counted_once(key: bytes) -> None:
    with striped_pair(key) as pair:
        for pulled in (1, 2):
            pair.target.ready[:] = 0
            pair.target.data[:] = 0
            result = pair.pull_named()
            assert (result.error, result.blocks_ok) == ("", [True] * NUM_BLOCKS)
            assert result.transport == ("tcp-encrypted" if key else "tcp")
            assert result.bytes_moved == result.bytes_wire == pair.source.data.nbytes
            assert np.array_equal(pair.target.data, pair.source.data)
            assert list(pair.target.ready) == [NUM_LAYERS] * NUM_BLOCKS
            assert list(pair.source.uses) == [pulled] * NUM_BLOCKS
        assert pair.server.stats()["connections"] == 4
        wait_until(lambda: pair.server.stats()["blocks_sent"] == 2 * NUM_BLOCKS, "the count")
        assert pair.server.stats()["bytes_sent"] == 2 * pair.source.data.nbytes


def test_a_small_pull_takes_one_connection() -> None:
    with striped_pair() as pair:
        assert pair.pull_named(pair.names[:3], [0, 1, 2]).error == ""
        assert pair.server.stats()["connections"] == 1


@pytest.mark.parametrize(
    ("num_blocks", "num_layers", "layer_bytes"),
    [(1, 16, 1 << 20), (11, 5, 200_000), (40, 3, 100_000), (3000, 1, 4096), (7, 3, 1_000_016)],
    ids=["one block", "frames of a layer", "two layers a frame", "tiny blocks", "odd layers"],
)
def test_blocks_of_any_shape_arrive_equal(
    num_blocks: int, num_layers: int, layer_bytes: int
) -> None:
    with make_pair(num_blocks, num_layers=num_layers, layer_bytes=layer_bytes) as pair:
        pair.client = BlockClient(pair.target, connections_per_peer_max=8)
        names = pair.publish(num_blocks)
        order = list(range(num_blocks))[::-1]
        for _ in range(2):  # by then the source has kept the frames' checksums
            assert pair.pull_named(names, order).error == ""
            assert np.array_equal(pair.target.data[::-1], pair.source.data)
        assert pair.server.stats()["connections"] == 4
        pair.client.close()


def test_missing_blocks_are_missed_once_and_cost_no_other() -> None:
    with striped_pair() as pair:
        names = [*pair.names]
        names[2], names[5] = name_of(98), name_of(99)
        result = pair.pull_named(names)
        assert result.error == ""
        assert result.blocks_ok == [i not in (2, 5) for i in range(NUM_BLOCKS)]
        assert pair.target.ready[2] == pair.target.ready[5] == 0
        wait_until(lambda: pair.server.stats()["blocks_missed"] == 2, "the count")
        assert pair.server.stats()["blocks_sent"] == NUM_BLOCKS - 2


@KEYS
@pytest.mark.parametrize("lane", range(4))
def test_a_connection_that_dies_ends_the_pull_and_leaves_what_was_whole(
    key: bytes, lane: int
) -> None:
    def cut(number: int, offset: int, data: bytes) -> bytes | None:
        return None if number == lane and offset > 3 * FRAME_BYTES else data

    with striped_pair(key) as pair, Wire(pair.server.port, Lanes(cut)) as wire:
        pair.port = wire.port
        result = InThread(pair.pull_named).result()
        assert result.error == "unreachable"
        assert_whole_or_nothing(pair, result)
        assert not any(result.blocks_ok[4:])
        pair.port = 0
        assert pair.pull_named().blocks_ok == [True] * NUM_BLOCKS


@pytest.mark.parametrize("lane", range(4))
def test_a_wrong_payload_of_one_connection_costs_its_block_only(lane: int) -> None:
    def change(number: int, offset: int, data: bytes) -> bytes:
        at = 40 + 2 * FRAME_BYTES + 64 + 1000 - offset  # each connection's third frame
        return flipped(data, at) if number == lane else data

    with striped_pair() as pair, Wire(pair.server.port, Lanes(change)) as wire:
        pair.port = wire.port
        result = pair.pull_named()
        assert (result.error, result.frames_bad) == ("bad_frame", 1)
        assert result.blocks_ok == [block != 2 for block in range(NUM_BLOCKS)]
        assert_whole_or_nothing(pair, result)


@pytest.mark.parametrize("lane", range(4))
def test_changed_ciphertext_on_one_connection_ends_the_pull(lane: int) -> None:
    def change(number: int, offset: int, data: bytes) -> bytes:
        at = 104 + 2 * (FRAME_BYTES + 16) + 64 + 1000 - offset
        return flipped(data, at) if number == lane else data

    with striped_pair(KEY) as pair, Wire(pair.server.port, Lanes(change)) as wire:
        pair.port = wire.port
        result = pair.pull_named()
        assert (result.error, result.frames_bad) == ("bad_frame", 1)
        assert not any(result.blocks_ok[2:])
        assert_whole_or_nothing(pair, result)


@KEYS
@pytest.mark.parametrize("seed", range(8))
def test_faults_on_random_connections_never_yield_a_wrong_ready_block(
    key: bytes, seed: int
) -> None:
    rng = random.Random(seed)
    faults = {lane: (rng.choice(["flip", "cut"]), rng.randrange(1 << 21)) for lane in range(2)}

    def disturb(number: int, offset: int, data: bytes) -> bytes | None:
        kind, at = faults.get(number, ("", 0))
        if kind == "flip":
            return flipped(data, at - offset)
        return None if kind == "cut" and offset > at else data

    with striped_pair(key) as pair, Wire(pair.server.port, Lanes(disturb)) as wire:
        pair.port = wire.port
        result = InThread(lambda: pair.pull_named(timeout_ms=5_000)).result()
        assert all(result.blocks_ok) or result.error
        assert_whole_or_nothing(pair, result)


def test_frames_of_one_connection_are_not_taken_on_another() -> None:
    """A peer that mixes up its connections, each of them intact, is not believed."""
    streams: dict[int, bytes] = {}
    complete = threading.Barrier(2)

    def swap(number: int, _offset: int, data: bytes) -> bytes:
        if len(data) == 40:  # the greeting
            return data
        streams[number] = streams.get(number, b"") + data
        size = pair.source.data.nbytes // 2 + NUM_BLOCKS * 2 * 64 + 64
        if len(streams[number]) < size:
            return b""
        complete.wait(10)
        return streams[1 - number]

    with striped_pair(connections_max=4) as pair, Wire(pair.server.port, Lanes(swap)) as wire:
        pair.port = wire.port
        result = InThread(pair.pull_named).result()
        assert (result.error, any(result.blocks_ok)) == ("bad_frame", False)
        assert_whole_or_nothing(pair, result)


def test_connections_to_another_life_of_the_peer_are_not_used() -> None:
    """The peer is replaced by one with other contents between a pull's first two connections."""
    with striped_pair() as pair:
        later = BlockServer(pair.target, host="127.0.0.1", port=0, uid=UID, epoch=EPOCH + 1)

        def replace(_offset: int, data: bytes) -> bytes:
            wire.target = later.port
            return data

        with Wire(pair.server.port, replace) as wire:
            pair.port = wire.port
            assert pair.pull_named().blocks_ok == [True] * NUM_BLOCKS
            assert np.array_equal(pair.target.data, pair.source.data)
            assert pair.server.stats()["connections"] == 1
        assert later.stats()["stale_refused"] == 1
        later.stop()


def test_a_server_without_room_for_more_connections_serves_the_pull_over_one() -> None:
    with striped_pair() as pair:
        port = pair.server.port
        pair.server.stop()
        pair.server = BlockServer(
            pair.source, host="127.0.0.1", port=port, uid=UID, epoch=EPOCH, connections_max=1
        )
        assert pair.pull_named().blocks_ok == [True] * NUM_BLOCKS
        assert np.array_equal(pair.target.data, pair.source.data)
        assert pair.server.stats()["connections_refused"] > 0


@pytest.mark.parametrize("connections_max", [1, 2, 3])
def test_a_full_server_that_ends_a_kept_connection_costs_no_large_pull(
    connections_max: int,
) -> None:
    """It makes room for a pull's further connections by ending the one that the pull has taken."""
    with striped_pair() as pair:
        port = pair.server.port
        pair.server.stop()
        pair.server = BlockServer(
            pair.source,
            host="127.0.0.1",
            port=port,
            uid=UID,
            epoch=EPOCH,
            connections_max=connections_max,
        )
        for _ in range(3):
            assert pair.pull_named(pair.names[:1], [0]).blocks_ok == [True]
            time.sleep(0.25)  # long enough for the server to take it for idle
            result = pair.pull_named()
            assert (result.error, result.blocks_ok) == ("", [True] * NUM_BLOCKS)


def test_further_connections_leave_half_of_a_server_to_others() -> None:
    with striped_pair() as pair:
        port = pair.server.port
        pair.server.stop()
        pair.server = BlockServer(
            pair.source, host="127.0.0.1", port=port, uid=UID, epoch=EPOCH, connections_max=4
        )
        assert pair.pull_named().error == ""
        assert pair.server.stats()["connections"] == 2


def test_a_frame_that_covers_parts_of_other_connections_is_not_taken() -> None:
    """Else a block would be ready before the others have sent theirs, and written after that."""
    wrong = bytes(NUM_LAYERS * LAYER_BYTES)
    widened: list[int] = []  # by the threads that carry the connections

    def widen(_offset: int, data: bytes) -> bytes:
        frame = bytearray(data[:60])
        if threading.get_ident() in widened:
            return b""
        if data[:4] != b"KSVR" or len(data) < 64:
            return data
        if struct.unpack_from("<IIHH", frame, 8) != (0, 0, 0, 1):
            return data
        struct.pack_into("<H", frame, 18, NUM_LAYERS)
        struct.pack_into("<Q", frame, 24, len(wrong))
        struct.pack_into("<I", frame, 56, crc32c(np.frombuffer(wrong, np.uint8)))
        checksum = crc32c(np.frombuffer(frame, np.uint8))
        widened.append(threading.get_ident())
        return bytes(frame) + struct.pack("<I", checksum) + wrong

    with striped_pair() as pair, Wire(pair.server.port, widen) as wire:
        pair.port = wire.port
        result = pair.pull_named(timeout_ms=3000)
        assert len(widened) == 1
        assert (result.error, any(result.blocks_ok)) == ("bad_frame", False)
        assert_whole_or_nothing(pair, result)


def test_cancelling_ends_all_connections_of_a_pull() -> None:
    reached = threading.Event()
    released = threading.Event()

    def stall(_number: int, offset: int, data: bytes) -> bytes:
        if offset > 2 * FRAME_BYTES:
            reached.set()
            released.wait(10)
        return data

    with striped_pair() as pair, Wire(pair.server.port, Lanes(stall)) as wire:
        pair.port = wire.port
        pull = InThread(lambda: pair.pull_named(cancel_id=5))
        assert reached.wait(10)
        pair.client.cancel(5)
        result = pull.result()
        assert result.error == "cancelled"
        assert_whole_or_nothing(pair, result)
        released.set()


def test_background_pulls_are_striped_too_and_yield_on_every_connection() -> None:
    with striped_pair() as pair:
        assert pair.pull_named(background=True).blocks_ok == [True] * NUM_BLOCKS
        assert pair.server.stats()["connections"] == 2
        assert pair.server.stats()["background_waits"] == 0
        stalled, released = threading.Event(), threading.Event()

        def stall(offset: int, data: bytes) -> bytes:
            if offset > 0:
                stalled.set()
                released.wait(20)
            return data

        with Wire(pair.server.port, stall) as wire:
            target = make_pair(NUM_BLOCKS, num_layers=NUM_LAYERS, layer_bytes=LAYER_BYTES)
            with target as other:
                other.client.close()
                other.client = BlockClient(other.target, connections_per_peer_max=1)
                other.port = wire.port
                urgent = InThread(lambda: other.pull_named(pair.names))
                assert stalled.wait(10)
                assert pair.pull_named(background=True).blocks_ok == [True] * NUM_BLOCKS
                waits = pair.server.stats()["background_waits"]
                assert waits >= pair.source.data.nbytes // (256 << 10) // 2
                released.set()
                assert urgent.result().blocks_ok == [True] * NUM_BLOCKS
