"""Learns what the path to the KV nodes takes, by a fetch that no request waits for.

One at a time, of a few blocks, into memory of its own. A probe that fails tells nothing, and the
next one is not soon. It is as urgent as what it stands for, or it would measure how long transfers
in the background wait.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence

from kvasir_proto.errors import KvasirError

from kvasir_kvstore._native import BlockPool
from kvasir_kvstore.index import Location
from kvasir_kvstore.nodes import NodeSet
from kvasir_kvstore.peers import DataPlane, join_target
from kvasir_kvstore.pulls import NamedPuller

log = logging.getLogger(__name__)

PROBE_BLOCKS = 4
TIMEOUT_MS = 2_000
INTERVAL_S = 1.0
"""From one to the next: looking for blocks that nobody has asks as much of the nodes as a fetch."""

Locate = Callable[[Sequence[bytes], float], Awaitable[list[Location]]]
"""Runs that cover the leading part of the names, found by then (of `time.monotonic`)."""
Done = Callable[[float, float, int], None]
"""Told how long finding the blocks and their transfer took, in ms, and how many came."""


class PathProbe:
    """Probes for one pool's transfers. Belongs to one event loop."""

    def __init__(self, pool: BlockPool, plane: DataPlane, nodes: NodeSet) -> None:
        self._pool, self._plane, self._nodes = pool, plane, nodes
        self._task: asyncio.Task[None] | None = None
        self._ended_s = -math.inf

    def start(self, names: Sequence[bytes], locate: Locate, done: Done) -> None:
        """Begins one, unless one runs or just ended; `done` is called if it brings something."""
        is_running = self._task is not None and not self._task.done()
        if names and not is_running and time.monotonic() - self._ended_s >= INTERVAL_S:
            self._task = asyncio.create_task(self._run(names[:PROBE_BLOCKS], locate, done))

    async def close(self) -> None:
        """Ends the one that runs."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, names: Sequence[bytes], locate: Locate, done: Done) -> None:
        try:
            await self._fetch(names, locate, done)
        except Exception:
            log.exception("probing the path to the KV nodes failed")
        finally:
            self._ended_s = time.monotonic()

    async def _fetch(self, names: Sequence[bytes], locate: Locate, done: Done) -> None:
        started_s = time.monotonic()
        runs = await locate(names, started_s + TIMEOUT_MS / 1000)
        locate_ms = (time.monotonic() - started_s) * 1000
        if not runs:
            return
        run = runs[0]
        wanted = names[run.first : run.end]
        target = join_target(run.holder.host, run.holder.grpc_port)
        with contextlib.suppress(KvasirError):  # else the pull tells
            await self._nodes.load(target, wanted, timeout_ms=TIMEOUT_MS)
        puller = NamedPuller(self._memory(), self._plane, pulls_max=1)
        try:
            started_s = time.monotonic()
            result = await puller.pull(
                run.holder, names=wanted, blocks=range(len(wanted)), timeout_ms=TIMEOUT_MS
            )
            transfer_ms = (time.monotonic() - started_s) * 1000
        finally:
            await puller.close()
        if num_arrived := sum(result.blocks_ok):
            log.info(
                "%d KV blocks came in %.1f ms, found in %.1f", num_arrived, transfer_ms, locate_ms
            )
            done(locate_ms, transfer_ms, num_arrived)

    def _memory(self) -> BlockPool:
        return BlockPool(
            num_blocks=PROBE_BLOCKS,
            num_layers=self._pool.num_layers,
            layer_bytes=self._pool.layer_bytes,
            layout_digest=self._pool.layout_digest,
        )
