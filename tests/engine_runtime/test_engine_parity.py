"""The same tokens whatever else happens: chunks, company, preemption, cached prefixes, resuming."""

import asyncio

import pytest
from engine_builders import (
    MODELS,
    golden_arrays,
    golden_model,
    make_request,
    prompt,
    serving,
)

MARGIN_MIN = 0.1
"""Below it, rounding may decide which token comes next."""
SAMPLED = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 1234}


@pytest.mark.parametrize("name", MODELS)
async def test_greedy_output_is_the_golden_one(name: str) -> None:
    """Behind a close call that went the other way, the output is resumed from the golden one."""
    golden = golden_arrays(name)
    ids = tuple(golden["ids_64"].tolist())
    expected = golden["greedy_48_from_64"].tolist()
    num_done = 0
    async with serving(golden_model(name)) as served:
        while num_done < len(expected):
            done = tuple(expected[:num_done])
            request = make_request(ids, max_tokens=len(expected), resume_tokens=done)
            tokens = [*done, *await served.tokens(request)]
            differing = [
                i for i, pair in enumerate(zip(tokens, expected, strict=True)) if len({*pair}) > 1
            ]
            if not differing:
                break
            assert golden["greedy_margins"][differing[0]] <= MARGIN_MIN
            num_done = differing[0] + 1


async def reference(num_tokens: int = 100, **sampling: object) -> list[int]:
    """What the request gives alone, computed in one piece."""
    async with serving() as served:
        return await served.tokens(make_request(prompt(num_tokens), max_tokens=40, **sampling))


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("chunk", [1, 7, 32, 512])
async def test_chunk_size_does_not_matter(chunk: int, sampling: dict) -> None:
    async with serving(max_batch_tokens=chunk) as served:
        tokens = await served.tokens(make_request(prompt(100), max_tokens=40, **sampling))
    assert tokens == await reference(**sampling)


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
async def test_company_does_not_matter(sampling: dict) -> None:
    async with serving(max_batch_tokens=48) as served:
        others = [make_request(prompt(20 + 9 * i, seed=i), max_tokens=30) for i in range(2, 9)]
        request = make_request(prompt(100), max_tokens=40, **sampling)
        tokens, *_ = await asyncio.gather(
            served.tokens(request), *(served.tokens(other) for other in others)
        )
    assert tokens == await reference(**sampling)


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
async def test_preemption_does_not_matter(sampling: dict) -> None:
    async with serving(num_blocks=8, max_batch_tokens=64) as served:
        requests = [make_request(prompt(100), max_tokens=40, **sampling) for _ in range(1)]
        requests += [make_request(prompt(33 + i, seed=i), max_tokens=90) for i in range(2, 5)]
        outputs = await asyncio.gather(*map(served.tokens, reversed(requests)))
        assert served.engine.counters().num_preemptions > 0
        await served.until_empty()
    assert outputs[-1] == await reference(**sampling)
    for request, tokens in zip(requests[1:], reversed(outputs[:-1]), strict=True):
        async with serving() as served:
            assert tokens == await served.tokens(request)


async def test_a_cached_prefix_does_not_matter() -> None:
    async with serving() as served:
        first = await served.tokens(make_request(prompt(100), max_tokens=40))
        again = make_request(prompt(100), max_tokens=40)
        stream = served.engine.generate(again)
        events = [event async for event in stream]
        tokens = [token for event in events for token in event.token_ids]
        assert events[0].timing is not None
        assert events[0].timing.tokens_cached == 96
        assert events[0].timing.tokens_computed == 4
    assert first == tokens == await reference()


async def test_a_prompt_that_is_cached_to_its_end_still_gives_logits() -> None:
    async with serving() as served:
        first = await served.tokens(make_request(prompt(64), max_tokens=40))
        events = [e async for e in served.engine.generate(make_request(prompt(64), max_tokens=40))]
        assert events[0].timing is not None
        assert events[0].timing.tokens_cached == 32
        assert first == [token for event in events for token in event.token_ids]
        await served.until_empty()


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_done", [1, 28, 39])
async def test_a_request_resumes_where_another_worker_stopped(
    num_done: int, sampling: dict
) -> None:
    whole = await reference(**sampling)
    async with serving() as served:
        rest = await served.tokens(
            make_request(
                prompt(100), max_tokens=40, resume_tokens=tuple(whole[:num_done]), **sampling
            )
        )
    assert whole[:num_done] + rest == whole


async def test_tenants_share_no_blocks() -> None:
    async with serving() as served:
        first = await served.tokens(make_request(prompt(100), tenant_salt=b"a" * 16))
        events = [
            event
            async for event in served.engine.generate(
                make_request(prompt(100), tenant_salt=b"b" * 16)
            )
        ]
        assert events[0].timing is not None
        assert events[0].timing.tokens_cached == 0
        assert first == [token for event in events for token in event.token_ids]
