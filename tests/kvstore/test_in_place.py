"""Large answers are sent from where the blocks lie, which stay as they are until acknowledged."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from kvasir_kvstore._native import BlockClient
from kvstore_builders import InThread, Pair, Wire, make_pair, wait_until

GREETING_BYTES = 40
NUM_LAYERS = 3
LAYER_BYTES = 250_000  # not a multiple of a page


class Held:
    """A wire that takes in the whole answer and passes it on when told to."""

    def __init__(self, pair: Pair) -> None:
        num_blocks = len(pair.names)
        payload_bytes = num_blocks * NUM_LAYERS * LAYER_BYTES
        self._size = payload_bytes + 64 * (num_blocks * NUM_LAYERS + 1)
        self._answer = b""
        self.is_cut = False
        self.complete = threading.Event()
        self.released = threading.Event()

    def __call__(self, offset: int, data: bytes) -> bytes | None:
        if offset < GREETING_BYTES:
            return data
        self._answer += data
        if len(self._answer) < self._size:
            return b""
        self.complete.set()
        self.released.wait(20)
        return None if self.is_cut else self._answer


@contextmanager
def held_pull(num_blocks: int) -> Iterator[tuple[Pair, Held, InThread]]:
    """A pull over one connection whose answer has left its source and not yet arrived."""
    with make_pair(num_blocks, num_layers=NUM_LAYERS, layer_bytes=LAYER_BYTES) as pair:
        pair.client.close()
        pair.client = BlockClient(pair.target, connections_per_peer_max=1)
        pair.publish(num_blocks)
        held = Held(pair)
        with Wire(pair.server.port, held) as wire:
            pair.port = wire.port
            pull = InThread(pair.pull_named)
            assert held.complete.wait(10)
            yield pair, held, pull


def is_free(pair: Pair) -> bool:
    return all(pair.source.unpublish(name) for name in pair.names)


def test_blocks_are_not_reused_before_their_arrival_is_acknowledged() -> None:
    with held_pull(4) as (pair, held, pull):
        assert not any(pair.source.unpublish(name) for name in pair.names)
        with pytest.raises(ValueError, match="still published"):
            pair.source.reset(0)
        held.released.set()
        assert (pull.result().error, pull.result().blocks_ok) == ("", [True] * 4)
        assert np.array_equal(pair.target.data, pair.source.data)
        wait_until(lambda: is_free(pair), "the source to let go of the blocks")
        assert pair.server.stats()["connections"] == 1
        assert pair.server.stats()["blocks_sent"] == 4


def test_small_answers_are_copied_and_hold_nothing() -> None:
    with held_pull(1) as (pair, held, pull):
        wait_until(lambda: is_free(pair), "the source to let go of the block")
        pair.source.data[:] = 0  # what was sent is not what lies here now
        held.released.set()
        assert pull.result().blocks_ok == [True]


def test_a_puller_that_dies_before_it_acknowledges_lets_go_of_the_blocks() -> None:
    with held_pull(4) as (pair, held, pull):
        held.is_cut = True
        held.released.set()
        assert pull.result().error == "unreachable"
        wait_until(lambda: is_free(pair), "the source to let go of the blocks")


def test_a_connection_serves_on_after_an_acknowledgement() -> None:
    with make_pair(8, num_layers=NUM_LAYERS, layer_bytes=LAYER_BYTES) as pair:
        pair.client = BlockClient(pair.target, connections_per_peer_max=1)
        names = pair.publish(8)
        for count in (8, 1, 8, 2, 3):
            assert pair.pull_named(names[:count]).blocks_ok == [True] * count
        assert pair.server.stats()["connections"] == 1
        pair.client.close()
