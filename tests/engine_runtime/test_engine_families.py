"""Windows, sparse layers and odd heads keep the engine's promise: company does not show."""

import asyncio
from pathlib import Path

import pytest
from engine_builders import VOCAB_SIZE, make_request, prompt, serving
from family_models import make_family_model
from kvasir_engine.model import LoadedModel, load_model

FAMILIES = ("mistral", "gemma3-capped", "qwen3-moe", "phi3", "llama-odd-sizes")


@pytest.mark.parametrize("family", FAMILIES)
async def test_company_preemption_and_cached_prefixes_do_not_show(
    family: str, tmp_path: Path
) -> None:
    folder = make_family_model(family, tmp_path / family, vocab_size=VOCAB_SIZE)

    def model() -> LoadedModel:
        return load_model(folder, num_threads=1)

    async with serving(model()) as served:
        expected = await served.tokens(make_request(prompt(100), max_tokens=40))
    async with serving(model(), num_blocks=8, max_batch_tokens=48) as served:
        others = [make_request(prompt(33 + i, seed=i), max_tokens=90) for i in range(2, 5)]
        *_, tokens = await asyncio.gather(
            *map(served.tokens, others), served.tokens(make_request(prompt(100), max_tokens=40))
        )
        assert served.engine.counters().num_preemptions > 0
        await served.until_empty()
    assert tokens == expected
    async with serving(model()) as served:
        await served.tokens(make_request(prompt(100), max_tokens=1))
        stream = served.engine.generate(make_request(prompt(100), max_tokens=40))
        events = [event async for event in stream]
    assert events[0].timing is not None
    assert events[0].timing.tokens_cached == 96
    assert [token for event in events for token in event.token_ids] == expected
