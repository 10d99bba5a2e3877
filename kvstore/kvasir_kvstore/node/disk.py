"""A KV node's disk: blocks of its memory written behind, read back when they are wanted again.

Decides what waits to be written and what happens when the disk does not take it; what is given up
is decided by core/cache.py. Invariants: the event loop never waits for the disk; a slot is written
or read by one thread at a time (its block is reserved or pinned meanwhile); a block that is not
what was stored is given up and counted, never served. A disk that is full or broken holds what it
holds, says so in `problem` and is tried again; the node goes on without.
"""

import asyncio
import contextlib
import errno
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from kvasir_proto.v1 import kvnode_pb2

from kvasir_kvstore._native import BlockPool
from kvasir_kvstore.core.cache import BlockCache, Held, Limits
from kvasir_kvstore.node.block_file import BlockFile, StoredBlock
from kvasir_kvstore.node.upkeep import Upkeep

log = logging.getLogger(__name__)

WRITES_WAITING_MAX = 4096
"""Blocks; more are not written."""
WRITE_BATCH_MAX = 16
"""Blocks that one sync of the disk covers."""
READERS_MAX = 4
RETRY_MS = 5_000
Result = TypeVar("Result")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(slots=True)
class _Counts:
    blocks_written: int = 0
    blocks_read: int = 0
    blocks_bad: int = 0
    blocks_dropped: int = 0


