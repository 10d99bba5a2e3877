"""The block index: which holder has a block. A hint that may be lost, stale or wiped at any time.

    BlockIndex
      MemoryIndex   in this process
      RedisIndex    in Redis, shared by a cluster; one round trip a call (to each node concerned,
                    if Redis itself is a cluster)

Every entry is a lease that its holder renews. No call raises because the index is away: it
answers with a miss, and `healthy` and `problem` say so. An index that lost its entries (Redis was
wiped, or came back empty) is of another generation: holders announce all again, and for those that
look up it is unhealthy until holders had the time to. That a holder still has a block is decided by
the holder when it is asked, and its (uid, epoch) in the entry refuses an earlier life.
"""

import asyncio
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import redis
from google.protobuf.message import DecodeError
from kvasir_proto.links import Links
from kvasir_proto.v1 import common_pb2
from redis.asyncio.cluster import RedisCluster
from redis.exceptions import RedisClusterException

from kvasir_kvstore.core.block import NAME_BYTES
from kvasir_kvstore.core.placement import Run
from kvasir_kvstore.redis_url import close, connect

log = logging.getLogger(__name__)

LEASE_TTL_MS = 60_000
ENTRIES_MAX = 1 << 20
_KEY_PREFIX = b"kvasir:block:"
_GENERATION_KEY = b"kvasir:generation"
REBUILD_MS = 5_000
"""Holders notice within a second that entries were lost, and announce theirs in less."""
_LOST = "Redis: entries were lost or never there; KV nodes are asked"

PeerAddress = common_pb2.PeerAddress
Location = Run[PeerAddress]
Result = TypeVar("Result")


class BlockIndex(Protocol):
    """Names of blocks to their holders. An entry names one holder: the last that announced it."""

    kind: str

    @property
    def healthy(self) -> bool:
        """False: answers are misses, and announcements are lost."""

    @property
    def problem(self) -> str:
        """Why it is not healthy, or ""."""

    async def announce(self, names: Sequence[bytes], holder: PeerAddress) -> bool:
        """The holder has these blocks, for one lease from now. False: it is not recorded."""

    async def withdraw(self, names: Sequence[bytes], holder: PeerAddress) -> bool:
        """The holder no longer has them; entries of other holders stay."""

    async def locate(self, names: Sequence[bytes]) -> list[Location]:
        """Runs that together cover the longest leading part of the names that is known."""

    async def generation(self) -> bytes | None:
        """Another one than before: entries were lost. None: the index does not answer now."""

    async def close(self) -> None:
        """Lets go of connections."""


def runs_of(packed: Sequence[bytes | None]) -> list[tuple[bytes, int]]:
    """(value, count) of the runs of equal values before the first None."""
    runs: list[tuple[bytes, int]] = []
    for value in packed:
        if value is None:
            break
        if runs and runs[-1][0] == value:
            runs[-1] = (value, runs[-1][1] + 1)
        else:
            runs.append((value, 1))
    return runs


def _locations(runs: Sequence[tuple[bytes, int]]) -> list[Location]:
    locations: list[Location] = []
    first = 0
    for value, count in runs:
        try:
            locations.append(Run(PeerAddress.FromString(value), first, count))
        except DecodeError:
            log.warning("block index: an entry is not an address; it is ignored")
            break
        first += count
    return locations


def _pack(holder: PeerAddress) -> bytes:
    return holder.SerializeToString(deterministic=True)


@dataclass(slots=True)
class _Lease:
    holder: bytes
    until_ms: float


