"""Prompts with chunks: how close, under which names, and what is left when they end early."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from kvasir_engine import blend
from kvasir_engine.worker import chunk_reuse
from kvasir_kvstore.core import block
from kvasir_proto.errors import Reason
from kvasir_proto.v1 import common_pb2
from kvasir_router.core.blended import blended_of
from worker_builders import RunningWorker, make_model_dir, make_request, prompt, started, until

HEAD, TAIL = prompt(40, seed=2), prompt(30, seed=3)
CHUNKS = [prompt(size, seed=size) for size in (100, 64, 77, 130)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("models") / "tiny")


def rag(order: tuple[int, ...] = (0, 1, 2, 3), *, permille: int = 150, **changes: object):
    """A request whose prompt holds these chunks between a head and a question."""
    token_ids, spans = list(HEAD), []
    for index in order:
        start = len(token_ids)
        token_ids += CHUNKS[index]
        spans.append(common_pb2.TokenSpan(start=start, end=len(token_ids)))
    chunks = common_pb2.Chunks(spans=spans, recompute_permille=permille)
    return make_request(token_ids + TAIL, chunks=chunks, **changes)


def plain(request):
    """The same request without chunks."""
    exact = make_request(list(request.token_ids), tenant_salt=request.tenant_salt)
    assert not exact.HasField("chunks")
    return exact


def exact_names(worker: RunningWorker, request) -> list[bytes]:
    return worker.host.served().names(request.token_ids, tenant_salt=request.tenant_salt)


def from_chunks(order: tuple[int, ...], *, permille: int = 150) -> tuple[int, int]:
    """Tokens that come from the chunks' full blocks, and those computed again.

    What is blended ends with a block of the prompt.
    """
    sizes = [len(CHUNKS[index]) for index in order]
    end = (len(HEAD) + sum(sizes)) // 32 * 32
    firsts = [len(HEAD) + sum(sizes[:index]) for index in range(len(sizes))]
    counts = [min(s // 32 * 32, end - first) for s, first in zip(sizes, firsts, strict=True)]
    again = sum(-(-count * permille // 1000) for count in counts)
    return sum(counts) - again, again


async def test_all_tokens_recomputed_give_the_exact_tokens(model: Path) -> None:
    async with started(model) as worker:
        expected = await worker.generate(plain(rag()))
    async with started(model) as worker:
        result = await worker.generate(rag(permille=1000))
        assert result.error is None
        assert result.tokens == expected.tokens
        assert result.stats.tokens_from_chunks == 0


async def test_second_prompt_reuses_the_chunks_of_the_first(model: Path) -> None:
    async with started(model) as worker:
        await worker.generate(rag((0, 1)))
        result = await worker.generate(rag((1, 3, 0)))
        stats = result.stats
        assert len(result.tokens) == 8
        assert (stats.tokens_from_chunks, stats.tokens_recomputed) == from_chunks((1, 3, 0))
        # the head's full block is exact; chunk 3 was not here: it is computed alone too
        assert stats.tokens_cached_local == 32
        num_prompt = len(HEAD) + 64 + 130 + 100 + len(TAIL)
        num_computed = num_prompt - 32 - stats.tokens_from_chunks + 128
        assert stats.tokens_computed == num_computed
        assert result.done.usage.cached_tokens == num_prompt - num_computed
        assert await worker.metric('kvasir_worker_prompt_tokens_total{source="chunks"') > 0
        await until(lambda: worker.is_idle)


async def test_output_depends_on_the_request_and_not_on_what_was_cached(model: Path) -> None:
    results = []
    for earlier in ((), (rag((2,)),), (rag((3, 1)), rag((2, 0)), rag())):
        async with started(model) as worker:
            for request in earlier:
                await worker.generate(request)
            results.append((await worker.generate(rag())).tokens)
    assert results[0] == results[1] == results[2]


async def test_blended_kv_is_never_published_under_an_exact_name(model: Path) -> None:
    request = rag(permille=1)
    async with started(model) as worker:
        expected = await worker.generate(plain(request))
    async with started(model) as worker:
        await worker.generate(request)
        names = exact_names(worker, request)
        held = worker.host.served().engine.holds(names)
        assert held == [True] + [False] * (len(names) - 1)  # the head, which is exact
        pool = worker.host.served().pool
        assert [pool.lookup(name) is not None for name in names] == held
        result = await worker.generate(plain(request))
        assert result.tokens == expected.tokens
        assert result.stats.tokens_cached_local == 32


async def test_same_prompt_with_other_chunks_shares_no_blended_block(model: Path) -> None:
    async with started(model) as worker:
        first, other = rag(permille=100), rag(permille=101)
        assert (await worker.generate(first)).stats.tokens_from_chunks > 0
        assert (await worker.generate(other)).stats.tokens_from_chunks > 0
        again = await worker.generate(rag(permille=100))
        assert again.stats.tokens_from_chunks == 0
        assert again.stats.tokens_cached_local == len(first.token_ids) // 32 * 32


async def test_routers_know_by_name_what_a_worker_holds_and_count_what_it_computes(
    model: Path,
) -> None:
    request = rag(tenant_salt=b"a")
    async with started(model) as worker:
        stats = (await worker.generate(request)).stats
        served = worker.host.served()
        blended = blended_of(
            request.token_ids,
            [(span.start, span.end) for span in request.chunks.spans],
            recompute_permille=request.chunks.recompute_permille,
            fingerprint=served.fingerprint,
            tenant_salt=b"a",
        )
        assert all(served.engine.holds(blended.names))
        assert all(all(served.engine.holds(chunk.names)) for chunk in blended.chunks)
        num_again = sum(chunk.num_again for chunk in blended.chunks)
        # What is blended ends with a block of the prompt, which may cut the last chunk.
        assert abs(stats.tokens_computed - len(request.token_ids) - num_again) < 32


async def test_one_tenants_chunks_are_computed_again_for_another(model: Path) -> None:
    async with started(model) as worker:
        await worker.generate(rag(tenant_salt=b"a"))
        own = await worker.generate(rag((1, 0, 2, 3), tenant_salt=b"a"))
        other = await worker.generate(rag((1, 0, 2, 3), tenant_salt=b"b"))
        num_alone = 32 + sum(len(chunk) // 32 * 32 for chunk in CHUNKS)
        assert other.stats.tokens_computed - own.stats.tokens_computed == num_alone
        assert other.tokens == own.tokens


async def test_prefill_worker_blends_for_a_decode_worker(model: Path) -> None:
    async with started(model) as worker:
        expected = await worker.generate(rag())
    async with (
        started(model, "p", role="prefill", max_batch_tokens=48) as prefill,
        started(model, "d", role="decode") as decode,
    ):
        request = rag()
        request.prefill_peer.CopyFrom(prefill.address)
        result = await decode.generate(request)
        assert result.error is None
        assert result.tokens == expected.tokens
        assert result.stats.prefill_worker == "p"
        assert result.stats.kv_bytes_moved > 0
        taken = from_chunks((0, 1, 2, 3))
        assert (result.stats.tokens_from_chunks, result.stats.tokens_recomputed) == taken
        assert not any(decode.host.served().engine.holds(exact_names(decode, request)))
        await until(lambda: prefill.is_idle and decode.is_idle)


async def test_resumed_request_goes_on_with_the_same_tokens(model: Path) -> None:
    async with started(model) as worker:
        whole = await worker.generate(rag())
    async with started(model) as worker:
        rest = await worker.generate(rag(resume_token_ids=whole.tokens[:5]))
        assert rest.tokens == whole.tokens[5:]


@pytest.mark.parametrize("when", ["chunk alone", "blend"])
async def test_request_given_up_midway_leaves_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    reached, go_on = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    if when == "blend":
        compute = blend._compute

        def noted(*args: object, **kwargs: object) -> None:
            compute(*args, **kwargs)
            loop.call_soon_threadsafe(reached.set)

        monkeypatch.setattr(blend, "_compute", noted)
    else:
        computed = chunk_reuse._is_computed

        async def held(events: object) -> bool:
            reached.set()
            await go_on.wait()
            return await computed(events)

        monkeypatch.setattr(chunk_reuse, "_is_computed", held)
    async with started(model, max_batch_tokens=8) as worker:
        serving = asyncio.create_task(worker.generate(rag()))
        await reached.wait()
        serving.cancel()
        await asyncio.wait({serving})
        await until(lambda: worker.is_idle)
        monkeypatch.undo()
        assert len((await worker.generate(rag())).tokens) == 8


async def test_failed_blend_is_computed_instead(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started(model) as worker:
        expected = await worker.generate(plain(rag()))

    def fail(*_: object, **__: object) -> None:
        raise ValueError("no")

    async with started(model) as worker:
        monkeypatch.setattr(blend, "_chosen", fail)
        result = await worker.generate(rag())
        assert result.tokens == expected.tokens
        assert result.stats.tokens_from_chunks == 0
        await until(lambda: worker.is_idle)


async def test_other_requests_are_served_while_prompts_are_blended(model: Path) -> None:
    async with started(model, max_batch_tokens=32) as worker:
        alone = await worker.generate(make_request(prompt(50), max_tokens=40))
        mixed = await asyncio.gather(
            worker.generate(make_request(prompt(50), max_tokens=40)),
            *(worker.generate(rag(order)) for order in ((0, 1, 2), (2, 1), (3, 0, 1), (1, 2, 3))),
        )
        assert mixed[0].tokens == alone.tokens
        assert all(len(result.tokens) == 8 for result in mixed[1:])
        await until(lambda: worker.is_idle)


async def test_memory_for_one_prompt_serves_many(model: Path) -> None:
    """Chunks are evicted and computed again, requests wait, nobody waits for ever."""
    async with started(model, kv_cache_mb=1) as worker:
        assert worker.blocks_free < 8 * len(rag().token_ids) // 32
        orders = [tuple(np.random.default_rng(seed).permutation(4)) for seed in range(8)]
        results = await asyncio.gather(*(worker.generate(rag(order)) for order in orders))
        assert all(len(result.tokens) == 8 for result in results)


def spans(*bounds: tuple[int, int]) -> list[common_pb2.TokenSpan]:
    return [common_pb2.TokenSpan(start=start, end=end) for start, end in bounds]


@pytest.mark.parametrize(
    ("chunks", "param"),
    [
        (common_pb2.Chunks(recompute_permille=150), "chunks.spans"),
        (common_pb2.Chunks(spans=spans((0, 50))), "chunks.recompute_permille"),
        (common_pb2.Chunks(spans=spans((0, 50)), recompute_permille=1001), "chunks.recompute"),
        (common_pb2.Chunks(spans=spans((0, 101)), recompute_permille=150), "chunks.spans"),
        (common_pb2.Chunks(spans=spans((40, 40)), recompute_permille=150), "chunks.spans"),
        (common_pb2.Chunks(spans=spans((50, 40)), recompute_permille=150), "chunks.spans"),
        (common_pb2.Chunks(spans=spans((0, 50), (49, 90)), recompute_permille=150), "chunks.spans"),
    ],
)
async def test_malformed_chunks_are_refused_by_name(
    model: Path, chunks: common_pb2.Chunks, param: str
) -> None:
    async with started(model) as worker:
        result = await worker.generate(make_request(prompt(100), chunks=chunks))
        assert result.error is not None
        assert result.error.reason is Reason.INVALID_REQUEST
        assert result.error.param is not None
        assert result.error.param.startswith(param)


@pytest.mark.parametrize("bounds", [(0, 100), (0, 10), (95, 100), (60, 64), (32, 96)])
async def test_chunks_of_any_place_and_size_are_served(
    model: Path, bounds: tuple[int, int]
) -> None:
    chunks = common_pb2.Chunks(spans=spans(bounds), recompute_permille=1000)
    async with started(model) as worker:
        exact = await worker.generate(make_request(prompt(100)))
    async with started(model) as worker:
        result = await worker.generate(make_request(prompt(100), chunks=chunks))
        assert result.tokens == exact.tokens
        await until(lambda: worker.is_idle)


def test_blended_salts_differ_whenever_what_is_blended_differs() -> None:
    tokens = list(range(100))
    base = (b"t", tokens, [(10, 40), (40, 80)], 150)
    others = [
        (b"", tokens, [(10, 40), (40, 80)], 150),
        (b"t", [9, *tokens[1:]], [(10, 40), (40, 80)], 150),
        (b"t", tokens, [(10, 41), (41, 80)], 150),
        (b"t", tokens, [(10, 80)], 150),
        (b"t", tokens, [(10, 40), (40, 80)], 151),
    ]
    salts = {block.blended_salt(*each) for each in (base, *others)}
    assert len(salts) == len(others) + 1
    assert block.blended_salt(b"t", [*tokens[:80], 7], base[2], 150) == block.blended_salt(*base)