class DiskTier:
    """Blocks of one layout on disk. Belongs to one event loop."""

    name = "disk"

    def __init__(
        self,
        file: BlockFile,
        pool: BlockPool,
        *,
        memory: BlockCache,
        limits: Limits,
        upkeep: Upkeep,
        now_ms: Callable[[], int],
        on_gone: Callable[[Sequence[bytes]], None],
        on_settled: Callable[[], None],
    ) -> None:
        """A tier in this file.

        Args:
            memory: what lies in the pool.
            on_gone: told of names that the disk gave up.
            on_settled: called when blocks that were to be written are, or will not be.
        """
        self._file, self._pool, self._memory = file, pool, memory
        self._now_ms, self._on_gone, self._on_settled = now_ms, on_gone, on_settled
        self._cache = BlockCache(limits)
        self._stored: dict[bytes, StoredBlock] = {}
        self._waiting: dict[bytes, None] = {}
        self._has_work = asyncio.Event()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._counts = _Counts()
        self._retry_at_ms = 0
        self._is_broken = False
        self.problem = ""
        self._executor = ThreadPoolExecutor(1 + READERS_MAX, thread_name_prefix="kv-disk")
        self._writer = upkeep.start(self._write_behind, name="writing to disk")

    def restore(self, blocks: Sequence[StoredBlock]) -> None:
        """Takes over what an earlier life of the node left, in slots of their own."""
        kept = set(self._cache.restore({block.name: _held(block) for block in blocks}))
        self._stored = {block.name: block for block in blocks if block.name in kept}
        self.expire()

    def names(self) -> list[bytes]:
        """Names that can be read."""
        return self._cache.names()

    def blocks(self) -> dict[bytes, Held]:
        """What can be found."""
        return self._cache.blocks(now_ms=self._now_ms())

    def find(self, name: bytes) -> Held | None:
        """The block, unless it is not here or its time is over."""
        return self._cache.find(name, now_ms=self._now_ms())

    def touch(self, names: Sequence[bytes]) -> None:
        """The chain is wanted."""
        self._cache.touch(names)

    def put(self, names: Sequence[bytes]) -> None:
        """Blocks of the memory that shall be written when there is time."""
        for name in self._cache.missing(names):
            if len(self._waiting) >= WRITES_WAITING_MAX:
                self._counts.blocks_dropped += 1
            else:
                self._waiting[name] = None
        self._is_idle.clear()
        self._has_work.set()

    @property
    def is_behind(self) -> bool:
        """Whether blocks are to be written or being written."""
        return not self._is_idle.is_set()

    def awaits(self, name: bytes) -> bool:
        """Whether the block is still to be written."""
        return name in self._waiting

    async def read(self, name: bytes, target: int) -> bool:
        """Fills the pool's block with what is stored under the name; False: it is no more."""
        block = self._stored.get(name)
        if block is None:
            return False
        self._cache.pin(name)
        try:
            is_whole = await self._in_thread(self._file.read, block, self._pool, target)
        except OSError as error:
            log.warning("disk: reading a block: %s", error)
            is_whole = False
        finally:
            self._cache.unpin(name)
        if is_whole:
            self._counts.blocks_read += 1
        elif self._stored.get(name) is block:
            self._counts.blocks_bad += 1
            if not self._cache.is_pinned(name):
                self._cache.drop(name)
                self._forget([name])
        return is_whole

    def expire(self) -> None:
        """Gives up blocks whose time is over."""
        self._forget(self._cache.expire(now_ms=self._now_ms(), evict=lambda _: True))

    async def close(self, *, timeout_ms: int) -> None:
        """Writes what waits, as far as the time allows, then ends all reading and writing."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_ms / 1000):
                await self._is_idle.wait()
        self._writer.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)
        await asyncio.to_thread(self._executor.shutdown)

    def describe(self) -> kvnode_pb2.TierDescription:
        """What this tier holds and did."""
        block_bytes = self._pool.num_layers * self._pool.layer_bytes
        return kvnode_pb2.TierDescription(
            name=self.name,
            blocks_total=self._cache.slots_usable,
            blocks_used=self._cache.num_held,
            bytes_used=self._cache.num_held * block_bytes,
            blocks_written=self._counts.blocks_written,
            blocks_read=self._counts.blocks_read,
            blocks_bad=self._counts.blocks_bad,
            blocks_dropped=self._counts.blocks_dropped,
            problem=self.problem,
        )

    async def _write_behind(self) -> None:
        while True:
            await self._has_work.wait()
            batch = list(self._waiting)[:WRITE_BATCH_MAX]
            if not batch:
                self._has_work.clear()
                self._is_idle.set()
                self._on_settled()
                continue
            for name in batch:
                del self._waiting[name]
            try:
                await self._write(batch)
            except Exception:
                self._counts.blocks_dropped += len(batch)
                raise
            finally:
                self._on_settled()

    async def _write(self, names: Sequence[bytes]) -> None:
        """Writes the blocks that are still in memory: reserve, write, commit."""
        if self._now_ms() >= self._retry_at_ms:
            self._cache.slots_usable, self._is_broken = self._cache.num_slots, False
        # 1. Slots, and the memory they are written from held still.
        blocks: list[StoredBlock] = []
        sources: list[int] = []
        for name in self._cache.missing(names):
            held = None if self._is_broken else self._memory.find(name, now_ms=self._now_ms())
            slot = None if held is None else self._reserve(name, held)
            if held is None or slot is None:  # gone meanwhile, or there is no room
                self._counts.blocks_dropped += 1
                continue
            self._memory.pin(name)
            sources.append(held.slot)
            blocks.append(StoredBlock(slot, name, held.origin, held.stored_ms, checksum=0))
        # 2. Write.
        error = None
        is_done = False
        try:
            blocks, error = await self._in_thread(self._write_blocks, blocks, sources)
            is_done = error is None
        finally:
            # 3. Only what is whole is held.
            for block in blocks:
                self._memory.unpin(block.name)
                if is_done:
                    self._cache.commit(block.name)
                    self._stored[block.name] = block
                else:
                    self._cache.abandon(block.name)
        if error is None:
            self._counts.blocks_written += len(blocks)
            if blocks and self._cache.slots_usable == self._cache.num_slots:
                self.problem = ""
        else:
            self._failed(error, len(blocks))

    def _write_blocks(
        self, blocks: Sequence[StoredBlock], sources: Sequence[int]
    ) -> tuple[list[StoredBlock], OSError | None]:
        sealed = [
            StoredBlock(b.slot, b.name, b.origin, b.stored_ms, self._pool.checksum(source))
            for b, source in zip(blocks, sources, strict=True)
        ]
        payloads = [memoryview(self._pool.data[source]) for source in sources]
        return sealed, self._file.write(list(zip(sealed, payloads, strict=True)))

    def _reserve(self, name: bytes, held: Held) -> int | None:
        taken = self._cache.reserve(
            [name],
            held.origin,
            now_ms=self._now_ms(),
            stored_ms={name: held.stored_ms},
            is_cold=held.is_cold,
        )
        self._forget(taken.evicted)
        return taken.slots[0] if taken.slots else None

    def _failed(self, error: OSError, num_blocks: int) -> None:
        """Goes on with the slots that are filled, if the disk is full; tries again later."""
        problem = f"disk: {error.strerror or error}"
        if problem != self.problem:
            log.warning("writing blocks: %s", problem)
        self.problem = problem
        self._counts.blocks_dropped += num_blocks
        self._retry_at_ms = self._now_ms() + RETRY_MS
        self._is_broken = error.errno not in _FULL
        self._cache.slots_usable = self._cache.num_held

    def _forget(self, names: Sequence[bytes]) -> None:
        for name in names:
            del self._stored[name]
        if names:
            self._on_gone(names)

    async def _in_thread(self, call: Callable[..., Result], *args: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call, *args)


def _held(block: StoredBlock) -> Held:
    return Held(block.slot, block.origin, block.stored_ms)
