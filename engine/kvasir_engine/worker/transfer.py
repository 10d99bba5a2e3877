"""Pulls over the data plane, from the event loop's side: one thread a pull, cancellable.

Invariant: when `Pull.stop` has returned, nothing writes to the pull's blocks any more, so they may
be freed. Results are counted, and failures of the path show in the worker's health.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from kvasir_kvstore._native import BlockClient, BlockPool, PullResult
from kvasir_kvstore.codecs import Link, LinkCodecs
from kvasir_kvstore.peers import DataPlane
from kvasir_proto.v1 import common_pb2

from kvasir_engine.worker.metrics import WorkerMetrics
from kvasir_engine.worker.state import TransferHealth

log = logging.getLogger(__name__)

_NOT_OF_THE_PATH = frozenset({"", "cancelled", "aborted", "stale_peer"})
"""Ends of a pull that say nothing against the path itself."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a pull brought. `num_leading`: blocks from the first on that are whole."""

    num_leading: int
    bytes_moved: int
    error: str
    transport: str = ""
    codec: str = "raw"
    bytes_wire: int = 0
    """As they came over TCP."""
    wire_s: float = 0.0


class Pull:
    """One pull in progress."""

    def __init__(self, future: "Future[Pulled]", cancel: Callable[[], None]) -> None:
        self._future = future
        self._cancel = cancel
        self._done = asyncio.ensure_future(asyncio.wrap_future(future))

    @property
    def done(self) -> "asyncio.Future[Pulled]":
        """Completes when the pull ends; wait for it, do not cancel it."""
        return self._done

    async def finish(self, *, timeout_s: float) -> Pulled:
        """Waits for the pull's end, and makes it end after `timeout_s`."""
        await asyncio.wait({self._done}, timeout=timeout_s)
        if self._done.done():
            return self._done.result()
        await self.stop()
        if self._done.cancelled():
            return Pulled(0, 0, "timeout")
        return replace(self._done.result(), error="timeout")

    async def stop(self) -> None:
        """Ends the pull; also if the caller is being cancelled, it returns after the last write."""
        if self._future.cancel():
            return
        self._cancel()
        cancelled: asyncio.CancelledError | None = None
        while not self._done.done():
            try:
                await asyncio.wait({self._done})
            except asyncio.CancelledError as error:  # stopping is quick; freeing must follow it
                cancelled = error
        if cancelled is not None:
            raise cancelled


class Puller:
    """Starts pulls into this worker's pool."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        health: TransferHealth,
        metrics: WorkerMetrics,
        max_pulls: int,
        plane: DataPlane,
    ) -> None:
        """`max_pulls`: more wait, behind pulls whose source may itself be waiting for its turn."""
        self._client = BlockClient(
            pool,
            socket_dir=plane.socket_dir,
            key=plane.key,
            remote=plane.reads,
            **plane.codecs.shape,
        )
        self._block_bytes = pool.num_layers * pool.layer_bytes
        self._links = LinkCodecs(plane.codecs)
        self._health = health
        self._metrics = metrics
        self._executor = ThreadPoolExecutor(max_pulls, thread_name_prefix="kv-pull")
        self._cancel_ids = itertools.count(1)
        self.failed_peer: common_pb2.PeerAddress | None = None
        """Whose KV failed to arrive last."""

    def session(
        self,
        source: common_pb2.PeerAddress,
        *,
        session_id: int,
        blocks: Sequence[int],
        timeout_ms: int,
        exact: bool = False,
    ) -> Pull:
        """Starts to pull a hand-off session into `blocks`; `exact`: as the source has them."""
        cancel_id = next(self._cancel_ids)
        num_bytes = len(blocks) * self._block_bytes
        codec = "raw" if exact else self._links.choose(source, num_bytes=num_bytes)

        def pull() -> Pulled:
            result = self._client.pull_session(
                host=source.host,
                port=source.data_port,
                uid=source.uid,
                epoch=source.epoch,
                session_id=session_id,
                blocks=blocks,
                timeout_ms=timeout_ms,
                cancel_id=cancel_id,
                codec=codec,
            )
            return _pulled(result, codec)

        return Pull(self._executor.submit(pull), lambda: self._client.cancel(cancel_id))

    def named(
        self,
        source: common_pb2.PeerAddress,
        *,
        names: Sequence[bytes],
        blocks: Sequence[int],
        timeout_ms: int,
        local: bool = True,
    ) -> Pull:
        """Starts to pull blocks by name into `blocks`; a name the source lacks is no error.

        `local`: False goes by TCP even to a peer of this node.
        """
        cancel_id = next(self._cancel_ids)

        def pull() -> Pulled:
            result = self._client.pull_named(
                host=source.host,
                port=source.data_port,
                uid=source.uid,
                epoch=source.epoch,
                names=names,
                blocks=blocks,
                timeout_ms=timeout_ms,
                cancel_id=cancel_id,
                local=local,
            )
            return _pulled(result, "raw")

        return Pull(self._executor.submit(pull), lambda: self._client.cancel(cancel_id))

    def ended(self, pulled: Pulled, *, source: common_pb2.PeerAddress) -> None:
        """Counts a hand-off's end; one of the path's failures also counts against its health."""
        if pulled.bytes_moved:
            self._links.pulled(
                source,
                transport=pulled.transport,
                codec=pulled.codec,
                bytes_wire=pulled.bytes_wire,
                wire_s=pulled.wire_s,
            )
        self._metrics.codec_bytes.labels(pulled.codec).inc(pulled.bytes_wire)
        self._metrics.kv_bytes.labels("handoff").inc(pulled.bytes_moved)
        self._metrics.handoff_bytes.labels(pulled.transport or "none").inc(pulled.bytes_moved)
        self._metrics.transfers.labels("handoff", pulled.error or "ok").inc()
        if not pulled.error:
            self._health.crossed()
            self.failed_peer = None
        if pulled.error in _NOT_OF_THE_PATH:
            return
        self.failed_peer = source
        self._health.failed(f"KV from {source.name} ({source.host}): {pulled.error}")
        log.warning(
            "KV transfer from %s (%s:%d) failed: %s; %d in a row",
            source.name,
            source.host,
            source.data_port,
            pulled.error,
            self._health.num_consecutive,
        )

    @property
    def links(self) -> list[Link]:
        """Over which hand-offs came, the latest last."""
        return self._links.known()

    def close(self) -> None:
        """Ends every pull and waits for its thread."""
        self._client.close()
        self._executor.shutdown(wait=True, cancel_futures=True)


def _pulled(result: PullResult, codec: str) -> Pulled:
    ok = result.blocks_ok
    num_leading = next((i for i, is_ok in enumerate(ok) if not is_ok), len(ok))
    return Pulled(
        num_leading,
        result.bytes_moved,
        result.error,
        result.transport,
        codec if result.is_lossy else "raw",
        result.bytes_wire,
        result.wire_s,
    )
