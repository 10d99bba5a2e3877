"""A KV node's object store (S3): blocks written behind, read when no faster tier has them.

Decides what waits to be written and what an outage means: writes are dropped and reads miss, at
once, until it is tried again; `problem` says so and the node goes on. A block is one object, named
by layout, tenant, chain and block, so that a node that starts learns from a listing what is there,
also what others wrote. Invariants: an object's bytes are used only if they are those that were
written under its name (checksums over the name, the header and the payload); none is read whose
size is not a block's. Whatever else lies in the bucket is passed over and counted. Every call has a
deadline. What the store costs, and how long it keeps objects, is left to the bucket's rules.
"""

import asyncio
import contextlib
import logging
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from kvasir_proto.v1 import kvnode_pb2

from kvasir_kvstore._native import BlockPool, crc32c
from kvasir_kvstore.core.block import NAME_BYTES
from kvasir_kvstore.core.cache import BlockCache, Held, Origin
from kvasir_kvstore.node.upkeep import Upkeep

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import S3Store

log = logging.getLogger(__name__)

WRITES_WAITING_MAX = 1024
"""Blocks; more are not written."""
WRITERS = 4
KNOWN_MAX = 1 << 20
"""Blocks known to be in the store; beyond that the ones known longest are not found any more."""
TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 2.0
LIST_TIMEOUT_S = 600.0
RETRY_MS = 5_000
_HEADER = struct.Struct("<4sQI")  # magic, stored, checksum of the payload
_MAGIC = b"KvO1"
_CHECKSUM = struct.Struct("<I")
_HEAD_BYTES = _HEADER.size + _CHECKSUM.size


@dataclass(slots=True)
class _Counts:
    blocks_written: int = 0
    blocks_read: int = 0
    blocks_bad: int = 0
    blocks_dropped: int = 0
    objects_foreign: int = 0


def open_store(url: str, endpoint: str | None) -> "S3Store":
    """The bucket of s3://BUCKET/PREFIX; credentials and region come from AWS_* in the environment.

    Raises:
        ValueError: the URL is malformed, or the package obstore is not installed.
    """
    try:
        from obstore.store import S3Store
    except ImportError as error:
        raise ValueError("an object store needs the package obstore: kvasir[s3]") from error
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if not url.startswith("s3://") or not bucket:
        raise ValueError("not a URL of a bucket (s3://BUCKET/PREFIX)")
    return S3Store(
        bucket,
        prefix=prefix or None,
        config={"endpoint": endpoint} if endpoint else None,
        client_options={
            "timeout": f"{TIMEOUT_S:.0f}s",
            "connect_timeout": f"{CONNECT_TIMEOUT_S:.0f}s",
            "allow_http": bool(endpoint and endpoint.startswith("http://")),
        },
        retry_config={"max_retries": 1},
    )


