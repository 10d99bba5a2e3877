"""NIXL as a peer of `kvasir bench kv`: a read through UCX, on one machine by shared memory.

UCX_TLS=tcp makes it take TCP. Nothing of what is moved is checked.
"""

from contextlib import contextmanager

import nixl._api as api
import numpy as np
from transfers import serve

MEMORY = "DRAM"


@contextmanager
def moving(size: int):
    """Reads of one block of this size."""
    source = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    target = np.zeros_like(source)
    reader, owner = (
        api.nixl_agent(name, api.nixl_agent_config(backends=["UCX"]))
        for name in ("reader", "owner")
    )
    for agent, memory in ((reader, target), (owner, source)):
        agent.register_memory([(memory.ctypes.data, size, 0, "")], MEMORY)
    peer = reader.add_remote_agent(owner.get_agent_metadata())
    local = reader.get_xfer_descs([(target.ctypes.data, size, 0)], MEMORY)
    remote = owner.get_xfer_descs([(source.ctypes.data, size, 0)], MEMORY)
    handle = reader.initialize_xfer("READ", local, remote, peer)

    def move() -> None:
        state = reader.transfer(handle)
        while state == "PROC":
            state = reader.check_xfer_state(handle)
        assert state == "DONE", f"the transfer ended as {state}"

    move()
    assert np.array_equal(source, target)
    yield move


serve(moving)
