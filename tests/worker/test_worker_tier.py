"""Blocks of a KV node in place of computing: the same tokens, counted as fetched."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from kvasir_engine.worker.chunks import names_salt
from kvasir_kvstore.core import fetch
from kvasir_kvstore.core.block import tenant_of
from kvasir_proto.v1 import common_pb2, worker_pb2
from worker_builders import Process, make_model_dir, make_request, prompt, started, until


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def _first_fetches_may_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "LOSS_SHARE_MAX", 1e9)


@pytest.fixture(scope="module")
def kv_node(unused_tcp_port_factory: Callable[[], int]) -> Iterator[str]:
    """A KV node process; its HOST:PORT."""
    port = unused_tcp_port_factory()
    process = Process("kvnode", "--name", "kv-0", f"--grpc-port={port}", "--memory-mb", "16")
    try:
        process.wait_for_log("KV node kv-0 at")
        yield f"127.0.0.1:{port}"
    finally:
        process.stop()


async def test_another_worker_fetches_instead_of_computing(model: Path, kv_node: str) -> None:
    async with started(model, "a", kv_nodes=(kv_node,)) as first:
        expected = await first.generate(make_request(prompt(200)))
        await until(lambda: first.host.served().tier.num_offers_pending == 0)
    async with started(model, "b", kv_nodes=(kv_node,)) as second:
        result = await second.generate(make_request(prompt(200)))
        assert result.tokens == expected.tokens
        assert result.stats.tokens_cached_fetched == 192
        assert result.stats.tokens_computed == 8
        assert result.stats.kv_bytes_moved > 0
        load = (await second.stub.Describe(worker_pb2.DescribeRequest(), timeout=10)).load
        assert 0 < load.store_us_per_token < 1e6
        about = await second.stub.Describe(worker_pb2.DescribeRequest(), timeout=10)
        assert about.kv_reuse.prompt_tokens == {"computed": 8, "fetched": 192}
        assert about.kv_reuse.tier_blocks == {"fetched": 6}
        assert [link.codec for link in about.kv_reuse.links] == ["raw"]
        assert result.done.usage.cached_tokens == 192
        assert await second.metric('kvasir_worker_prompt_tokens_total{source="fetched"') == 192
        assert await second.metric('kvasir_worker_kv_bytes_total{use="fetch"') > 0
        await until(lambda: second.is_idle)


async def test_a_path_is_learnt_beside_a_prompt_too_short_to_try_it(
    model: Path, kv_node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt(200, seed=5)
    async with started(model, "a", kv_nodes=(kv_node,)) as first:
        await first.generate(make_request(ids))
        await until(lambda: first.host.served().tier.num_offers_pending == 0)
    monkeypatch.setattr(fetch, "FIRST_LOSS_MS_MIN", 1e99)
    async with started(model, "b", kv_nodes=(kv_node,)) as second:
        result = await second.generate(make_request(ids))
        assert (result.stats.tokens_cached_fetched, result.stats.tokens_computed) == (0, 200)
        await until(lambda: second.host.fetch_rates.us_per_token > 0)
        await until(lambda: second.is_idle)


async def test_prefill_worker_fetches_for_a_hand_off(model: Path, kv_node: str) -> None:
    async with started(model, "a", kv_nodes=(kv_node,)) as first:
        expected = await first.generate(make_request(prompt(200)))
        await until(lambda: first.host.served().tier.num_offers_pending == 0)
    async with (
        started(model, "p", role="prefill", kv_nodes=(kv_node,)) as prefill,
        started(model, "d", role="decode") as decode,
    ):
        result = await decode.generate(make_request(prompt(200), prefill_peer=prefill.address))
        assert result.tokens == expected.tokens
        assert result.stats.tokens_cached_fetched == 192
        assert result.stats.tokens_computed == 8
        await until(lambda: prefill.is_idle and decode.is_idle)


async def test_output_of_a_decode_worker_is_offered_too(model: Path, kv_node: str) -> None:
    request = make_request(prompt(60), max_tokens=80)
    async with (
        started(model, "p", role="prefill", kv_nodes=(kv_node,)) as prefill,
        started(model, "d", role="decode", kv_nodes=(kv_node,)) as decode,
    ):
        request.prefill_peer.CopyFrom(prefill.address)
        first = await decode.generate(request)
        await until(lambda: decode.host.served().tier.num_offers_pending == 0)
    turn = [*prompt(60), *first.tokens, *prompt(40, seed=3)]
    async with started(model, "b", kv_nodes=(kv_node,)) as second:
        result = await second.generate(make_request(turn))
        assert result.stats.tokens_cached_fetched == 128


async def test_drain_offers_what_the_cache_holds(model: Path, kv_node: str) -> None:
    async with started(model, "a", kv_nodes=(kv_node,)) as first:
        await first.generate(make_request(prompt(100)))
        drain = first.stub.Drain(worker_pb2.DrainRequest(timeout_ms=10_000), timeout=30)
        last = [progress async for progress in drain][-1]
        assert (last.num_blocks_left, last.drained) == (0, True)
        held = len(first.host.hub.held)
        assert await first.metric("kvasir_worker_blocks_offered_total") >= held


async def test_what_a_drain_offers_says_whose_it_is_blended_or_not(
    model: Path, kv_node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = common_pb2.Chunks(
        spans=[common_pb2.TokenSpan(start=0, end=64)], recompute_permille=100
    )
    blended = make_request(prompt(100), tenant_salt=b"a", chunks=chunks, max_tokens=40)
    exact = make_request(prompt(100, seed=2), tenant_salt=b"b")
    offered: dict[bytes, tuple[bytes, bytes]] = {}

    async def offer(names: Sequence[bytes], *_: object, chain_head: bytes, tenant: bytes) -> None:
        offered.update(dict.fromkeys(names, (tenant, chain_head)))

    async with started(model, "a", kv_nodes=(kv_node,)) as worker:
        await worker.generate(blended)
        await worker.generate(exact)
        serving = worker.host.served()
        chains = [
            serving.names(tokens, tenant_salt=names_salt(request))
            for tokens, request in ((prompt(100), blended), (prompt(100, seed=2), exact))
        ]
        produced = set(worker.host.hub.held) - {name for chain in chains for name in chain}
        monkeypatch.setattr(serving.tier, "offer", offer)
        drain = worker.stub.Drain(worker_pb2.DrainRequest(timeout_ms=10_000), timeout=30)
        last = [progress async for progress in drain][-1]
    assert (last.num_blocks_left, last.drained) == (0, True)
    assert len(produced) == 4, "of the answer, the chunk alone (2), and the canary's"
    for chain, salt in zip(chains, (b"a", b"b"), strict=True):
        assert [offered[name] for name in chain] == [(tenant_of(salt), chain[0])] * len(chain)
    assert sorted(offered[name][0] for name in produced & offered.keys()) == [tenant_of(b"a")] * 3


async def test_kv_node_that_is_gone_costs_nothing_but_computing(
    model: Path, unused_tcp_port: int
) -> None:
    async with started(model, "a", kv_nodes=(f"127.0.0.1:{unused_tcp_port}",)) as worker:
        result = await worker.generate(make_request(prompt(200)))
        assert result.stats.tokens_computed == 200
        assert len(result.tokens) == 8
        load = (await worker.stub.Describe(worker_pb2.DescribeRequest(), timeout=10)).load
        assert load.store_us_per_token == 0
        await until(lambda: worker.is_idle)


async def test_tenants_do_not_share_fetched_blocks(model: Path, kv_node: str) -> None:
    async with started(model, "a", kv_nodes=(kv_node,)) as first:
        await first.generate(make_request(prompt(200), tenant_salt=b"tenant-1"))
        await until(lambda: first.host.served().tier.num_offers_pending == 0)
    async with started(model, "b", kv_nodes=(kv_node,)) as second:
        other = await second.generate(make_request(prompt(200), tenant_salt=b"tenant-2"))
        assert other.stats.tokens_cached_fetched == 0
        own = await second.generate(make_request(prompt(200), tenant_salt=b"tenant-1"))
        assert own.stats.tokens_cached_fetched == 192
