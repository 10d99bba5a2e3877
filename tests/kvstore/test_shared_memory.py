"""Peers of one node: blocks are read from the owner's memory, and never wrongly."""

import mmap
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from kvasir_kvstore._native import BlockClient, BlockServer
from kvstore_builders import (
    EPOCH,
    UID,
    InThread,
    Pair,
    fill,
    make_pair,
    make_pool,
    name_of,
    wait_until,
)

SOCKET = f"{UID.hex()}.kv.sock"


def peer_maps() -> int:
    """Mappings of pools' memory files in this process."""
    return Path("/proc/self/maps").read_text().count("memfd:kvasir-kv")


def test_named_blocks_are_read_from_the_owners_memory(tmp_path: Path) -> None:
    with make_pair(num_layers=5, layer_bytes=200_000, socket_dir=str(tmp_path)) as pair:
        names = pair.publish(4)
        for _ in range(2):  # the owner makes the checksums for the first
            result = pair.pull_named([*names, name_of(99)], [7, 2, 0, 5, 4])
            assert (result.error, result.transport) == ("", "shm")
            assert result.blocks_ok == [True] * 4 + [False]
            assert result.bytes_moved == 4 * pair.source.data.shape[1]
            for source, target in enumerate([7, 2, 0, 5]):
                assert np.array_equal(pair.target.data[target], pair.source.data[source])
        wait_until(lambda: pair.server.stats()["blocks_sent"] == 8, "the server to count")
        assert pair.server.stats()["blocks_missed"] == 2
        assert list(pair.source.uses[:4]) == [2] * 4


def test_a_session_is_read_layer_by_layer(tmp_path: Path) -> None:
    with make_pair(socket_dir=str(tmp_path)) as pair:
        source, target = pair.source, pair.target
        fill(source, 4, seed=4)
        source.ready[4] = 0
        source.open_session(77)
        source.extend_session(77, [4])
        pull = InThread(lambda: pair.pull_session(77, [1]))
        for layers in (1, 2, 3):
            source.ready[4] = layers
            source.progress[0] += 1
            wait_until(lambda n=layers: target.ready[1] == n, "a layer")  # type: ignore[misc]
            pair.assert_only_right_bytes_are_ready([1], [4])
        source.finish_session(77)
        result = pull.result()
        assert (result.error, result.transport, result.blocks_ok) == ("", "shm", [True])
        wait_until(lambda: source.session_pulled(77), "the acknowledgement")
        assert source.close_session(77)


def test_a_peer_that_is_not_of_this_node_is_reached_by_tcp(tmp_path: Path) -> None:
    with make_pair() as pair:
        pair.publish(1)
        pair.client = BlockClient(pair.target, socket_dir=str(tmp_path))
        result = pair.pull_named()
        assert (result.error, result.transport) == ("", "tcp")


def test_another_life_of_the_peer_is_refused(tmp_path: Path) -> None:
    with make_pair(socket_dir=str(tmp_path)) as pair:
        pair.publish(1)
        assert pair.pull_named(epoch=EPOCH + 1).error == "stale_peer"
        pair.client = BlockClient(make_pool(num_layers=4), socket_dir=str(tmp_path))
        assert pair.pull_named().error == "other_layout"


def test_a_process_that_leaves_spares_the_socket_of_its_successor(tmp_path: Path) -> None:
    with make_pair(socket_dir=str(tmp_path)) as pair:
        pair.publish(1)
        before = pair.server
        pair.server = BlockServer(
            pair.source, host="127.0.0.1", port=0, uid=UID, epoch=EPOCH, socket_dir=str(tmp_path)
        )
        before.stop()
        assert pair.pull_named().transport == "shm"
        pair.server.stop()
        assert not list(tmp_path.iterdir())


def test_a_folder_needs_shared_memory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not shared"):
        BlockServer(
            make_pool(), host="127.0.0.1", port=0, uid=UID, epoch=1, socket_dir=str(tmp_path)
        )
    with pytest.raises(OSError, match="cannot listen"):
        BlockServer(
            make_pool(shared=True),
            host="127.0.0.1",
            port=0,
            uid=UID,
            epoch=1,
            socket_dir=str(tmp_path / "none"),
        )


def test_memory_that_changed_after_its_checksum_was_made_is_not_taken(tmp_path: Path) -> None:
    with make_pair(socket_dir=str(tmp_path)) as pair:
        pair.publish(2)
        assert pair.pull_named().error == ""
        pair.source.data[1, 700] ^= 4
        result = pair.pull_named()
        assert (result.error, result.frames_bad) == ("bad_frame", 1)
        assert result.blocks_ok == [True, False]
        assert list(pair.target.ready[:2]) == [3, 0]