class ObjectTier:
    """Blocks of one layout in a bucket. Belongs to one event loop."""

    name = "store"

    def __init__(
        self,
        store: "S3Store",
        pool: BlockPool,
        *,
        memory: BlockCache,
        ttl_ms: int,
        upkeep: Upkeep,
        now_ms: Callable[[], int],
        on_change: Callable[[Sequence[bytes], Sequence[bytes]], None],
        on_settled: Callable[[], None],
    ) -> None:
        """A tier in this bucket.

        Args:
            memory: what lies in the pool.
            on_change: told of names that come and go here.
            on_settled: called when a block that was to be written need not stay in memory for it.
        """
        self._store, self._pool, self._memory = store, pool, memory
        self._ttl_ms, self._now_ms = ttl_ms, now_ms
        self._on_change, self._on_settled = on_change, on_settled
        self._known: dict[bytes, Held] = {}
        self._waiting: asyncio.Queue[bytes] = asyncio.Queue(WRITES_WAITING_MAX)
        self._queued: set[bytes] = set()
        self._counts = _Counts()
        self._retry_at_ms = 0
        self.problem = ""
        self._listing_problem = ""
        name = "writing to the object store"
        self._tasks = [upkeep.start(self._write_behind, name=name) for _ in range(WRITERS)]
        self._tasks.append(upkeep.start(self._learn, name="listing the object store"))

    def names(self) -> list[bytes]:
        """Names known to be in the store."""
        return list(self._known)

    def find(self, name: bytes) -> Held | None:
        """The block, unless it is not known to be here or its time is over."""
        held = self._known.get(name)
        is_over = held and 0 < self._ttl_ms <= self._now_ms() - held.stored_ms
        return None if is_over else held

    def touch(self, names: Sequence[bytes]) -> None:
        """Nothing is given up by value here."""

    def put(self, names: Sequence[bytes]) -> None:
        """Blocks of the memory that shall be written when there is time."""
        for name in names:
            if name in self._known:
                continue
            try:
                self._waiting.put_nowait(name)
                self._queued.add(name)
            except asyncio.QueueFull:
                self._counts.blocks_dropped += 1

    @property
    def is_behind(self) -> bool:
        """Whether blocks are to be written."""
        return bool(self._queued)

    def awaits(self, name: bytes) -> bool:
        """Whether the block is still to be written."""
        return name in self._queued

    async def read(self, name: bytes, target: int) -> bool:
        """Fills the pool's block with what is stored under the name; False: it cannot be had."""
        held = self.find(name)
        if held is None:
            return False
        import obstore

        key = self._key(name, held.origin)

        async def get() -> bytes:
            result = await obstore.get_async(self._store, key)
            if result.meta["size"] != self._object_bytes:
                log.warning("object store: %s has %d bytes", key, result.meta["size"])
                return b""
            return bytes(await result.bytes_async())

        body = await self._call(get)
        if body is None:
            return False
        if not await asyncio.to_thread(self._unpack, key, body, target):
            self._counts.blocks_bad += 1
            self._forget([name])
            return False
        self._counts.blocks_read += 1
        return True

    def expire(self) -> None:
        """Forgets blocks whose time is over; the bucket's rules delete them."""
        if self._ttl_ms:
            self._forget([name for name in self._known if self.find(name) is None])

    async def close(self, *, timeout_ms: int) -> None:
        """Writes what waits, as far as the time allows, then ends all calls."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_ms / 1000):
                await self._waiting.join()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def describe(self) -> kvnode_pb2.TierDescription:
        """What this tier holds and did."""
        block_bytes = self._pool.num_layers * self._pool.layer_bytes
        return kvnode_pb2.TierDescription(
            name=self.name,
            blocks_used=len(self._known),
            bytes_used=len(self._known) * block_bytes,
            blocks_written=self._counts.blocks_written,
            blocks_read=self._counts.blocks_read,
            blocks_bad=self._counts.blocks_bad,
            blocks_dropped=self._counts.blocks_dropped,
            problem=self.problem or self._listing_problem,
            objects_foreign=self._counts.objects_foreign,
        )

    async def _write_behind(self) -> None:
        while True:
            name = await self._waiting.get()
            is_written = False
            try:
                is_written = await self._write(name)
            finally:
                self._settle(name)
                self._counts.blocks_dropped += not is_written
                self._waiting.task_done()

    async def _write(self, name: bytes) -> bool:
        import obstore

        held = self._memory.find(name, now_ms=self._now_ms())
        if held is None:
            return False
        key = self._key(name, held.origin)
        self._memory.pin(name)
        try:
            body = await asyncio.to_thread(self._pack, key, held)
        finally:
            self._memory.unpin(name)
        self._settle(name)
        if await self._call(lambda: obstore.put_async(self._store, key, body)) is None:
            return False
        self._counts.blocks_written += 1
        self._know({name: held})
        return True

    def _settle(self, name: bytes) -> None:
        """The memory may give the block up."""
        self._queued.discard(name)
        self._on_settled()

    async def _learn(self) -> None:
        """Lists what is there, until that has worked, and again after each outage."""
        import obstore.exceptions

        async def pages() -> bool:
            num_foreign = 0
            self._listing_problem = ""
            pages = obstore.list(self._store, f"{self._pool.layout_digest.hex()}/")
            try:
                async for page in pages:
                    found = dict(filter(None, map(self._block_of, page)))
                    num_foreign += len(page) - len(found)
                    self._know(found)
                    if len(self._known) >= KNOWN_MAX:
                        break
            except obstore.exceptions.InvalidPathError as error:
                num_foreign += 1
                self._listing_problem = "store: the listing ends at an object that is no block"
                log.warning("%s: %s", self._listing_problem, str(error).partition("\n")[0])
            self._counts.objects_foreign = num_foreign
            if num_foreign:
                log.warning("object store: %d objects are no blocks: passed over", num_foreign)
            return True

        is_learnt = False
        while True:
            if not is_learnt or self.problem:
                is_learnt = await self._call(pages, timeout_s=LIST_TIMEOUT_S) is not None
            await asyncio.sleep(RETRY_MS / 1000)

    async def _call(
        self, call: Callable[[], Awaitable[Any]], *, timeout_s: float = TIMEOUT_S
    ) -> Any:
        """The call's result; b"" if there is no such object; None if the store is away."""
        import obstore.exceptions

        if self._now_ms() < self._retry_at_ms:
            return None
        try:
            async with asyncio.timeout(timeout_s):
                result = await call()
        except FileNotFoundError:
            return b""
        except (obstore.exceptions.BaseError, OSError, TimeoutError) as error:
            problem = f"store: {type(error).__name__}"
            if problem != self.problem:
                log.warning("object store: %s", str(error).partition("\n")[0] or problem)
            self.problem = problem
            self._retry_at_ms = self._now_ms() + RETRY_MS
            return None
        self.problem = ""
        return result

    def _pack(self, key: str, held: Held) -> bytes:
        header = _HEADER.pack(_MAGIC, held.stored_ms, self._pool.checksum(held.slot))
        payload: bytes = self._pool.data[held.slot].tobytes()
        return header + _CHECKSUM.pack(crc32c(key.encode() + header)) + payload

    def _unpack(self, key: str, body: bytes, target: int) -> bool:
        """Puts the payload into the pool's block if it is what was written under this key."""
        header, check = body[: _HEADER.size], body[_HEADER.size : _HEAD_BYTES]
        payload = np.frombuffer(body, np.uint8)[_HEAD_BYTES:]
        memory = self._pool.data[target]
        if len(payload) != len(memory) or check != _CHECKSUM.pack(crc32c(key.encode() + header)):
            return False
        magic, stored_ms, checksum = _HEADER.unpack(header)
        memory[:] = payload
        is_over = 0 < self._ttl_ms <= self._now_ms() - stored_ms
        return magic == _MAGIC and not is_over and self._pool.checksum(target) == checksum

    def _know(self, blocks: dict[bytes, Held]) -> None:
        new = {name: held for name, held in blocks.items() if name not in self._known}
        self._known.update(new)
        self._on_change(list(new), ())
        self._forget(list(islice(self._known, max(len(self._known) - KNOWN_MAX, 0))))

    def _forget(self, names: Sequence[bytes]) -> None:
        for name in names:
            self._known.pop(name, None)
        if names:
            self._on_change((), names)

    def _key(self, name: bytes, origin: Origin) -> str:
        parts = (self._pool.layout_digest, origin.tenant or b"-", origin.chain_head, name)
        return "/".join(part.hex() for part in parts)

    @property
    def _object_bytes(self) -> int:
        return _HEAD_BYTES + self._pool.num_layers * self._pool.layer_bytes

    def _block_of(self, entry: "ObjectMeta") -> tuple[bytes, Held] | None:
        """The block that a listed object is by its key and size; None: it is none."""
        try:
            _, tenant, head, name = (bytes.fromhex(part) for part in entry["path"].split("/"))
        except ValueError:
            return None
        origin = Origin(tenant=b"" if tenant == b"-" else tenant, chain_head=head)
        is_named = len(name) == NAME_BYTES and entry["path"] == self._key(name, origin)
        if not is_named or entry["size"] != self._object_bytes:
            return None
        return name, Held(0, origin, int(entry["last_modified"].timestamp() * 1000))
