"""A KV node's tiers for blocks of one layout, with what serves and fills them.

Decides in which tier a block is found: memory, from where peers pull it, or one below (disk, object
store), from where it is loaded into memory first. Invariant: a name is told of (`on_change`) as
stored while at least one tier holds it. The layout is that of the first offer, or of what an
earlier life left on disk.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import common_pb2

from kvasir_kvstore._native import BlockPool, BlockServer, PullResult
from kvasir_kvstore.core.cache import BlockCache, Held, Limits, Origin
from kvasir_kvstore.node.block_file import BlockFile, StoredBlock
from kvasir_kvstore.node.disk import DiskTier
from kvasir_kvstore.node.object_store import ObjectTier
from kvasir_kvstore.node.settings import KvNodeSettings
from kvasir_kvstore.node.upkeep import Upkeep
from kvasir_kvstore.peers import DataPlane
from kvasir_kvstore.pulls import NamedPuller

if TYPE_CHECKING:
    from obstore.store import S3Store

MIB = 1 << 20
LAYERS_MAX = 4096
LAYER_BYTES_MAX = 1 << 28
"""What a BlockPool takes."""
TRIM_BATCH = 64
"""Blocks given up in the background at a time."""
ROOM_WAIT_PART = 0.5
"""Of the time for a fill, which may be spent waiting until blocks in memory are written below."""
LOADS_MAX = 64
"""Blocks on their way from tiers below to memory; a load that meets the bound ends early."""


@dataclass(frozen=True, slots=True)
class Filled:
    """What came of an attempt to pull blocks."""

    committed: tuple[bytes, ...]
    results: tuple[PullResult, ...]
    """Of each pull; none: no slot could be had."""
    num_refused: int
    """Blocks that found no room, as those in memory were yet to be written below."""


class Arena:
    """Blocks of one layout. Belongs to one event loop."""

    def __init__(
        self,
        layout: common_pb2.KvLayout,
        settings: KvNodeSettings,
        address: common_pb2.PeerAddress,
        *,
        upkeep: Upkeep,
        now_ms: Callable[[], int],
        on_change: Callable[[Sequence[bytes], Sequence[bytes]], None],
    ) -> None:
        """Takes address space and starts to serve on the address's data port.

        Args:
            layout: checked (check_layout).
            upkeep: of the node.
            on_change: told of all names that come and go, whatever becomes of the call.

        Raises:
            KvasirError: not even one block fits.
            OSError: the port is taken.
        """
        self.layout = layout
        self._settings, self._now_ms, self._on_change = settings, now_ms, on_change
        self._upkeep = upkeep
        num_slots = settings.memory_mb * MIB // layout.block_bytes
        if num_slots < 1 or layout.block_bytes // layout.num_layers > LAYER_BYTES_MAX:
            raise KvasirError(
                Reason.UNSUPPORTED,
                f"blocks of {layout.num_layers} layers and {layout.block_bytes} bytes do not fit"
                f" into {settings.memory_mb} MiB with layers of at most {LAYER_BYTES_MAX} bytes",
                param="layout",
            )
        plane = settings.data_plane
        watermarks = (settings.memory_high, settings.memory_low)
        self.cache = BlockCache(self._limits(num_slots, watermarks=watermarks))
        self.pool = BlockPool(
            num_blocks=num_slots,
            num_layers=layout.num_layers,
            layer_bytes=layout.block_bytes // layout.num_layers,
            layout_digest=layout.digest,
            shared=bool(plane.socket_dir),
        )
        plane = plane.bound_to(self.pool)
        self.server = self._make_server(plane, address)
        self._puller = NamedPuller(self.pool, plane, pulls_max=settings.offers_running_max)
        self._uses_seen = self.pool.uses.copy()
        self._loads: dict[bytes, asyncio.Task[bool]] = {}
        self.below: list[DiskTier | ObjectTier] = []
        """The faster first."""
        self.num_evicted = 0
        """Blocks that the memory gave up for others that needed their slots at once."""
        self.num_trimmed = 0
        """Blocks that the memory gave up before that, above its high watermark."""
        self._is_crowded = asyncio.Event()
        self._settled = asyncio.Event()
        """Set, and replaced, when blocks have been written to a tier below, or will not be."""
        self._trimmer = upkeep.start(self._keep_room, name="making room")

    def _make_server(self, plane: DataPlane, address: common_pb2.PeerAddress) -> BlockServer:
        return BlockServer(
            self.pool,
            host=self._settings.host,
            port=address.data_port,
            uid=address.uid,
            epoch=address.epoch,
            connections_max=self._settings.connections_max,
            socket_dir=plane.socket_dir,
            key=plane.key,
            remote_agent=plane.remote_agent,
        )

    def attach_disk(self, file: BlockFile, blocks: Sequence[StoredBlock]) -> None:
        """From now on blocks go to disk, too, and those that are there are found."""
        num_slots = self.disk_slots(self._settings, self.layout)
        disk = DiskTier(
            file,
            self.pool,
            memory=self.cache,
            limits=self._limits(num_slots),
            upkeep=self._upkeep,
            now_ms=self._now_ms,
            on_gone=self._gone_from_below,
            on_settled=self._settle,
        )
        self.below.append(disk)
        disk.restore(blocks)
        self._on_change(disk.names(), ())

    def attach_store(self, store: "S3Store") -> None:
        """From now on blocks go to the object store, too, and those that are there are found."""
        tier = ObjectTier(
            store,
            self.pool,
            memory=self.cache,
            ttl_ms=self._settings.block_ttl_ms,
            upkeep=self._upkeep,
            now_ms=self._now_ms,
            on_change=self._changed_in_store,
            on_settled=self._settle,
        )
        self.below.append(tier)

    @staticmethod
    def disk_slots(settings: KvNodeSettings, layout: common_pb2.KvLayout) -> int:
        """Blocks that the disk may hold."""
        return max(1, settings.disk_mb * MIB // layout.block_bytes)

    def names(self) -> list[bytes]:
        """Names held in any tier."""
        below = [name for tier in self.below for name in tier.names()]
        return list(dict.fromkeys([*self.cache.names(), *below]))

    def blocks(self, *, on_disk: bool) -> dict[bytes, Held]:
        """What this node alone holds: in memory, and on disk if asked for."""
        found = self.cache.blocks(now_ms=self._now_ms())
        for tier in self.below if on_disk else ():
            if isinstance(tier, DiskTier):
                found = tier.blocks() | found
        return found

    def holds(self, name: bytes) -> bool:
        """Whether a tier has the block."""
        is_in_memory = self.cache.find(name, now_ms=self._now_ms()) is not None
        return is_in_memory or self._is_below(name)

    def num_leading(self, names: Sequence[bytes]) -> int:
        """How many of the names, from the first on, a tier has."""
        return next((i for i, name in enumerate(names) if not self.holds(name)), len(names))

    def missing(self, names: Sequence[bytes]) -> list[bytes]:
        """Names that no tier has and that are not on their way, each once, in order."""
        missing = self.cache.missing(names)
        return [name for name in missing if not self._is_below(name)]

    @property
    def is_behind(self) -> bool:
        """Whether blocks in memory are yet to be written to a tier below."""
        return any(tier.is_behind for tier in self.below)

    def touch(self, names: Sequence[bytes]) -> None:
        """The chain is wanted."""
        self.cache.touch(names)
        for tier in self.below:
            tier.touch(names)

    async def fill(
        self,
        source: common_pb2.PeerAddress,
        names: Sequence[bytes],
        origin: Origin,
        *,
        stored_ms: Mapping[bytes, int],
        timeout_ms: int,
        is_cold: bool = False,
    ) -> Filled:
        """Pulls these (missing) blocks; those that find no room wait until others are written.

        Args:
            stored_ms: of those that were stored elsewhere before.
            is_cold: displaces only what is below; refused while others are to be written.
        """
        started_s = time.monotonic()
        end_s = started_s + timeout_ms / 1000
        room_end_s = started_s + ROOM_WAIT_PART * timeout_ms / 1000
        committed: list[bytes] = []
        results: list[PullResult] = []
        left = list(names)
        while True:
            is_behind, settled = self.is_behind, self._settled
            slots = {}
            if not (is_cold and is_behind):
                slots = self._reserve(left, origin, stored_ms=stored_ms, is_cold=is_cold)
            if slots:
                left_ms = max(1, int((end_s - time.monotonic()) * 1000))
                whole, result = await self._pull(source, slots, timeout_ms=left_ms)
                committed += whole
                results.append(result)
            left = self.missing([name for name in left if name not in slots])
            may_wait = left and is_behind and not is_cold
            if not (may_wait and await _is_set(settled, until_s=room_end_s)):
                num_refused = len(left) if is_behind else 0
                return Filled(tuple(committed), tuple(results), num_refused)

    async def _pull(
        self, source: common_pb2.PeerAddress, slots: Mapping[bytes, int], *, timeout_ms: int
    ) -> tuple[list[bytes], PullResult]:
        """Write, commit: only what is whole is committed."""
        committed: list[bytes] = []
        unfilled = dict(slots)
        try:
            result = await self._puller.pull(
                source,
                names=list(slots),
                blocks=list(slots.values()),
                timeout_ms=timeout_ms,
                background=True,
            )
            whole = [name for name, is_ok in zip(slots, result.blocks_ok, strict=True) if is_ok]
            for name in reversed(whole):  # parents last: they are wanted most
                self._publish(name, unfilled[name])
                del unfilled[name]
                committed.append(name)
        finally:
            self._on_change(committed[::-1], ())
            for name in unfilled:
                self.cache.abandon(name)
        committed.reverse()
        for tier in self.below:
            tier.put(committed)
        return committed, result

    async def load(self, names: Sequence[bytes], *, timeout_ms: int, is_cold: bool = False) -> int:
        """Brings the leading part of the names into memory; how many of them are there then.

        `is_cold`: no request wants them.
        """
        leading: list[asyncio.Task[bool] | None] = []
        for name in names:
            is_here = self.cache.find(name, now_ms=self._now_ms()) is not None
            loading = None if is_here else self._loads.get(name) or self._start_load(name, is_cold)
            if not is_here and loading is None:
                break
            leading.append(loading)
        if not is_cold:
            self.touch(names[: len(leading)])
        running = {task for task in leading if task is not None}
        if running:
            await asyncio.wait(running, timeout=timeout_ms / 1000)
        for count, task in enumerate(leading):
            if task is not None and not (task.done() and task.result()):
                return count
        return len(leading)

    def expire(self) -> int:
        """Gives up blocks whose time is over; how many the memory gave up."""
        gone = self.cache.expire(now_ms=self._now_ms(), evict=self.pool.unpublish)
        for tier in self.below:
            tier.expire()
        self._gone_from_memory(gone)
        self._look_for_surplus()
        return len(gone)

    async def close(self, *, timeout_ms: int) -> None:
        """Ends all transfers; blocks that wait for the disk are written if the time allows."""
        self._trimmer.cancel()
        await asyncio.gather(self._trimmer, return_exceptions=True)
        await asyncio.gather(*self._loads.values())
        await self._puller.close()
        await asyncio.gather(*(tier.close(timeout_ms=timeout_ms) for tier in self.below))
        await asyncio.to_thread(self.server.stop)

    def _start_load(self, name: bytes, is_cold: bool) -> "asyncio.Task[bool] | None":
        """None: no tier has it, there is no room, or memory has it too old, or not yet."""
        stored = next((held for tier in self.below if (held := tier.find(name))), None)
        is_in_memory = not self.cache.missing([name])
        if stored is None or is_in_memory or len(self._loads) >= LOADS_MAX:
            return None
        since_ms = {name: stored.stored_ms}
        slots = self._reserve([name], stored.origin, stored_ms=since_ms, is_cold=is_cold)
        if not slots and not is_cold:  # a request waits: what is yet to be written must go
            slots = self._reserve(
                [name], stored.origin, stored_ms=since_ms, evict=self.pool.unpublish
            )
        if not slots:
            return None
        task = asyncio.create_task(self._load(name, slots[name]))
        self._loads[name] = task
        return task

    async def _load(self, name: bytes, slot: int) -> bool:
        self.pool.reset(slot)
        is_whole = False
        try:
            for tier in self.below:
                is_whole = is_whole or await tier.read(name, slot)
        except Exception as error:  # noqa: BLE001 - logged; it is a miss, and the node goes on
            self._upkeep.failed("loading", error)
        finally:
            del self._loads[name]
            if is_whole:
                self.pool.ready[slot] = self.pool.num_layers
                self._publish(name, slot)
            else:
                self.cache.abandon(name)
        return is_whole

    def _publish(self, name: bytes, slot: int) -> None:
        self.pool.publish(name, slot)
        self._uses_seen[slot] = self.pool.uses[slot]
        self.cache.commit(name)

    def _reserve(
        self,
        names: Sequence[bytes],
        origin: Origin,
        *,
        stored_ms: Mapping[bytes, int],
        is_cold: bool = False,
        evict: Callable[[bytes], bool] | None = None,
    ) -> dict[bytes, int]:
        """Slots of memory for some of the names; what was pulled meanwhile has gained value.

        `evict`: another choice of what may go than that for hot or cold blocks.
        """
        self._note_uses()
        may_go = self._may_make_way if is_cold else self._may_leave_memory
        taken = self.cache.reserve(
            names,
            origin,
            now_ms=self._now_ms(),
            evict=evict or may_go,
            stored_ms=stored_ms,
            is_cold=is_cold,
        )
        self.num_evicted += len(taken.evicted)
        self._gone_from_memory(taken.evicted)
        self._look_for_surplus()
        return dict(zip(taken.names, taken.slots, strict=True))

    def _note_uses(self) -> None:
        """What was pulled since the last time has gained value."""
        pulled = np.flatnonzero(self.pool.uses != self._uses_seen)
        self._uses_seen[pulled] = self.pool.uses[pulled]
        self.cache.touch_slots(pulled.tolist())

    def _settle(self) -> None:
        self._settled.set()
        self._settled = asyncio.Event()

    def _look_for_surplus(self) -> None:
        if self.cache.num_surplus:
            self._is_crowded.set()

    async def _keep_room(self) -> None:
        """Gives up blocks that are below, or nowhere to go, so that none has to wait for a slot."""
        while True:
            await self._is_crowded.wait()
            self._is_crowded.clear()
            self._note_uses()
            num_left = self.cache.num_surplus
            while num_left > 0:
                gone = self.cache.trim(min(num_left, TRIM_BATCH), evict=self._may_leave_memory)
                if not gone:
                    break  # the rest is read or yet to be written; `expire` looks again
                num_left -= len(gone)
                self.num_trimmed += len(gone)
                self._gone_from_memory(gone)
                await asyncio.sleep(0)

    def _may_leave_memory(self, name: bytes) -> bool:
        return not any(tier.awaits(name) for tier in self.below) and self.pool.unpublish(name)

    def _may_make_way(self, name: bytes) -> bool:
        """As above, for a block that nobody waits for: nothing may be lost by it."""
        return self._is_below(name) and self._may_leave_memory(name)

    def _is_below(self, name: bytes) -> bool:
        return any(tier.find(name) is not None for tier in self.below)

    def _gone_from_memory(self, names: Sequence[bytes]) -> None:
        self._on_change((), [name for name in names if not self._is_below(name)])

    def _gone_from_below(self, names: Sequence[bytes]) -> None:
        self._on_change((), [name for name in names if not self.holds(name)])

    def _changed_in_store(self, stored: Sequence[bytes], removed: Sequence[bytes]) -> None:
        self._on_change(stored, ())
        self._gone_from_below(removed)

    def _limits(self, num_slots: int, *, watermarks: tuple[float, float] = (1.0, 1.0)) -> Limits:
        settings = self._settings
        return Limits.of(
            num_slots,
            tenant_share_max=settings.tenant_share_max,
            ttl_ms=settings.block_ttl_ms,
            watermarks=watermarks,
        )


async def _is_set(event: asyncio.Event, *, until_s: float) -> bool:
    """Waits for the event; False: it did not come in time."""
    try:
        async with asyncio.timeout(until_s - time.monotonic()):
            await event.wait()
    except TimeoutError:
        return False
    return time.monotonic() < until_s


def check_layout(layout: common_pb2.KvLayout) -> None:
    """Raises KvasirError if the layout is malformed."""
    is_whole = 0 < layout.num_layers <= LAYERS_MAX and layout.block_bytes % layout.num_layers == 0
    if not is_whole or layout.block_bytes == 0 or len(layout.digest) != 16:
        raise KvasirError(Reason.INVALID_REQUEST, "the layout is malformed", param="layout")