def test_random_corruption_of_the_memory_is_never_taken(tmp_path: Path) -> None:
    rng = random.Random(5)
    with make_pair(4, layer_bytes=96, socket_dir=str(tmp_path)) as pair:
        pair.publish(4)
        assert pair.pull_named().error == ""
        whole = pair.source.data.copy()
        for _ in range(1000):
            block, at = rng.randrange(4), rng.randrange(3 * 96)
            size = rng.randrange(1, 40)
            noise = np.frombuffer(rng.randbytes(size), np.uint8)[: 3 * 96 - at]
            pair.source.data[block, at : at + size] = noise
            result = pair.pull_named()
            is_changed = not np.array_equal(pair.source.data, whole)
            assert result.blocks_ok == [not (is_changed and i == block) for i in range(4)]
            assert result.frames_bad == is_changed
            assert pair.target.ready[block] == (0 if is_changed else 3)
            pair.source.data[:] = whole


def test_eviction_races_readers_and_no_wrong_byte_arrives(tmp_path: Path) -> None:
    """The owner recycles blocks as fast as it can; readers hold nothing back."""
    with make_pair(4, num_layers=4, layer_bytes=4096, socket_dir=str(tmp_path)) as pair:
        source, stop = pair.source, threading.Event()

        def churn() -> None:
            number = 0
            while not stop.is_set():
                for block in range(4):
                    if source.unpublish(name_of(block)):  # not while its checksum is made
                        source.reset(block)
                        number += 1
                        source.data[block] = number % 251
                        source.ready[block] = 4
                        source.publish(name_of(block), block)

        thread = threading.Thread(target=churn)
        thread.start()
        pulled = 0
        try:
            for _ in range(2000):
                result = pair.pull_named([name_of(i) for i in range(4)])
                assert result.error == ""
                for block in range(4):
                    if result.blocks_ok[block]:
                        pulled += 1
                        content = pair.target.data[block]
                        assert (content == content[0]).all(), "a block changed under the reader"
        finally:
            stop.set()
            thread.join()
        assert pulled > 20


def test_the_memory_cannot_be_written_to_by_those_it_is_lent_to(tmp_path: Path) -> None:
    """A reader's own mapping: the descriptor is taken from its open files."""
    with make_pair(socket_dir=str(tmp_path)) as pair:
        pair.publish(1)
        assert pair.pull_named().error == ""
        for entry in Path("/proc/self/fd").iterdir():
            if "memfd:kvasir-kv" in os.readlink(entry):
                fd = int(entry.name)
                break
        with pytest.raises(PermissionError):
            mmap.mmap(fd, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)


_PEER = """
import sys
from kvstore_builders import EPOCH, UID, fill, make_pool, name_of
from kvasir_kvstore._native import BlockServer
pool = make_pool(4, num_layers=4, layer_bytes=1 << 20, shared=True)
for block in range(4):
    fill(pool, block, seed=block)
    pool.publish(name_of(block), block)
pool.ready[3] = 2
pool.open_session(1)
pool.extend_session(1, [0, 1, 2, 3])
server = BlockServer(
    pool, host="127.0.0.1", port=0, uid=UID, epoch=EPOCH, socket_dir=sys.argv[1]
)
print(server.port, flush=True)
sys.stdin.read()
"""


def start_peer(pair: Pair, folder: Path) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [sys.executable, "-c", _PEER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.path.dirname(__file__)},
    )
    assert process.stdout is not None
    pair.port = int(process.stdout.readline())
    return process


def test_a_peer_killed_in_mid_transfer_leaves_nothing_half_ready_and_no_memory(
    tmp_path: Path,
) -> None:
    with make_pair(4, num_layers=4, layer_bytes=1 << 20) as pair:
        pair.client = BlockClient(pair.target, socket_dir=str(tmp_path))
        before = peer_maps()
        with start_peer(pair, tmp_path) as process:
            assert pair.pull_named([name_of(i) for i in range(3)]).transport == "shm"
            assert peer_maps() > before
            pull = InThread(lambda: pair.pull_session(1, [0, 1, 2, 3]))
            wait_until(lambda: pair.target.ready[3] == 2, "the last block's second layer")
            process.send_signal(signal.SIGKILL)
            result = pull.result(5)
        assert result.error == "unreachable"
        assert result.blocks_ok == [True, True, True, False]
        assert list(pair.target.ready) == [4, 4, 4, 0]
        wait_until(lambda: peer_maps() == before, "the memory of the dead peer to be let go")
        assert (tmp_path / SOCKET).exists()
        other = make_pool(shared=True)
        server = BlockServer(
            other, host="127.0.0.1", port=0, uid=b"o" * 16, epoch=1, socket_dir=str(tmp_path)
        )
        assert not (tmp_path / SOCKET).exists(), "the dead peer's socket is swept"
        server.stop()
        assert not list(tmp_path.iterdir())
