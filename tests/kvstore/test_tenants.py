"""A prompt that one tenant has cached is, to another tenant, a prompt that nobody has cached."""

from conftest import RedisServer
from kv_fleet import LAYOUT, describe, make_holder, running_node
from kvasir_kvstore.bench_index import ProbeRow, run_bench_index
from kvasir_kvstore.core.block import chain, fingerprint, root, tenant_of

MODEL = fingerprint(b"w" * 16, LAYOUT)
PROMPT = list(range(32 * 6))


def names_for(salt: bytes) -> list[bytes]:
    return chain(root(MODEL, salt), PROMPT)


def test_tenants_share_no_name_and_no_count() -> None:
    salts = [b"", b"a", b"b", b"ab"]
    names = [set(names_for(salt)) for salt in salts]
    assert len(set.union(*names)) == len(salts) * 6
    assert len({tenant_of(salt) for salt in salts}) == len(salts)
    assert tenant_of(b"") == b""


async def test_what_one_tenant_cached_is_no_hit_for_another(shared_redis: RedisServer) -> None:
    for redis in (None, shared_redis.url):
        with running_node(redis=redis) as node:
            async with make_holder([node.spec], redis_url=redis) as worker:
                mine, others = names_for(b"a"), names_for(b"b")
                worker.publish(mine)
                await worker.offer(mine)
                asked = await worker.tier.locate_and_fetch(others, range(20, 26), timeout_ms=9000)
                assert (asked.num_fetched_leading, asked.bytes_moved, asked.problem) == (0, 0, "")
                after = await describe(node)
                assert (after.blocks_used, after.blocks_served) == (6, 0)
                assert node.metric("kvasir_kvnode_blocks_missed_total") == 0
                assert not worker.pool.ready[20:26].any()
                own = await worker.tier.locate_and_fetch(mine, range(20, 26), timeout_ms=9000)
                assert own.num_fetched_leading == 6


def test_the_bench_finds_nothing_of_another_tenant(shared_redis: RedisServer) -> None:
    lines: list[str] = []
    rows = run_bench_index(shared_redis.url, report=lines.append)
    probes = [row for row in rows if isinstance(row, ProbeRow)]
    assert [(row.index, row.num_found) for row in probes] == [("memory", 0), ("redis", 0)]
    assert len(lines) == len(rows) == 4
