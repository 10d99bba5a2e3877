"""What a request waits for passes what is moved in the background, which still comes to an end."""

import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from kvasir_kvstore._native import BlockClient
from kvstore_builders import EPOCH, UID, InThread, Wire, make_pair, make_pool, name_of, wait_until

NUM_BLOCKS = 16
LAYER_BYTES = 1 << 19  # with two layers: 16 MiB do not fit into what sockets hold


class Stall:
    """A wire that passes nothing on until it is released."""

    def __init__(self) -> None:
        self.is_reached = threading.Event()
        self.released = threading.Event()

    def __call__(self, _offset: int, data: bytes) -> bytes:
        if len(data) > 64:  # the greeting passes
            self.is_reached.set()
            self.released.wait(20)
        return data


@pytest.mark.parametrize("is_local", [False, True], ids=["tcp", "shared memory"])
def test_background_transfers_let_urgent_ones_pass_and_end(tmp_path: Path, is_local: bool) -> None:
    folder = str(tmp_path) if is_local else ""
    stall = Stall()
    with make_pair(NUM_BLOCKS, num_layers=2, layer_bytes=LAYER_BYTES, socket_dir=folder) as pair:
        names = pair.publish(NUM_BLOCKS)
        assert pair.pull_named(names[:1], [15], background=True).blocks_ok == [True]
        assert pair.server.stats()["background_waits"] == 0
        with Wire(pair.server.port, stall) as wire:
            target = make_pool(NUM_BLOCKS, num_layers=2, layer_bytes=LAYER_BYTES)
            client = BlockClient(target)
            urgent = InThread(
                lambda: client.pull_named(
                    host="127.0.0.1",
                    port=wire.port,
                    uid=UID,
                    epoch=EPOCH,
                    names=names,
                    blocks=list(range(NUM_BLOCKS)),
                    timeout_ms=20_000,
                )
            )
            assert stall.is_reached.wait(10)
            assert pair.pull_named(names[:4], background=True).blocks_ok == [True] * 4
            assert pair.server.stats()["background_waits"] > 0
            stall.released.set()
            assert urgent.result().blocks_ok == [True] * NUM_BLOCKS
            assert np.array_equal(target.data, pair.source.data)
            client.close()


def test_background_pulls_leave_connections_to_those_that_are_waited_for() -> None:
    accepted: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener, make_pair() as pair:

        def accept() -> None:
            while len(accepted) < 2:
                accepted.append(listener.accept()[0])

        acceptor = threading.Thread(target=accept)
        acceptor.start()
        pair.port = listener.getsockname()[1]
        pair.client = BlockClient(pair.target, connections_per_peer_max=2)

        def pull(number: int) -> InThread:
            return InThread(lambda: pair.pull_named([name_of(number)], [number], background=True))

        waiting = [pull(number) for number in range(3)]
        wait_until(lambda: len(accepted) == 1, "the background's only connection")
        waiting.append(InThread(lambda: pair.pull_named([name_of(9)], [7])))
        wait_until(lambda: len(accepted) == 2, "a connection of its own")
        pair.client.close()
        assert [one.result().error for one in waiting] == ["cancelled"] * 4
        acceptor.join(10)
        for connection in accepted:
            connection.close()
