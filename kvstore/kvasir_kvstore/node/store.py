"""What a KV node does: takes offers, pulls what it lacks, tells the index, says where blocks are.

Decides who waits and what is refused; where blocks lie and what is given up is decided below
(arena.py, core/cache.py). Invariant: a block is announced only after it is whole, and withdrawn
when no tier has it any more.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import common_pb2, kvnode_pb2

from kvasir_kvstore.core.block import NAME_BYTES
from kvasir_kvstore.core.cache import Held, Origin
from kvasir_kvstore.core.placement import Run, leading_runs
from kvasir_kvstore.events import EventHub
from kvasir_kvstore.index import BlockIndex, Location
from kvasir_kvstore.metrics import NodeMetrics
from kvasir_kvstore.node.arena import Arena, Filled, check_layout
from kvasir_kvstore.node.block_file import BlockFile
from kvasir_kvstore.node.moves import Mover
from kvasir_kvstore.node.object_store import open_store
from kvasir_kvstore.node.settings import KvNodeSettings
from kvasir_kvstore.node.upkeep import Upkeep
from kvasir_kvstore.nodes import NodeSet
from kvasir_kvstore.pulls import can_pull_from

log = logging.getLogger(__name__)

NAMES_MAX = 8192
"""In one call: a chain of 256k tokens."""
LEASE_TICK_S = 1.0
"""How soon it is noticed that the index is back or lost entries."""
_ANNOUNCE_BATCH = 1024
_RETRY_AFTER_MS = 200


@dataclass(slots=True)
class Counts:
    """Since the start."""

    blocks_offered: int = 0
    blocks_pulled: int = 0
    blocks_known: int = 0
    blocks_unavailable: int = 0
    blocks_refused: int = 0
    bytes_pulled: int = 0
    blocks_evicted: int = 0
    blocks_expired: int = 0
    frames_quarantined: int = 0


class NodeStore:
    """The blocks of one KV node and its part of the index. Belongs to one event loop."""

    def __init__(
        self, settings: KvNodeSettings, *, uid: bytes, epoch: int, index: BlockIndex
    ) -> None:
        """Holds the data port and the disk's folder.

        A folder that is not taken and yet cannot be used is told of in `degraded`.

        Raises:
            OSError: one of them is taken.
            KvasirError: UNSUPPORTED: the transport that was chosen does not work here.
        """
        settings.data_plane.require()
        self._settings = settings
        self._index = index
        self._disk_problem = ""
        self._file = self._open_disk(settings.disk_dir) if settings.disk_dir else None
        self._port_holder = _hold_port(settings.host, settings.data_port)
        self.address = common_pb2.PeerAddress(
            name=settings.name,
            uid=uid,
            epoch=epoch,
            host=settings.peer_host,
            data_port=self._port_holder.getsockname()[1],
        )
        self.metrics = NodeMetrics(self._scrape, self._tiers)
        self.upkeep = Upkeep(lambda work: self.metrics.work_failed.labels(work).inc())
        self.counts = Counts()
        self.hub = EventHub(
            kvnode_pb2.KvNodeEvent,
            lambda: kvnode_pb2.KvNodeEvent(description=self.describe()),
            queue_max=settings.watch_queue_max,
            on_started=lambda start: self.metrics.watches.labels(start).inc(),
            on_dropped=self.metrics.watchers_dropped.inc,
        )
        self.is_draining = False
        self._arena: Arena | None = None
        self._is_arena_wanted = False  # workers have blocks of its layout; else a disk had
        self._arena_changes = asyncio.Lock()
        self._mover: Mover | None = None
        self._is_index_lost = False  # its entries, until they are announced again
        self._changes: dict[bytes, None] = {}  # names that the index is to be told of
        self._turn = asyncio.Semaphore(settings.offers_running_max)
        self._num_offers = 0

    def _open_disk(self, folder: Path) -> BlockFile | None:
        try:
            return BlockFile(folder)
        except BlockingIOError:
            raise
        except OSError as error:
            self._disk_problem = f"disk: {error.strerror or error}"
            log.warning("no blocks are kept on disk: %s: %s", folder, self._disk_problem)
            return None

    async def restore(self) -> None:
        """Serves what an earlier life left on disk, if it did."""
        if self._file is None or self._file.layout is None:
            return
        async with self._arena_changes:
            if self._arena is not None:
                return
            try:
                check_layout(self._file.layout)
                self._arena = await self._make_arena(self._file.layout)
            except KvasirError as error:
                log.warning("blocks on disk cannot be used: %s", error.message)
        await self._tell_index()

    async def offer(self, request: kvnode_pb2.OfferRequest) -> kvnode_pb2.OfferResponse:
        """Pulls those of the blocks that are neither here nor on their way.

        Raises:
            KvasirError: malformed, of another layout, too many offers wait, or draining.
        """
        try:
            response = await self._offer(request)
        except KvasirError as error:
            self.metrics.offers.labels(error.reason.value).inc()
            raise
        self.metrics.offers.labels("ok").inc()
        return response

    async def locate(self, names: Sequence[bytes]) -> list[Location]:
        """Where the longest known leading part of the names is held; here, as far as it goes.

        Raises:
            KvasirError: malformed.
        """
        _check_names(names)
        if self._arena is not None:
            self._arena.touch(names)
            num_held = self._arena.num_leading(names)
            if num_held == len(names):
                return [Run(self.address, 0, num_held)] if names else []
            here = [Run(self.address, 0, num_held)]
            return leading_runs([here, await self._index.locate(names)], num_names=len(names))
        return await self._index.locate(names)

    async def load(self, names: Sequence[bytes], *, timeout_ms: int, is_cold: bool = False) -> int:
        """Brings the leading part of the names into memory; how many of them are there then.

        `is_cold`: no request wants them.

        Raises:
            KvasirError: malformed.
        """
        _check_names(names)
        if self._arena is None:
            return 0
        timeout_ms = min(timeout_ms, self._settings.offer_timeout_ms_max)
        return await self._arena.load(names, timeout_ms=timeout_ms, is_cold=is_cold)

    def describe(self) -> kvnode_pb2.KvNodeDescription:
        """What this node is and holds."""
        values = self._scrape()
        counts = self.counts
        return kvnode_pb2.KvNodeDescription(
            address=self.address,
            layout=self._arena.layout if self._arena else None,
            blocks_total=int(values["blocks_total"]),
            blocks_used=int(values["blocks_used"]),
            bytes_capacity=self._settings.memory_mb << 20,
            blocks_offered=counts.blocks_offered,
            blocks_pulled=counts.blocks_pulled,
            blocks_served=int(values.get("blocks_served", 0)),
            blocks_evicted=int(values["blocks_evicted"]),
            blocks_expired=counts.blocks_expired,
            blocks_trimmed=int(values["blocks_trimmed"]),
            frames_quarantined=counts.frames_quarantined,
            index=self._index.kind,
            index_healthy=self._index.healthy,
            tiers=self._tiers(),
            degraded=self.degraded,
        )

    @property
    def degraded(self) -> list[str]:
        """What does not work though the node serves."""
        problems = [] if self._index.healthy else [f"index: {self._index.problem}"]
        if self._is_index_lost:
            problems.append("index: entries were lost; they are announced again")
        problems += [tier.problem for tier in self._tiers() if tier.problem]
        problems += self.upkeep.problems
        return [*problems, self._disk_problem] if self._disk_problem else problems

    async def move(self, nodes: NodeSet) -> None:
        """Keeps chains on the nodes they belong to, until cancelled."""

        if self._mover is None:
            self._mover = Mover(self._settings, nodes, self.address, source=self)
        await self._mover.run()

    def layout(self) -> common_pb2.KvLayout | None:
        """Of the blocks held here; None: there are none."""
        return self._arena.layout if self._arena else None

    def blocks(self, *, on_disk: bool) -> dict[bytes, Held]:
        """What this node alone holds: in memory, and on disk if asked for."""
        return self._arena.blocks(on_disk=on_disk) if self._arena else {}

    async def keep_leases(self) -> None:
        """Keeps the index right until cancelled: renews entries; at once when they were lost."""
        renewed_s = time.monotonic()
        announced = await self._index.generation()  # what was restored has been announced
        tick_s = min(LEASE_TICK_S, self._settings.lease_ttl_ms / 3000)
        while True:
            await asyncio.sleep(tick_s)
            if self._arena is not None:
                self.counts.blocks_expired += self._arena.expire()
            await self._tell_index()
            was_away = not self._index.healthy
            generation = await self._index.generation()
            if announced is not None and generation not in (None, announced):
                self._is_index_lost = True
                log.warning("block index: entries were lost; announcing them again")
            is_due = time.monotonic() - renewed_s >= self._settings.lease_ttl_ms / 3000
            if generation is None or not (was_away or is_due or generation != announced):
                continue
            renewed_s = time.monotonic()
            if await self._announce_all():
                announced, self._is_index_lost = generation, False

    async def close(self) -> None:
        """Withdraws this node's entries and ends all transfers."""
        if self._arena is not None:
            await self._withdraw(self._arena.names())
            await self._arena.close(timeout_ms=self._settings.stop_timeout_ms)
        if self._file is not None:
            self._file.close()
        self._port_holder.close()
        await self._index.close()

    async def _offer(self, request: kvnode_pb2.OfferRequest) -> kvnode_pb2.OfferResponse:
        names = request.names
        # 1. Refuse what cannot be served.
        _check_names([*names, *filter(None, (request.tenant, request.chain_head))])
        if self.is_draining:
            raise KvasirError(Reason.DRAINING, "the KV node is stopping")
        if not can_pull_from(request.source):
            raise KvasirError(Reason.INVALID_REQUEST, "the address is incomplete", param="source")
        arena = await self._arena_of(request.layout)
        self.counts.blocks_offered += len(names)
        if request.is_cold and arena.is_behind and arena.missing(names):
            raise _no_room()  # at once: those that are wanted need the turns
        timeout_ms = min(request.timeout_ms or 1 << 62, self._settings.offer_timeout_ms_max)
        end_s = time.monotonic() + timeout_ms / 1000
        # 2. Wait for a turn.
        await self._take_turn(end_s)
        try:
            # 3. Pull, then tell the index.
            missing = arena.missing(names)
            if not request.is_cold:
                arena.touch(names)
            filled = await self._fill(arena, request, missing, end_s=end_s)
        finally:
            self._turn.release()
            self._num_offers -= 1
        num_held = len(names) - len(missing)
        self._count(filled, num_held=num_held, num_missing=len(missing))
        if filled.num_refused and not filled.results:
            raise _no_room()
        return kvnode_pb2.OfferResponse(
            num_pulled=len(filled.committed),
            num_held=num_held,
            num_missed=len(missing) - len(filled.committed),
        )

    async def _take_turn(self, end_s: float) -> None:
        settings = self._settings
        if self._num_offers >= settings.offers_running_max + settings.offers_waiting_max:
            raise KvasirError(
                Reason.OVERLOADED, "too many offers wait", retry_after_ms=_RETRY_AFTER_MS
            )
        self._num_offers += 1
        try:
            async with asyncio.timeout(end_s - time.monotonic()):
                await self._turn.acquire()
        except BaseException as error:
            self._num_offers -= 1
            if isinstance(error, TimeoutError):
                raise KvasirError(Reason.TIMEOUT, "the offer waited for too long") from error
            raise

    async def _fill(
        self,
        arena: Arena,
        request: kvnode_pb2.OfferRequest,
        missing: Sequence[bytes],
        *,
        end_s: float,
    ) -> Filled:
        started_s = time.monotonic()
        left_ms = max(1, int((end_s - started_s) * 1000))
        head = request.chain_head or (request.names[0] if request.names else b"")
        origin = Origin(tenant=request.tenant, chain_head=head)
        now_ms = _now_ms()
        ages_ms = zip(request.names, request.ages_ms, strict=False)
        filled = await arena.fill(
            request.source,
            missing,
            origin,
            stored_ms={name: now_ms - age_ms for name, age_ms in ages_ms if age_ms <= now_ms},
            timeout_ms=left_ms,
            is_cold=request.is_cold,
        )
        self.metrics.pull_seconds.observe(time.monotonic() - started_s)
        await self._tell_index()
        for error in {result.error for result in filled.results if result.error}:
            log.warning("pulling blocks from %s: %s", request.source.name, error)
        return filled

    def _count(self, filled: Filled, *, num_held: int, num_missing: int) -> None:
        counts = self.counts
        counts.blocks_known += num_held
        counts.blocks_pulled += len(filled.committed)
        counts.blocks_refused += filled.num_refused
        counts.blocks_unavailable += num_missing - len(filled.committed) - filled.num_refused
        for result in filled.results:
            transport = result.transport or "none"
            self.metrics.transport_bytes.labels(transport).inc(result.bytes_moved)
            counts.bytes_pulled += result.bytes_moved
            counts.frames_quarantined += result.frames_bad

    async def _arena_of(self, layout: common_pb2.KvLayout) -> Arena:
        """The tiers for this layout; made for the first one that is offered.

        What an earlier life left on disk gives way if workers have blocks of another layout now.
        """
        check_layout(layout)
        async with self._arena_changes:
            if self._arena is not None and self._arena.layout != layout:
                if self._is_arena_wanted:
                    raise KvasirError(
                        Reason.UNSUPPORTED,
                        "this KV node holds blocks of another layout",
                        param="layout",
                    )
                left, self._arena = self._arena, None
                self._changed((), left.names())
                await left.close(timeout_ms=0)
            if self._arena is None:
                self._arena = await self._make_arena(layout)
            self._is_arena_wanted = True
            return self._arena

    async def _make_arena(self, layout: common_pb2.KvLayout) -> Arena:
        self._port_holder.close()
        arena = Arena(
            layout,
            self._settings,
            self.address,
            upkeep=self.upkeep,
            now_ms=_now_ms,
            on_change=self._changed,
        )
        log.info("holds up to %d blocks", arena.cache.num_slots)
        if self._file is not None:
            num_slots = arena.disk_slots(self._settings, layout)
            try:
                blocks = await asyncio.to_thread(self._file.begin, layout, num_slots=num_slots)
            except OSError as error:
                self._disk_problem = f"disk: {error.strerror or error}"
                log.warning("no blocks are kept on disk: %s", self._disk_problem)
            else:
                arena.attach_disk(self._file, blocks)
                log.info("found %d blocks on disk", len(blocks))
        if self._settings.store_url:
            arena.attach_store(open_store(self._settings.store_url, self._settings.store_endpoint))
        return arena

    def _changed(self, stored: Sequence[bytes], removed: Sequence[bytes]) -> None:
        self.hub.blocks_changed(stored=stored, removed=removed)
        self._changes.update(dict.fromkeys([*stored, *removed]))

    async def _tell_index(self) -> None:
        """Announces and withdraws what has come and gone since the last time."""
        changes, self._changes = self._changes, {}
        arena = self._arena
        held = [name for name in changes if arena is not None and arena.holds(name)]
        await self._withdraw(list(changes.keys() - set(held)))
        await self._announce(held)

    async def _withdraw(self, names: Sequence[bytes]) -> None:
        for start in range(0, len(names), _ANNOUNCE_BATCH):
            batch = names[start : start + _ANNOUNCE_BATCH]
            if not await self._index.withdraw(batch, self.address):
                return

    async def _announce_all(self) -> bool:
        return self._arena is None or await self._announce(self._arena.names())

    async def _announce(self, names: Sequence[bytes]) -> bool:
        """False: the index is away."""
        for start in range(0, len(names), _ANNOUNCE_BATCH):
            batch = names[start : start + _ANNOUNCE_BATCH]
            if not await self._index.announce(batch, self.address):
                return False
        return True

    def _tiers(self) -> list[kvnode_pb2.TierDescription]:
        return [tier.describe() for tier in self._arena.below] if self._arena else []

    def _scrape(self) -> dict[str, float]:
        values: dict[str, float] = dict(asdict(self.counts))
        values |= {
            "offers_running": self._num_offers,
            "index_healthy": self._index.healthy,
            "blocks_moved": self._mover.blocks_moved if self._mover else 0,
            "blocks_total": 0,
            "blocks_used": 0,
            "blocks_trimmed": 0,
        }
        if self._arena is None:
            return values
        cache, stats = self._arena.cache, self._arena.server.stats()
        return values | {
            "blocks_total": cache.num_slots,
            "blocks_used": cache.num_held,
            "blocks_evicted": self._arena.num_evicted,
            "blocks_trimmed": self._arena.num_trimmed,
            "blocks_reserved": cache.num_reserved,
            "blocks_served": stats["blocks_sent"],
            "bytes_served": stats["bytes_sent"],
            "blocks_missed": stats["blocks_missed"],
            "connections": stats["connections"],
            "stale_refused": stats["stale_refused"],
            "layout_refused": stats["layout_refused"],
            "unauthenticated": stats["unauthenticated"],
            "bad_requests": stats["bad_requests"],
            "connections_refused": stats["connections_refused"],
        }


def _no_room() -> KvasirError:
    return KvasirError(
        Reason.OVERLOADED,
        "no room: the blocks in memory are yet to be written",
        retry_after_ms=_RETRY_AFTER_MS,
    )


def _now_ms() -> int:
    """Unix time: what is on disk outlives the process."""
    return time.time_ns() // 1_000_000


def _check_names(names: Sequence[bytes]) -> None:
    if len(names) > NAMES_MAX:
        raise KvasirError(Reason.TOO_LARGE, f"more than {NAMES_MAX} names", param="names")
    if any(len(name) != NAME_BYTES for name in names):
        raise KvasirError(Reason.INVALID_REQUEST, "a name is not 16 bytes", param="names")


def _hold_port(host: str, port: int) -> socket.socket:
    """A socket that keeps the port until the block server takes it; it accepts nobody."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    holder = socket.socket(family, socket.SOCK_STREAM)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        holder.bind((host, port))
        holder.listen(1)
    except OSError as error:
        holder.close()
        raise OSError(error.errno, f"data port {host}:{port}: {error.strerror}") from error
    return holder
