"""How long look-ups in the block index take, and whether they tell one tenant of another's cache.

Look-ups are of a chain of 256 blocks that is known whole. Probes are look-ups by a tenant of a
prompt that another tenant has cached, beside those of one that nobody has, taking turns; `p_value`
is of a signed-rank test by permutation: a small one says that the times differ.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from kvasir_proto.v1 import common_pb2

from kvasir_kvstore.core.block import BLOCK_TOKENS, chain, root
from kvasir_kvstore.index import BlockIndex, MemoryIndex, RedisIndex

CHAIN_BLOCKS = 256
LOOKUPS = 500
PROMPTS = 50
PROBES = 2000
PERMUTATIONS = 2000
FINGERPRINT = bytes(16)


@dataclass(frozen=True, slots=True)
class LookupRow:
    """Look-ups in one index."""

    index: str
    num_blocks: int
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class ProbeRow:
    """Probes of one index: times of each kind, and how likely such a difference is by chance."""

    index: str
    num_found: int
    cached_by_other_p50_ms: float
    cached_by_nobody_p50_ms: float
    p_value: float


def run_bench_index(
    redis_url: str | None, *, report: Callable[[str], None]
) -> list[LookupRow | ProbeRow]:
    """Measures the index in process and, if a URL is given, in Redis.

    Raises:
        ValueError: the URL is not one of Redis.
        OSError: Redis does not answer.
    """
    return asyncio.run(_run(redis_url, report))


async def _run(redis_url: str | None, report: Callable[[str], None]) -> list[LookupRow | ProbeRow]:
    indexes: list[BlockIndex] = [MemoryIndex()]
    if redis_url:
        indexes.append(RedisIndex(redis_url, timeout_ms=5000))
    rows: list[LookupRow | ProbeRow] = []
    for index in indexes:
        try:
            if await index.generation() is None:
                raise OSError(index.problem)
            lookup, probe = await _lookups(index), await _probes(index)
        finally:
            await index.close()
        report(
            f"{lookup.index:8} {lookup.num_blocks} blocks: p50 {lookup.p50_ms:.3f} ms, "
            f"p99 {lookup.p99_ms:.3f} ms"
        )
        report(
            f"{probe.index:8} another tenant's prompt: {probe.num_found} found, p50 "
            f"{probe.cached_by_other_p50_ms:.4f} ms; nobody's {probe.cached_by_nobody_p50_ms:.4f}"
            f" ms; p = {probe.p_value:.2f}"
        )
        rows += [lookup, probe]
    return rows


async def _lookups(index: BlockIndex) -> LookupRow:
    names = _names(1, tenant=b"a")
    await index.announce(names, _holder())
    times_ms = [await _time_ms(index, names) for _ in range(LOOKUPS)]
    p50, p99 = np.percentile(times_ms, [50, 99])
    return LookupRow(index.kind, CHAIN_BLOCKS, round(float(p50), 4), round(float(p99), 4))


async def _probes(index: BlockIndex) -> ProbeRow:
    for prompt in range(PROMPTS):
        await index.announce(_names(prompt, tenant=b"a"), _holder())
    order = np.random.default_rng(1).permutation(2 * PROMPTS)  # where names lie in memory matters
    made = {int(prompt): _names(int(prompt), tenant=b"b") for prompt in order}
    cached = [made[prompt] for prompt in range(PROMPTS)]
    uncached = [made[PROMPTS + prompt] for prompt in range(PROMPTS)]
    found = [run for names in cached for run in await index.locate(names)]
    times_ms = np.empty((PROBES, 2))
    for probe in range(PROBES):
        pair = cached[probe % PROMPTS], uncached[probe % PROMPTS]
        for kind in (0, 1) if probe // PROMPTS % 2 else (1, 0):  # neither is always the first
            times_ms[probe, kind] = await _time_ms(index, pair[kind])
    differences = times_ms[:, 0] - times_ms[:, 1]
    ranks = np.argsort(np.argsort(np.abs(differences))) + 1  # a few slow answers weigh no more
    signs = np.random.default_rng(0).choice([-1, 1], (PERMUTATIONS, PROBES))
    chance = np.abs(signs @ ranks) >= abs((np.sign(differences) * ranks).sum())
    p50 = np.median(times_ms, axis=0).round(5)
    return ProbeRow(
        index.kind,
        sum(run.count for run in found),
        float(p50[0]),
        float(p50[1]),
        round(float(chance.mean()), 3),
    )


async def _time_ms(index: BlockIndex, names: list[bytes]) -> float:
    start_s = time.perf_counter()
    await index.locate(names)
    return (time.perf_counter() - start_s) * 1000


def _names(prompt: int, *, tenant: bytes) -> list[bytes]:
    return chain(root(FINGERPRINT, tenant), [prompt] * (CHAIN_BLOCKS * BLOCK_TOKENS))


def _holder() -> common_pb2.PeerAddress:
    return common_pb2.PeerAddress(name="bench", uid=bytes(16), epoch=1, host="h", data_port=1)
