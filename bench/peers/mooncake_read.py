"""Mooncake's transfer engine as a peer of `kvasir bench kv`: a read over TCP.

Nothing of what is moved is checked.
"""

import socket
from contextlib import contextmanager

import numpy as np
from mooncake.engine import TransferEngine
from transfers import serve

HOST = "127.0.0.1"


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server((HOST, 0)) as holder:
        return holder.getsockname()[1]


@contextmanager
def moving(size: int):
    """Reads of one block of this size."""
    source = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    target = np.zeros_like(source)
    owner, reader = TransferEngine(), TransferEngine()
    for engine, memory in ((owner, source), (reader, target)):
        failed = engine.initialize(f"{HOST}:{free_port()}", "P2PHANDSHAKE", "tcp", "")
        assert not failed, "the transfer engine does not start"
        engine.register_memory(memory.ctypes.data, size)
    peer = f"{HOST}:{owner.get_rpc_port()}"

    def move() -> None:
        failed = reader.transfer_sync_read(peer, target.ctypes.data, source.ctypes.data, size)
        assert not failed, f"the transfer failed: {failed}"

    move()
    assert np.array_equal(source, target)
    yield move


serve(moving)
