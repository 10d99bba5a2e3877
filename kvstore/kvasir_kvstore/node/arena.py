"""A KV node's memory for blocks of one layout, with what serves and fills it.

The layout is that of the first offer: until then a node does not know how large a block is.
"""

import asyncio
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import common_pb2

from kvasir_kvstore._native import BlockPool, BlockServer, PullResult
from kvasir_kvstore.core.cache import BlockCache
from kvasir_kvstore.node.settings import KvNodeSettings
from kvasir_kvstore.pulls import NamedPuller

MIB = 1 << 20
LAYERS_MAX = 4096
LAYER_BYTES_MAX = 1 << 28
"""What a BlockPool takes."""


@dataclass(frozen=True, slots=True)
class Filled:
    """What came of an attempt to pull blocks."""

    committed: tuple[bytes, ...]
    evicted: tuple[bytes, ...]
    result: PullResult | None
    """None: nothing was pulled, since no slot could be had."""


class Arena:
    """Blocks of one layout."""

    def __init__(
        self,
        layout: common_pb2.KvLayout,
        settings: KvNodeSettings,
        address: common_pb2.PeerAddress,
        port_holder: socket.socket,
        *,
        on_change: Callable[[Sequence[bytes], Sequence[bytes]], None],
    ) -> None:
        """Takes address space and starts to serve on the address's data port.

        Args:
            layout: checked (check_layout).
            port_holder: has kept the data port so far; it is closed to make way.
            on_change: told of all names that come and go, whatever becomes of the call.

        Raises:
            KvasirError: not even one block fits.
            OSError: the port is taken.
        """
        self.layout = layout
        self._on_change = on_change
        num_slots = settings.memory_mb * MIB // layout.block_bytes
        if num_slots < 1 or layout.block_bytes // layout.num_layers > LAYER_BYTES_MAX:
            raise KvasirError(
                Reason.UNSUPPORTED,
                f"blocks of {layout.num_layers} layers and {layout.block_bytes} bytes do not fit"
                f" into {settings.memory_mb} MiB with layers of at most {LAYER_BYTES_MAX} bytes",
                param="layout",
            )
        plane = settings.data_plane
        self.cache = BlockCache(num_slots)
        self.pool = BlockPool(
            num_blocks=num_slots,
            num_layers=layout.num_layers,
            layer_bytes=layout.block_bytes // layout.num_layers,
            layout_digest=layout.digest,
            shared=bool(plane.socket_dir),
        )
        port_holder.close()
        self.server = BlockServer(
            self.pool,
            host=settings.host,
            port=address.data_port,
            uid=address.uid,
            epoch=address.epoch,
            connections_max=settings.connections_max,
            socket_dir=plane.socket_dir,
            key=plane.key,
        )
        self._puller = NamedPuller(self.pool, plane, pulls_max=settings.offers_running_max)

    async def fill(
        self, source: common_pb2.PeerAddress, names: Sequence[bytes], *, timeout_ms: int
    ) -> Filled:
        """Pulls these (missing) blocks: reserve, write, commit. Only what is whole is committed."""
        uses = self.pool.uses
        reservation = self.cache.reserve(
            names, evict=self.pool.unpublish, uses=lambda slot: int(uses[slot])
        )
        self._on_change((), reservation.evicted)
        if not reservation.names:
            return Filled((), reservation.evicted, None)
        committed: list[bytes] = []
        unfilled = set(reservation.names)
        try:
            result = await self._puller.pull(
                source,
                names=reservation.names,
                blocks=reservation.slots,
                timeout_ms=timeout_ms,
            )
            for name, slot, is_ok in zip(
                reservation.names, reservation.slots, result.blocks_ok, strict=True
            ):
                if is_ok:
                    self.pool.publish(name, slot)
                    self.cache.commit(name, uses=int(uses[slot]))
                    committed.append(name)
                    unfilled.remove(name)
        finally:
            self._on_change(committed, ())
            for name in unfilled:
                self.cache.abandon(name)
        return Filled(tuple(committed), reservation.evicted, result)

    async def close(self) -> None:
        """Ends all transfers."""
        await self._puller.close()
        await asyncio.to_thread(self.server.stop)


def check_layout(layout: common_pb2.KvLayout) -> None:
    """Raises KvasirError if the layout is malformed."""
    is_whole = 0 < layout.num_layers <= LAYERS_MAX and layout.block_bytes % layout.num_layers == 0
    if not is_whole or layout.block_bytes == 0 or len(layout.digest) != 16:
        raise KvasirError(Reason.INVALID_REQUEST, "the layout is malformed", param="layout")
