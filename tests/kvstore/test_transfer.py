"""Pulling blocks from a peer over TCP: named blocks, sessions, refusals and failures."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from kvasir_kvstore._native import BlockClient, BlockServer
from kvstore_builders import (
    EPOCH,
    UID,
    InThread,
    Wire,
    fill,
    free_port,
    make_pair,
    make_pool,
    name_of,
    random_uid,
    wait_until,
)


def test_named_blocks_arrive_whole_and_equal() -> None:
    with make_pair() as pair:
        names = pair.publish(4)
        result = pair.pull_named(names, [7, 2, 0, 5])
        assert result.error == ""
        assert result.blocks_ok == [True] * 4
        assert result.bytes_moved == 4 * 768
        for source, target in enumerate([7, 2, 0, 5]):
            assert np.array_equal(pair.target.data[target], pair.source.data[source])
            assert pair.target.ready[target] == 3
        assert pair.target.ready[1] == 0
        wait_until(lambda: pair.server.stats()["blocks_sent"] == 4, "the server to count")
        assert pair.server.stats()["bytes_sent"] == 4 * 768


def test_blocks_larger_than_a_frame_arrive_equal() -> None:
    with make_pair(3, num_layers=5, layer_bytes=200_000) as pair:
        pair.publish(3)
        assert pair.pull_named().blocks_ok == [True] * 3
        assert np.array_equal(pair.target.data, pair.source.data)


def test_a_block_that_the_peer_lacks_is_a_miss_and_no_error() -> None:
    with make_pair() as pair:
        names = pair.publish(2)
        result = pair.pull_named([names[0], name_of(99), names[1]])
        assert result.error == ""
        assert result.blocks_ok == [True, False, True]
        assert list(pair.target.ready[:3]) == [3, 0, 3]


def test_a_block_that_changed_after_it_was_first_sent_is_not_taken() -> None:
    with make_pair() as pair:
        names = pair.publish(2)
        assert pair.pull_named().error == ""
        pair.source.data[1, 700] ^= 4
        result = pair.pull_named()
        assert (result.error, result.blocks_ok) == ("bad_frame", [True, False])
        wait_until(lambda: pair.source.unpublish(names[1]), "the sender to let go of it")
        pair.source.publish(names[1], 1)  # other contents, as a new block's
        assert pair.pull_named().error == ""


def test_connections_are_kept_for_the_next_pull() -> None:
    with make_pair() as pair:
        pair.publish(1)
        for _ in range(5):
            assert pair.pull_named().error == ""
        assert pair.server.stats()["connections"] == 1


def test_a_connection_that_the_peer_closed_meanwhile_is_replaced() -> None:
    with make_pair() as pair:
        pair.publish(1)
        assert pair.pull_named().error == ""
        port = pair.server.port
        pair.server.stop()
        pair.server = BlockServer(pair.source, host="127.0.0.1", port=port, uid=UID, epoch=EPOCH)
        assert pair.pull_named().error == ""


def test_parallel_pulls_wait_for_one_of_the_peers_connections() -> None:
    with make_pair(32) as pair:
        names = pair.publish(16)
        pulls = [
            InThread(lambda i=i: pair.pull_named([names[i]], [16 + i]))  # type: ignore[misc]
            for i in range(16)
        ]
        assert [pull.result().blocks_ok for pull in pulls] == [[True]] * 16
        assert pair.server.stats()["connections"] <= 4
        assert np.array_equal(pair.target.data[16:], pair.source.data[:16])


@pytest.mark.parametrize(
    ("uid", "epoch"),
    [(UID, EPOCH - 1), (UID, EPOCH + 1), (random_uid(), EPOCH)],
    ids=["earlier life", "later life", "another process"],
)
def test_another_life_of_the_peer_is_refused(uid: bytes, epoch: int) -> None:
    with make_pair() as pair:
        pair.publish(1)
        result = pair.pull_named(uid=uid, epoch=epoch)
        assert (result.error, result.blocks_ok) == ("stale_peer", [False])
        assert pair.target.ready[0] == 0
        assert pair.server.stats()["stale_refused"] == 1


@pytest.mark.parametrize(
    "shape",
    [{"digest": b"another layout!!"}, {"num_layers": 4}, {"layer_bytes": 512}],
    ids=lambda shape: next(iter(shape)),
)
def test_another_layout_is_refused(shape: dict[str, object]) -> None:
    with make_pair() as pair:
        names = pair.publish(1)
        client = BlockClient(make_pool(**shape))  # type: ignore[arg-type]
        result = client.pull_named(
            host="127.0.0.1",
            port=pair.server.port,
            uid=UID,
            epoch=EPOCH,
            names=names,
            blocks=[0],
            timeout_ms=5000,
        )
        assert (result.error, result.blocks_ok) == ("other_layout", [False])
        assert pair.server.stats()["layout_refused"] == 1


def test_nobody_listening_is_unreachable_at_once() -> None:
    with make_pair() as pair:
        pair.publish(1)
        pair.port = free_port()
        start = time.monotonic()
        assert pair.pull_named().error == "unreachable"
        assert time.monotonic() - start < 5


def test_a_host_that_does_not_resolve_is_unreachable() -> None:
    client = BlockClient(make_pool())
    result = client.pull_named(
        host="no-such-host.invalid",
        port=1,
        uid=UID,
        epoch=EPOCH,
        names=[name_of(1)],
        blocks=[0],
        timeout_ms=2000,
    )
    assert result.error == "unreachable"


def test_a_peer_that_says_nothing_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute, make_pair() as pair:
        pair.publish(1)
        pair.port = mute.getsockname()[1]
        start = time.monotonic()
        assert pair.pull_named(timeout_ms=150).error == "timeout"
        assert time.monotonic() - start < 5


def test_something_that_is_not_a_peer_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as web, make_pair() as pair:
        pair.publish(1)
        pair.port = web.getsockname()[1]
        pull = InThread(pair.pull_named)
        connection = web.accept()[0]
        with connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"x" * 100)
            assert pull.result().error == "refused"


def test_garbage_to_the_server_is_counted_and_disturbs_nobody() -> None:
    with make_pair() as pair:
        pair.publish(1)
        with socket.create_connection(("127.0.0.1", pair.server.port)) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" + b"x" * 200)
            sock.settimeout(5)
            while sock.recv(4096):
                pass
        assert pair.server.stats()["bad_requests"] == 1
        assert pair.pull_named().error == ""


@pytest.mark.parametrize(
    ("blocks", "error"),
    [([0, 0], ValueError), ([0, 8], IndexError), ([0], ValueError)],
    ids=["twice", "beyond the pool", "fewer than names"],
)
def test_blocks_that_cannot_be_written_are_refused(
    blocks: list[int], error: type[Exception]
) -> None:
    with make_pair() as pair:
        names = pair.publish(2)
        with pytest.raises(error):
            pair.pull_named(names, blocks)


def test_a_published_block_is_never_written_to() -> None:
    with make_pair() as pair:
        pair.publish(1)
        before = fill(pair.target, 3, seed=50)
        pair.target.publish(name_of(50), 3)
        with pytest.raises(ValueError, match="published"):
            pair.pull_named(pair.names, [3])
        assert np.array_equal(pair.target.data[3], before)


def test_a_port_that_is_taken_is_an_os_error() -> None:
    with make_pair() as pair, pytest.raises(OSError, match="cannot listen"):
        BlockServer(pair.source, host="127.0.0.1", port=pair.server.port, uid=UID, epoch=EPOCH)


def test_a_session_streams_layer_by_layer_while_the_source_computes() -> None:
    with make_pair() as pair:
        source, target = pair.source, pair.target
        contents = [fill(source, block, seed=block) for block in (4, 6)]
        source.ready[:] = 0
        source.open_session(77)
        source.extend_session(77, [4, 6])
        pull = InThread(lambda: pair.pull_session(77, [1, 0]))
        for layers in (1, 2, 3):
            for index, block in enumerate((4, 6)):
                source.ready[block] = layers
                source.progress[0] += 1
                wait_until(
                    lambda i=index, n=layers: target.ready[[1, 0][i]] == n,  # type: ignore[misc]
                    f"layer {layers} of block {block}",
                )
                pair.assert_only_right_bytes_are_ready([1, 0], [4, 6])
        assert pull.is_running
        assert not source.session_pulled(77)
        source.finish_session(77)
        result = pull.result()
        assert (result.error, result.blocks_ok) == ("", [True, True])
        assert np.array_equal(target.data[1], contents[0])
        assert np.array_equal(target.data[0], contents[1])
        wait_until(lambda: source.session_pulled(77), "the acknowledgement")
        assert source.close_session(77)


def test_blocks_added_while_the_session_runs_are_sent() -> None:
    with make_pair() as pair:
        for block in range(4):
            fill(pair.source, block, seed=block)
        pair.source.open_session(1)
        pull = InThread(lambda: pair.pull_session(1, [3, 2, 1, 0]))
        for block in range(4):
            pair.source.extend_session(1, [block])
            target = 3 - block
            wait_until(lambda i=target: pair.target.ready[i] == 3, "it")  # type: ignore[misc]
        pair.source.finish_session(1)
        assert pull.result().blocks_ok == [True] * 4


def test_a_pull_waits_for_its_session_to_open() -> None:
    with make_pair() as pair:
        pull = InThread(lambda: pair.pull_session(5, [0]))
        wait_until(lambda: pair.server.stats()["connections"] == 1, "the puller")
        fill(pair.source, 2, seed=2)
        pair.source.open_session(5)
        pair.source.extend_session(5, [2])
        pair.source.finish_session(5)
        assert pull.result().blocks_ok == [True]


def test_an_empty_session_is_pulled() -> None:
    with make_pair() as pair:
        pair.source.open_session(5)
        pair.source.finish_session(5)
        assert pair.pull_session(5, []).error == ""
        wait_until(lambda: pair.source.session_pulled(5), "the acknowledgement")


def test_a_session_that_never_opens_times_out() -> None:
    with make_pair() as pair:
        result = pair.pull_session(5, [0], timeout_ms=120)
        assert (result.error, result.blocks_ok) == ("timeout", [False])


def test_an_aborted_session_ends_the_pull_and_can_be_closed() -> None:
    with make_pair() as pair:
        fill(pair.source, 0, seed=1)
        pair.source.ready[0] = 2
        pair.source.open_session(9)
        pair.source.extend_session(9, [0])
        pull = InThread(lambda: pair.pull_session(9, [4]))
        wait_until(lambda: pair.target.ready[4] == 2, "two layers")
        assert not pair.source.close_session(9)
        pair.source.abort_session(9)
        result = pull.result()
        assert (result.error, result.blocks_ok) == ("aborted", [False])
        assert pair.target.ready[4] == 0
        wait_until(lambda: pair.source.close_session(9), "the sender to let go")
        assert not pair.source.session_pulled(9)
        assert pair.pull_session(9, [4]).error == "aborted"


def test_a_session_with_fewer_blocks_than_asked_for_is_not_whole() -> None:
    with make_pair() as pair:
        fill(pair.source, 0, seed=1)
        pair.source.open_session(9)
        pair.source.extend_session(9, [0])
        pair.source.finish_session(9)
        result = pair.pull_session(9, [4, 5])
        assert (result.error, result.blocks_ok) == ("aborted", [True, False])
        assert not pair.source.session_pulled(9)


def test_a_session_with_more_blocks_than_there_is_room_for_is_refused() -> None:
    with make_pair() as pair:
        pair.source.open_session(9)
        pair.source.extend_session(9, [0, 1])
        assert pair.pull_session(9, [4]).error == "refused"


def test_a_cancelled_pull_ends_and_frees_the_session() -> None:
    with make_pair() as pair:
        fill(pair.source, 0, seed=1)
        pair.source.ready[0] = 1
        pair.source.open_session(9)
        pair.source.extend_session(9, [0])
        pull = InThread(lambda: pair.pull_session(9, [4], cancel_id=123))
        wait_until(lambda: pair.target.ready[4] == 1, "one layer")
        pair.client.cancel(123)
        result = pull.result(5)
        assert (result.error, result.blocks_ok) == ("cancelled", [False])
        assert pair.target.ready[4] == 0
        wait_until(lambda: pair.source.close_session(9), "the sender to notice")


def test_a_pull_cancelled_before_it_began_does_nothing() -> None:
    with make_pair() as pair:
        pair.publish(1)
        pair.client.cancel(7)
        assert pair.pull_named(cancel_id=7).error == "cancelled"
        assert pair.pull_named(cancel_id=7).error == ""


def test_stopping_the_server_ends_running_transfers() -> None:
    with make_pair() as pair:
        pair.source.open_session(1)
        pulls = [
            InThread(lambda: pair.pull_session(1, [0])),
            InThread(lambda: pair.pull_session(2, [1])),
        ]
        wait_until(lambda: pair.server.stats()["connections"] == 2, "both pulls")
        start = time.monotonic()
        pair.server.stop()
        assert time.monotonic() - start < 5
        assert {pull.result(5).error for pull in pulls} == {"unreachable"}
        assert pair.source.close_session(1)


def test_closing_the_client_ends_its_pulls() -> None:
    with make_pair() as pair:
        pull = InThread(lambda: pair.pull_session(1, [0]))
        wait_until(lambda: pair.server.stats()["connections"] == 1, "the pull")
        pair.client.close()
        assert pull.result(5).error == "cancelled"
        assert pair.pull_session(1, [0]).error == "cancelled"


def test_idle_connections_make_room_for_new_ones() -> None:
    pool = make_pool()
    fill(pool, 0, seed=1)
    pool.publish(name_of(1), 0)
    server = BlockServer(pool, host="127.0.0.1", port=0, uid=UID, epoch=EPOCH, connections_max=2)
    clients = [BlockClient(make_pool()) for _ in range(6)]

    def pull(client: BlockClient) -> str:
        return client.pull_named(
            host="127.0.0.1",
            port=server.port,
            uid=UID,
            epoch=EPOCH,
            names=[name_of(1)],
            blocks=[0],
            timeout_ms=5000,
        ).error

    for client in clients:
        wait_until(lambda c=client: pull(c) == "", "room for the connection")  # type: ignore[misc]
    assert server.stats()["connections"] <= 2
    for client in clients:
        client.close()
    server.stop()


def test_a_pinned_block_is_not_evicted_under_its_reader() -> None:
    """A transfer that stalls holds its block; the owner is told to take another victim."""
    reached, gate = threading.Event(), threading.Event()

    def stall(offset: int, data: bytes) -> bytes:
        if offset > 0:  # past the hello
            reached.set()
            gate.wait(10)
        return data

    with (
        make_pair(1, num_layers=8, layer_bytes=4 << 20) as pair,  # more than sockets buffer
        Wire(pair.server.port, stall) as wire,
    ):
        names = pair.publish(1)
        pair.port = wire.port
        pull = InThread(pair.pull_named)
        assert reached.wait(10)
        assert not pair.source.unpublish(names[0])
        gate.set()
        assert pull.result().blocks_ok == [True]
        assert np.array_equal(pair.target.data, pair.source.data)
        wait_until(lambda: pair.source.unpublish(names[0]), "the pin to go")


def test_eviction_races_pulls_and_no_wrong_byte_arrives() -> None:
    """The owner recycles blocks as fast as it can while a peer pulls them by name."""
    with make_pair(4, num_layers=4, layer_bytes=4096) as pair:
        source = pair.source
        stop = threading.Event()

        def churn() -> None:
            number = 0
            while not stop.is_set():
                for block in range(4):
                    name = name_of(block)
                    if source.unpublish(name):
                        source.reset(block)
                        number += 1
                        source.data[block] = number % 251
                        source.ready[block] = 4
                        source.publish(name, block)

        thread = threading.Thread(target=churn)
        thread.start()
        pulled = 0
        try:
            for _ in range(300):
                result = pair.pull_named([name_of(i) for i in range(4)])
                assert result.error == ""
                for block in range(4):
                    if result.blocks_ok[block]:
                        pulled += 1
                        content = pair.target.data[block]
                        assert (content == content[0]).all(), "a block changed under the transfer"
        finally:
            stop.set()
            thread.join()
        assert pulled > 100


_PEER = """
import sys
from kvstore_builders import EPOCH, UID, fill, make_pool, name_of
from kvasir_kvstore._native import BlockServer
pool = make_pool(4, num_layers=4, layer_bytes=1 << 20)
for block in range(4):
    fill(pool, block, seed=block)
    pool.publish(name_of(block), block)
pool.ready[3] = 2
pool.open_session(1)
pool.extend_session(1, [0, 1, 2, 3])
server = BlockServer(pool, host="127.0.0.1", port=0, uid=UID, epoch=EPOCH)
print(server.port, flush=True)
sys.stdin.read()
"""


def test_a_peer_killed_in_mid_transfer_is_unreachable_and_leaves_nothing_half_ready() -> None:
    with make_pair(4, num_layers=4, layer_bytes=1 << 20) as pair:
        process = subprocess.Popen(
            [sys.executable, "-c", _PEER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.path.dirname(__file__)},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        with process, process.stdin, process.stdout:
            pair.port = int(process.stdout.readline())
            pull = InThread(lambda: pair.pull_session(1, [0, 1, 2, 3]))
            wait_until(lambda: pair.target.ready[3] == 2, "the last block's second layer")
            process.send_signal(signal.SIGKILL)
            result = pull.result(5)
        assert result.error == "unreachable"
        assert result.blocks_ok == [True, True, True, False]
        assert list(pair.target.ready) == [4, 4, 4, 0]