class MemoryIndex:
    """An index inside one process. Forgets the entry renewed longest ago when it is full."""

    kind = "memory"
    healthy = True
    problem = ""

    def __init__(
        self,
        *,
        ttl_ms: int = LEASE_TTL_MS,
        entries_max: int = ENTRIES_MAX,
        clock_ms: Callable[[], float] = lambda: time.monotonic() * 1000,
    ) -> None:
        self._ttl_ms = ttl_ms
        self._entries_max = entries_max
        self._clock_ms = clock_ms
        self._leases: OrderedDict[bytes, _Lease] = OrderedDict()

    async def announce(self, names: Sequence[bytes], holder: PeerAddress) -> bool:
        """The holder has these blocks, for one lease from now."""
        packed, until_ms = _pack(holder), self._clock_ms() + self._ttl_ms
        for name in names:
            self._leases[name] = _Lease(packed, until_ms)
            self._leases.move_to_end(name)
        while len(self._leases) > self._entries_max:
            self._leases.popitem(last=False)
        return True

    async def withdraw(self, names: Sequence[bytes], holder: PeerAddress) -> bool:
        """The holder no longer has them; entries of other holders stay."""
        packed = _pack(holder)
        for name in names:
            lease = self._leases.get(name)
            if lease is not None and lease.holder == packed:
                del self._leases[name]
        return True

    async def locate(self, names: Sequence[bytes]) -> list[Location]:
        """Runs that together cover the longest leading part of the names that is known."""
        now_ms = self._clock_ms()
        found: list[bytes | None] = []
        for name in names:
            lease = self._leases.get(name)
            if lease is None or lease.until_ms <= now_ms:
                break
            found.append(lease.holder)
        return _locations(runs_of(found))

    async def generation(self) -> bytes | None:
        """Always the same."""
        return b"memory"

    async def close(self) -> None:
        """Nothing to let go of."""


_WITHDRAW = """
for i, key in ipairs(KEYS) do
  if redis.call('GET', key) == ARGV[1] then redis.call('DEL', key) end
end
return redis.status_reply('OK')
"""


_LOCATE = b"""
local runs, num, last = {redis.call('GET', KEYS[1]) or ''}, 1, nil
for at = 2, #KEYS, 256 do
  local values = redis.call('MGET', unpack(KEYS, at, math.min(at + 255, #KEYS)))
  for _, value in ipairs(values) do
    if not value then return runs end
    if value == last then
      runs[num] = runs[num] + 1
    else
      runs[num + 1], runs[num + 2], last, num = value, 1, value, num + 2
    end
  end
end
return runs
"""
"""The first key's value, then values and how often each follows itself: far less to send and parse
than a value per name."""

_KEY_HEAD = b"$%d\r\n%b" % (len(_KEY_PREFIX) + NAME_BYTES, _KEY_PREFIX)


def _packed_locate(names: Sequence[bytes]) -> bytes:
    """The command as it is sent: a client that looks at argument after argument takes longer to
    write it than Redis takes to answer.
    """
    assert all(len(name) == NAME_BYTES for name in names)
    count = b"%d" % (1 + len(names))
    head = (b"EVAL", _LOCATE, count, _GENERATION_KEY)
    parts = [b"*%d\r\n" % (len(head) + len(names))]
    parts += [b"$%d\r\n%b\r\n" % (len(part), part) for part in head]
    return b"".join(parts) + _KEY_HEAD + (b"\r\n" + _KEY_HEAD).join(names) + b"\r\n"


