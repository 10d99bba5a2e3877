"""Pulls by name from the event loop's side: a thread a pull, cancellable.

Invariant: when `pull` has returned or raised, also by cancellation, nothing writes to its blocks
any more, so they may be freed.
"""

import asyncio
import functools
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from kvasir_proto.v1 import common_pb2

from kvasir_kvstore._native import BlockClient, BlockPool, PullResult
from kvasir_kvstore.codecs import LinkCodecs
from kvasir_kvstore.core.codecs import RAW
from kvasir_kvstore.peers import DataPlane

UID_BYTES = 16
WATCH_INTERVAL_S = 0.002

GoesOn = Callable[[float], bool]
"""Asked while blocks arrive, with how many have; False ends the pull."""


def can_pull_from(source: common_pb2.PeerAddress) -> bool:
    """Whether the address, which comes from others, is complete: pulls from another raise."""
    has_port = 0 < source.data_port < 65536
    return bool(source.host) and has_port and len(source.uid) == UID_BYTES


class NamedPuller:
    """Pulls into one pool, at most `pulls_max` at a time; more wait."""

    def __init__(self, pool: BlockPool, plane: DataPlane, *, pulls_max: int) -> None:
        self._pool = pool
        self._client = BlockClient(
            pool,
            connections_per_peer_max=pulls_max,
            socket_dir=plane.socket_dir,
            key=plane.key,
            remote=plane.reads,
            **plane.codecs.shape,
        )
        self._block_bytes = pool.num_layers * pool.layer_bytes
        self.links = LinkCodecs(plane.codecs)
        self._executor = ThreadPoolExecutor(pulls_max, thread_name_prefix="kv-pull")
        self._cancel_ids = itertools.count(1)

    async def pull(
        self,
        source: common_pb2.PeerAddress,
        *,
        names: Sequence[bytes],
        blocks: Sequence[int],
        timeout_ms: int,
        background: bool = False,
        goes_on: GoesOn | None = None,
    ) -> PullResult:
        """Pulls names[i] into blocks[i]; see BlockClient.pull_named."""
        cancel_id = next(self._cancel_ids)
        codec = self.links.choose(source, num_bytes=len(blocks) * self._block_bytes)
        pull = functools.partial(
            self._client.pull_named,
            host=source.host,
            port=source.data_port,
            uid=source.uid,
            epoch=source.epoch,
            names=names,
            blocks=blocks,
            timeout_ms=timeout_ms,
            cancel_id=cancel_id,
            codec=codec,
            background=background,
        )
        future = self._executor.submit(pull)
        done = asyncio.ensure_future(asyncio.wrap_future(future))
        try:
            while goes_on is not None and not done.done():
                await asyncio.wait({done}, timeout=WATCH_INTERVAL_S)
                if not goes_on(self._num_arrived(blocks)):
                    self._client.cancel(cancel_id)
                    break
            result = await asyncio.shield(done)
        except asyncio.CancelledError:
            if not future.cancel():
                self._client.cancel(cancel_id)
            while not done.done():
                try:
                    await asyncio.wait({done})
                except asyncio.CancelledError:  # it ends within moments; freeing must follow it
                    continue
            raise
        if result.bytes_moved:
            self.links.pulled(
                source,
                transport=result.transport,
                codec=codec if result.is_lossy else RAW,
                bytes_wire=result.bytes_wire,
                wire_s=result.wire_s,
            )
        return result

    def _num_arrived(self, blocks: Sequence[int]) -> float:
        return float(self._pool.ready[list(blocks)].sum()) / self._pool.num_layers

    async def close(self) -> None:
        """Ends all pulls and waits for them."""
        await asyncio.to_thread(self._client.close)
        self._executor.shutdown(cancel_futures=True)
