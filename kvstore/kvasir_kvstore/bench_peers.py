"""Transfer libraries beside which the data plane is measured, where they are installed.

Both ends run in this process, as in the other paths; neither library checks what it moves.
"""

import importlib
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np

Move = Callable[[], None]
Path = Callable[[int], AbstractContextManager[Move]]

_NIXL = "nixl._api"
_MOONCAKE = "mooncake.engine"
_MEMORY = "DRAM"
_HOST = "127.0.0.1"


def make_peer_paths(report: Callable[[str], None]) -> dict[str, Path]:
    """The paths whose library can be loaded; `report` gets a line for each that cannot."""
    paths: dict[str, Path] = {}
    for name, module, path in (("nixl", _NIXL, _nixl), ("mooncake", _MOONCAKE, _mooncake)):
        try:
            importlib.import_module(module)
        except ImportError as error:
            report(f"{name:13} is not measured: {error}")
        else:
            paths[name] = path
    return paths


@contextmanager
def _nixl(size: int) -> Iterator[Move]:
    """A read through UCX, which picks shared memory on one machine."""
    api = importlib.import_module(_NIXL)
    source = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    target = np.zeros_like(source)
    reader, owner = (
        api.nixl_agent(name, api.nixl_agent_config(backends=["UCX"]))
        for name in ("reader", "owner")
    )
    for agent, memory in ((reader, target), (owner, source)):
        agent.register_memory([(memory.ctypes.data, size, 0, "")], _MEMORY)
    peer = reader.add_remote_agent(owner.get_agent_metadata())
    local = reader.get_xfer_descs([(target.ctypes.data, size, 0)], _MEMORY)
    remote = owner.get_xfer_descs([(source.ctypes.data, size, 0)], _MEMORY)
    handle = reader.initialize_xfer("READ", local, remote, peer)

    def move() -> None:
        state = reader.transfer(handle)
        while state != "DONE":
            if state == "ERR":
                raise ConnectionError("NIXL: the transfer failed")
            state = reader.check_xfer_state(handle)

    yield move
    reader.release_xfer_handle(handle)


@contextmanager
def _mooncake(size: int) -> Iterator[Move]:
    """A read of Mooncake's transfer engine over TCP."""
    api = importlib.import_module(_MOONCAKE)
    source = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    target = np.zeros_like(source)
    owner, reader = api.TransferEngine(), api.TransferEngine()
    for engine, memory in ((owner, source), (reader, target)):
        if engine.initialize(f"{_HOST}:{_free_port()}", "P2PHANDSHAKE", "tcp", ""):
            raise ConnectionError("Mooncake: the transfer engine does not start")
        engine.register_memory(memory.ctypes.data, size)
    peer = f"{_HOST}:{owner.get_rpc_port()}"

    def move() -> None:
        if reader.transfer_sync_read(peer, target.ctypes.data, source.ctypes.data, size):
            raise ConnectionError("Mooncake: the transfer failed")

    yield move
    for engine, memory in ((owner, source), (reader, target)):
        engine.unregister_memory(memory.ctypes.data)


def _free_port() -> int:
    with socket.create_server((_HOST, 0)) as holder:
        return int(holder.getsockname()[1])