class RedisIndex:
    """An index in Redis. After a failure it is left alone for `retry_ms`, so calls stay fast."""

    kind = "redis"

    def __init__(
        self,
        url: str,
        *,
        ttl_ms: int = LEASE_TTL_MS,
        links: Links | None = None,
        timeout_ms: int = 250,
        retry_ms: int = 1000,
        clock_ms: Callable[[], float] = lambda: time.monotonic() * 1000,
    ) -> None:
        self._ttl_ms = ttl_ms
        self._timeout_s = timeout_ms / 1000
        self._retry_ms = retry_ms
        self._clock_ms = clock_ms
        self._retry_at_ms = 0.0
        self._problem = ""
        self._generation = b""
        self._lost_until_ms = 0.0
        self._redis = connect(url, links=links, timeout_s=self._timeout_s)

    @property
    def healthy(self) -> bool:
        """False: the last call failed, or entries were lost a moment ago."""
        return not self.problem

    @property
    def problem(self) -> str:
        """Why it is not healthy, or ""."""
        return self._problem or (_LOST if self._clock_ms() < self._lost_until_ms else "")

    async def announce(self, names: Sequence[bytes], holder: PeerAddress) -> bool:
        """The holder has these blocks, for one lease from now. False: Redis is away."""
        packed = _pack(holder)
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.set(_GENERATION_KEY, os.urandom(8).hex(), nx=True)
        for name in names:
            pipeline.set(_KEY_PREFIX + name, packed, px=self._ttl_ms)
        return await self._call(pipeline.execute) is not None

    async def withdraw(self, names: Sequence[bytes], holder: PeerAddress) -> bool:
        """The holder no longer has them; entries of other holders stay. False: Redis is away."""
        if not names:
            return True
        keys = [_KEY_PREFIX + name for name in names]
        packed = _pack(holder)

        async def run() -> Any:
            if not isinstance(self._redis, RedisCluster):
                return await self._redis.eval(_WITHDRAW, len(keys), *keys, packed)
            pipeline = self._redis.pipeline()  # a script's keys must lie on one node
            for key in keys:
                pipeline.execute_command("EVAL", _WITHDRAW, 1, key, packed)
            return await pipeline.execute()

        return await self._call(run) is not None

    async def locate(self, names: Sequence[bytes]) -> list[Location]:
        """Runs that together cover the longest known leading part; none if Redis is away."""
        if not names:
            return []

        async def run() -> tuple[bytes, list[Any]]:
            if isinstance(self._redis, RedisCluster):
                keys = [_GENERATION_KEY, *(_KEY_PREFIX + name for name in names)]
                generation, *packed = await self._redis.mget_nonatomic(keys)
                return generation or b"", runs_of(packed)
            pool = self._redis.connection_pool
            connection = await pool.get_connection()  # type: ignore[no-untyped-call]
            try:
                await connection.send_packed_command(_packed_locate(names))
                generation, *runs = await connection.read_response()
            finally:  # one that was left in the middle of an answer has disconnected itself
                await pool.release(connection)
            return generation, list(zip(runs[::2], runs[1::2], strict=True))

        found = await self._call(run)
        if found is None:
            return []
        generation, runs = found
        if not generation or self._generation not in (b"", generation):
            if self.healthy:
                log.warning("block index: %s", _LOST)
            self._lost_until_ms = self._clock_ms() + REBUILD_MS
        self._generation = generation or self._generation
        return _locations(runs)

    async def generation(self) -> bytes | None:
        """Another one than before: entries were lost. Asks even if Redis has just been away."""
        self._retry_at_ms = 0.0
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.set(_GENERATION_KEY, os.urandom(8).hex(), nx=True)
        pipeline.get(_GENERATION_KEY)
        answers = await self._call(pipeline.execute)
        return bytes(answers[1]) if answers and answers[1] else None

    async def close(self) -> None:
        """Closes the connections."""
        await close(self._redis)

    async def _call(self, call: Callable[[], Awaitable[Result]]) -> Result | None:
        """The call's result; None if Redis is, or has just been, away."""
        if self._clock_ms() < self._retry_at_ms:
            return None
        try:
            async with asyncio.timeout(2 * self._timeout_s):
                result = await call()
        except (redis.RedisError, RedisClusterException, OSError, TimeoutError) as error:
            if not self._problem:
                log.warning("block index: Redis is away: %s", error or type(error).__name__)
            self._problem = f"Redis: {error or type(error).__name__}"
            self._retry_at_ms = self._clock_ms() + self._retry_ms
            return None
        if self._problem:
            log.info("block index: Redis is back")
        self._problem = ""
        return result


def make_index(
    redis_url: str | None, *, ttl_ms: int = LEASE_TTL_MS, links: Links | None = None
) -> BlockIndex:
    """The index in Redis if a URL is given, else one in this process.

    Raises:
        ValueError: the URL is not one of Redis, or needs links that show certificates.
    """
    if redis_url:
        return RedisIndex(redis_url, ttl_ms=ttl_ms, links=links)
    return MemoryIndex(ttl_ms=ttl_ms)
