"""NIXL as what moves the bytes of pulls, by RDMA or what else UCX finds between two nodes.

Everything else stays the data plane's: who is asked, what is held, and the checksum of what came.
Reads go into staging memory, from where the native code copies what it has verified: a read that
cannot be called off keeps its piece of staging memory until it ends, and never writes to a block.
"""

import importlib
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from kvasir_proto.errors import KvasirError, Reason

from kvasir_kvstore._native import BlockPool

log = logging.getLogger(__name__)

STAGE_BYTES_MIN = 4 << 20
STAGES = 4
PEERS_MAX = 256
POLL_S = 20e-6
POLL_S_MAX = 1e-3
_MEMORY = "DRAM"


def new_agent() -> Any:
    """One end of NIXL transfers.

    Raises:
        KvasirError: UNSUPPORTED: NIXL is not installed, or does not work here.
    """
    try:
        api = importlib.import_module("nixl._api")
        config = api.nixl_agent_config(
            backends=["UCX"], sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        )
        return api.nixl_agent(os.urandom(16).hex(), config)
    except Exception as error:  # the library raises many kinds
        raise _unusable(error) from error


def _unusable(error: Exception) -> KvasirError:
    return KvasirError(
        Reason.UNSUPPORTED, f"NIXL does not work here: {error}", param="kv_transport"
    )


class NixlReads:
    """Reads of peers' pools, and of this one by peers. Thread-safe; see RemoteReads of _native."""

    def __init__(self, pool: BlockPool) -> None:
        """Registers the pool's memory with NIXL.

        Raises:
            KvasirError: UNSUPPORTED: NIXL is not installed, or does not work here.
        """
        self.bytes_max = max(STAGE_BYTES_MIN, pool.layer_bytes)
        self._pool = pool
        self._stages = np.zeros((STAGES, self.bytes_max), np.uint8)
        self._lock = threading.Lock()
        self._peers: OrderedDict[bytes, str] = OrderedDict()
        self._free = [row.ctypes.data for row in self._stages]
        self._abandoned: list[tuple[Any, int]] = []
        """Handles of reads that could not be called off, and where they write."""
        self._agent = new_agent()
        try:
            for memory in (pool.data, self._stages):
                self._agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], _MEMORY)
            self.agent: bytes = self._agent.get_agent_metadata()
            """What peers must know to read the pool."""
        except Exception as error:
            raise _unusable(error) from error

    def read(
        self,
        agent: bytes,
        pieces: Sequence[tuple[int, int]],
        timeout_ms: int,
        is_ended: Callable[[], bool],
    ) -> int:
        """Reads pieces (address, bytes) of a peer; where they lie, to be released. 0: it failed."""
        until_s = time.monotonic() + timeout_ms / 1000

        def goes_on() -> bool:
            return time.monotonic() < until_s and not is_ended()

        stage = self._take_stage(goes_on)
        if not stage:
            return 0
        handle = None
        try:
            handle = self._start(agent, pieces, stage)
            state, pause_s = self._agent.transfer(handle), POLL_S
            while state == "PROC" and goes_on():
                time.sleep(pause_s)
                pause_s = min(POLL_S_MAX, pause_s * 1.2)
                state = self._agent.check_xfer_state(handle)
            problem = "" if state in ("DONE", "PROC") else f"state {state}"
        except Exception as error:  # noqa: BLE001 - the staging memory must come back
            state, problem = "ERR", f"{type(error).__name__}: {error}"
        if problem:
            log.warning("a NIXL read failed: %s", problem)
            self._forget(agent)
        is_over = handle is None or self._let_go(handle, stage)
        if state == "DONE" and is_over:
            return stage
        if is_over:
            self.release(stage)
        return 0

    def release(self, stage: int) -> None:
        """The bytes of a read have been taken."""
        with self._lock:
            self._free.append(stage)

    def _take_stage(self, goes_on: Callable[[], bool]) -> int:
        """Staging memory; 0 if none became free in time."""
        while True:
            with self._lock:
                if self._free:
                    return self._free.pop()
            self._collect_abandoned()
            if not goes_on():
                return 0
            time.sleep(POLL_S_MAX)

    def _start(self, agent: bytes, pieces: Sequence[tuple[int, int]], stage: int) -> Any:
        sizes = [size for _, size in pieces]
        starts = [stage, *(stage + int(end) for end in np.cumsum(sizes[:-1]))]
        local = [(start, size, 0) for start, size in zip(starts, sizes, strict=True)]
        remote = [(address, size, 0) for address, size in pieces]
        return self._agent.initialize_xfer(
            "READ",
            self._agent.get_xfer_descs(local, _MEMORY),
            self._agent.get_xfer_descs(remote, _MEMORY),
            self._peer(agent),
        )

    def _peer(self, agent: bytes) -> str:
        """The peer's name for NIXL, which connects to it at the first read."""
        with self._lock:
            if agent == self.agent:
                return str(self._agent.name)
            if agent not in self._peers:
                if len(self._peers) >= PEERS_MAX:
                    self._agent.remove_remote_agent(self._peers.popitem(last=False)[1])
                name = self._agent.add_remote_agent(agent)
                self._peers[agent] = name.decode() if isinstance(name, bytes) else name
            self._peers.move_to_end(agent)
            return self._peers[agent]

    def _forget(self, agent: bytes) -> None:
        """The next read connects anew."""
        with self._lock:
            name = self._peers.pop(agent, None)
            if name is not None:
                try:
                    self._agent.remove_remote_agent(name)
                except Exception as error:  # noqa: BLE001 - it is gone already
                    log.debug("NIXL does not forget a peer: %s", error)

    def _let_go(self, handle: Any, stage: int) -> bool:
        """Ends the read if it still runs; False: it may write to its stage yet."""
        try:
            self._agent.release_xfer_handle(handle)
        except Exception:  # noqa: BLE001 - it cannot be called off
            with self._lock:
                self._abandoned.append((handle, stage))
            return False
        return True

    def _collect_abandoned(self) -> None:
        with self._lock:
            abandoned, self._abandoned = self._abandoned, []
        for handle, stage in abandoned:
            if self._let_go(handle, stage):
                self.release(stage)
