"""Pulls whose bytes a library reads from the peer's memory, here by a stand-in for NIXL."""

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from kvasir_kvstore._native import BlockClient, BlockServer
from kvstore_builders import EPOCH, UID, Pair, fill, make_pool, name_of, wait_until

AGENT = b"an agent"
LAYER_BYTES = 100 << 10


class FakeReads:
    """Copies within this process; tests look at, spoil or stop what it does."""

    def __init__(self, *, bytes_max: int = 1 << 20) -> None:
        self.bytes_max = bytes_max
        self.asked: list[list[int]] = []
        self.lent: dict[int, np.ndarray] = {}
        self.during: Callable[[np.ndarray, Callable[[], bool]], bool] = lambda _data, _ended: True

    def read(
        self,
        agent: bytes,
        pieces: list[tuple[int, int]],
        timeout_ms: int,
        is_ended: Callable[[], bool],
        /,
    ) -> int:
        assert agent == AGENT
        assert timeout_ms > 0
        self.asked.append([size for _, size in pieces])
        copy = np.frombuffer(b"".join(ctypes.string_at(*piece) for piece in pieces), np.uint8)
        stage = copy.copy()
        if not self.during(stage, is_ended):
            return 0
        self.lent[stage.ctypes.data] = stage
        return stage.ctypes.data

    def release(self, address: int, /) -> None:
        del self.lent[address]


@contextmanager
def remote_pair(reads: FakeReads | None, *, agent: bytes = AGENT) -> Iterator[Pair]:
    source, target = (make_pool(num_layers=6, layer_bytes=LAYER_BYTES) for _ in range(2))
    server = BlockServer(source, host="127.0.0.1", port=0, uid=UID, epoch=EPOCH, remote_agent=agent)
    client = BlockClient(target, remote=reads)
    try:
        yield Pair(source, target, server, client)
    finally:
        client.close()
        server.stop()
    assert reads is None or not reads.lent


def test_blocks_are_read_in_pieces_and_held_meanwhile() -> None:
    reads = FakeReads()
    with remote_pair(reads) as pair:
        pair.publish(3)
        held = []

        def during(_data: np.ndarray, _ended: Callable[[], bool]) -> bool:
            held.append(not pair.source.unpublish(name_of(1)))
            return True

        reads.during = during
        result = pair.pull_named([*pair.names, name_of(99)])
        assert (result.blocks_ok, result.error) == ([True, True, True, False], "")
        assert result.transport == "nixl"
        assert result.bytes_moved == result.bytes_wire == 3 * 6 * LAYER_BYTES
        pair.assert_only_right_bytes_are_ready([0, 1, 2], [0, 1, 2])
        assert all(held)
        assert all(sum(sizes) <= reads.bytes_max for sizes in reads.asked)
        stats = pair.server.stats()
        pair.pull_named([name_of(1)], [4])  # the same connection: the first pull is over there, too
        assert (stats["blocks_missed"], pair.server.stats()["connections"]) == (1, 1)
        wait_until(lambda: pair.source.unpublish(name_of(1)), "the second pull's end over there")


def test_a_session_is_read_as_it_grows() -> None:
    reads = FakeReads()
    with remote_pair(reads) as pair:
        pair.source.open_session(7)
        pair.source.extend_session(7, [0, 1])
        fill(pair.source, 0, seed=1)
        fill(pair.source, 1, seed=2)
        pair.source.finish_session(7)
        result = pair.pull_session(7, [3, 4])
        assert (result.blocks_ok, result.error, result.transport) == ([True, True], "", "nixl")
        pair.assert_only_right_bytes_are_ready([3, 4], [0, 1])
        assert pair.source.session_pulled(7)
        assert pair.source.close_session(7)


@pytest.mark.parametrize("byte", [0, 5 * LAYER_BYTES, 6 * LAYER_BYTES - 1])
def test_wrong_bytes_cost_their_block_only(byte: int) -> None:
    reads = FakeReads(bytes_max=8 << 20)
    with remote_pair(reads) as pair:
        pair.publish(2)

        def during(data: np.ndarray, _ended: Callable[[], bool]) -> bool:
            if data.size == 12 * LAYER_BYTES or len(reads.asked) == 1:
                data[byte % data.size] ^= 1
            return True

        reads.during = during
        result = pair.pull_named()
        assert (result.error, result.frames_bad) == ("bad_frame", 1)
        assert sorted(result.blocks_ok) == [False, True]
        spoilt = result.blocks_ok.index(False)
        assert pair.target.ready[spoilt] == 0
        pair.assert_only_right_bytes_are_ready([0, 1], [0, 1])


def test_a_read_that_fails_ends_the_pull_and_the_next_one_works() -> None:
    reads = FakeReads()
    with remote_pair(reads) as pair:
        pair.publish(1)
        reads.during = lambda _data, _ended: False
        result = pair.pull_named()
        assert (result.error, result.blocks_ok) == ("transport_failed", [False])
        assert pair.target.ready[0] == 0
        reads.during = lambda _data, _ended: True
        assert pair.pull_named().blocks_ok == [True]


@pytest.mark.parametrize("ends", ["cancel", "time"])
def test_a_read_that_does_not_end_is_ended(ends: str) -> None:
    reads = FakeReads()
    with remote_pair(reads) as pair:
        pair.publish(1)

        def during(_data: np.ndarray, is_ended: Callable[[], bool]) -> bool:
            if ends == "cancel":
                pair.client.cancel(5)
                assert is_ended()
            else:
                time.sleep(0.06)  # past the pull's deadline
            return False

        reads.during = during
        result = pair.pull_named(timeout_ms=20_000 if ends == "cancel" else 50, cancel_id=5)
        assert result.error == {"cancel": "cancelled", "time": "timeout"}[ends]
        assert result.blocks_ok == [False]


def test_a_peer_that_cannot_be_read_from_afar_refuses() -> None:
    with remote_pair(FakeReads(), agent=b"") as pair:
        pair.publish(1)
        result = pair.pull_named()
        assert (result.error, result.blocks_ok, result.transport) == (
            "other_transport",
            [False],
            "",
        )


def test_one_that_can_serves_tcp_too() -> None:
    with remote_pair(None) as pair:
        pair.publish(1)
        result = pair.pull_named()
        assert (result.blocks_ok, result.transport) == ([True], "tcp")


def test_another_life_or_layout_is_refused_before_anything_is_read() -> None:
    reads = FakeReads()
    with remote_pair(reads) as pair:
        pair.publish(1)
        assert pair.pull_named(epoch=EPOCH + 1).error == "stale_peer"
        stranger = make_pool(num_layers=6, layer_bytes=LAYER_BYTES, digest=b"x" * 16)
        client = BlockClient(stranger, remote=reads)
        other = Pair(pair.source, stranger, pair.server, client, names=pair.names)
        assert other.pull_named().error == "other_layout"
        client.close()
        assert reads.asked == []


def test_what_is_read_from_afar_has_no_key() -> None:
    pool = make_pool()
    with pytest.raises(ValueError, match="not encrypted"):
        BlockClient(pool, remote=FakeReads(), key=b"k" * 32)
    with pytest.raises(ValueError, match="not encrypted"):
        BlockServer(
            pool,
            host="127.0.0.1",
            port=0,
            uid=UID,
            epoch=EPOCH,
            key=b"k" * 32,
            remote_agent=AGENT,
        )
