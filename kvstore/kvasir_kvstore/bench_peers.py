"""Transfer libraries beside which the data plane is measured, where they are installed.

Both ends run in this process, as in the other paths; NIXL does not check what it moves.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np

Move = Callable[[], None]
Path = Callable[[int], AbstractContextManager[Move]]

_NIXL = "nixl._api"
_MEMORY = "DRAM"


def make_peer_paths(report: Callable[[str], None]) -> dict[str, Path]:
    """The paths whose library can be loaded; `report` gets a line for each that cannot."""
    report("mooncake      is not measured: its wheel loads only beside the driver of a GPU")
    try:
        importlib.import_module(_NIXL)
    except ImportError as error:
        report(f"nixl          is not measured: {error}")
        return {}
    return {"nixl": _nixl}


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
