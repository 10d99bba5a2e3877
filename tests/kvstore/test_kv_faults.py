"""A KV node and Redis killed and started again while workers offer and fetch: misses, no more."""

import asyncio
import os
import time
from pathlib import Path

import numpy as np
from conftest import RedisServer
from kv_fleet import Holder, NodeProcess, make_holder
from kvstore_builders import eventually, free_port

FETCH_TIMEOUT_MS = 2000
CALL_SECONDS_MAX = 30
"""A call ends at its timeout; a machine that stalls gets some more."""


class Load:
    """One worker that offers chains and another that fetches them, again and again."""

    def __init__(self, source: Holder, target: Holder, chains: list[list[bytes]]) -> None:
        self._source, self._target, self._chains = source, target, chains
        self.num_fetched = self.num_calls = 0
        self.longest_s = 0.0

    async def run(self) -> None:
        while True:
            for chain in self._chains:
                await self._source.offer(chain)
                await self._fetch(chain)

    async def _fetch(self, chain: list[bytes]) -> None:
        pool = self._target.pool
        blocks = list(range(len(chain)))
        for block in blocks:
            pool.reset(block)
        start_s = time.monotonic()
        result = await self._target.tier.locate_and_fetch(
            chain, blocks, timeout_ms=FETCH_TIMEOUT_MS
        )
        self.longest_s = max(self.longest_s, time.monotonic() - start_s)
        self.num_calls += 1
        self.num_fetched += result.num_fetched_leading
        for block, name in zip(blocks, chain, strict=True):
            if pool.ready[block]:
                assert np.array_equal(pool.data[block], self._source.contents[name]), "wrong bytes"


async def test_nodes_and_redis_die_and_return_under_load(
    own_redis: RedisServer, tmp_path: Path
) -> None:
    own_redis.start()
    specs = [f"127.0.0.1:{port}" for port in (free_port(), free_port())]
    nodes = [
        NodeProcess(
            name=f"kv-{i}",
            grpc_port=int(spec.rpartition(":")[2]),
            redis=own_redis.url,
            lease_ttl_ms=1500,
            kv_nodes=specs,
            disk_dir=tmp_path / str(i),
            memory_mb=1,
        )
        for i, spec in enumerate(specs)
    ]
    try:
        for node in nodes:
            node.start()
        async with (
            make_holder(specs, redis_url=own_redis.url, num_blocks=128) as a,
            make_holder(specs, redis_url=own_redis.url) as b,
        ):
            chains = [[os.urandom(16) for _ in range(4)] for _ in range(24)]
            for chain in chains:
                a.publish(chain)
            load = Load(a, b, chains)
            running = asyncio.create_task(load.run())

            async def more(count: int) -> None:
                """Waits until so many more blocks were fetched; the load must not have ended."""
                end = load.num_fetched + count

                async def fetched() -> int:
                    if running.done():
                        running.result()
                    return load.num_fetched

                await eventually(fetched, lambda fetched: fetched >= end, timeout_s=60)

            await more(60)
            for kill, start in (
                (nodes[0].kill, nodes[0].start),
                (own_redis.stop, own_redis.start),
                (nodes[1].kill, nodes[1].start),
            ):
                await asyncio.to_thread(kill)
                await more(20)
                await asyncio.to_thread(start)
                await more(60)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            assert load.longest_s < CALL_SECONDS_MAX
    finally:
        for node in nodes:
            node.close()
