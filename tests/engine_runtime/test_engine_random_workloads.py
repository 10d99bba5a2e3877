"""Random workloads on every kernel path: each request says what it says alone; no block leaks."""

import asyncio
import random
from dataclasses import dataclass

import pytest
from engine_builders import GOLDENS, Served, make_request, prompt, serving
from golden_models import PATHS, RUNNABLE
from kvasir_engine.core.types import EngineRequest
from kvasir_engine.formats import KvFormat, WeightFormat
from kvasir_engine.model import LoadedModel, load_model

NUM_REQUESTS = 8
MODELS = ("qwen3-qknorm", "mixtral-moe", "llama-gqa-tied")
FORMATS: list[tuple[WeightFormat, KvFormat]] = [
    ("bf16", "bf16"),
    ("bf16", "int8"),
    ("int8", "bf16"),
    ("int4", "int8"),
]


@dataclass(frozen=True, slots=True)
class Client:
    """A request, when it comes, and whether its client goes before the end."""

    request: EngineRequest
    turns_before: int
    """Of the event loop."""
    leaves_after: int | None
    """Tokens; None: it stays."""


def random_request(source: random.Random) -> EngineRequest:
    """Prompts share beginnings, which end within blocks and between them; greedy and sampled."""
    length = source.choice([1, 32, 33, 64, source.randrange(40, 150)])
    shared = prompt(150, seed=source.randrange(2))
    own = prompt(150, seed=source.randrange(9, 11))
    cut = source.choice([0, 33, 97])
    sampling = {} if source.random() < 0.5 else {"temperature": 0.9, "top_p": 0.95}
    return make_request(
        (shared[:cut] + own)[:length],
        max_tokens=source.randrange(10, 70),
        seed=source.randrange(99),
        tenant_salt=source.choice([b"", b"a" * 16]),
        **sampling,
    )


def random_client(source: random.Random) -> Client:
    """One in three leaves early."""
    leaves_after = source.choice([None, None, None, None, 1, 3])
    return Client(random_request(source), source.randrange(20), leaves_after)


async def tokens_of(served: Served, client: Client) -> list[int] | None:
    """What the client was told; None if it left."""
    for _ in range(client.turns_before):
        await asyncio.sleep(0)
    stream = served.engine.generate(client.request)
    tokens: list[int] = []
    async with asyncio.timeout(60):
        async for event in stream:
            tokens += event.token_ids
            if client.leaves_after is not None and len(tokens) >= client.leaves_after:
                await stream.aclose()
                return None
    return tokens


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("weights", "kv"), FORMATS)
@pytest.mark.parametrize("path", PATHS)
async def test_random_workloads_say_what_each_request_says_alone(
    path: str, weights: WeightFormat, kv: KvFormat, seed: int
) -> None:
    if path not in RUNNABLE:
        pytest.skip(f"KERNEL PATH {path} DOES NOT RUN ON THIS PROCESSOR")
    source = random.Random(seed)
    name = source.choice(MODELS)

    def model() -> LoadedModel:
        return load_model(GOLDENS / name, num_threads=1, isa=path, weights=weights, kv=kv)

    clients = [random_client(source) for _ in range(NUM_REQUESTS)]
    limits = {
        "num_blocks": source.randrange(7, 9),  # hold one long request: others are preempted
        "max_batch_tokens": source.choice([40, 200]),
        "max_running": source.randrange(4, 7),
    }
    async with serving(model(), **limits) as served:
        found = await asyncio.gather(*(tokens_of(served, client) for client in clients))
        await served.until_empty()
    for client, tokens in zip(clients, found, strict=True):
        if tokens is not None:
            async with serving(model()) as served:
                assert tokens == await served.tokens(client.request), limits
