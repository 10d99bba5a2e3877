"""Builders for engine tests: golden models with real KV memory, requests, whole outputs."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
from kvasir_engine.core.types import EngineLimits, EngineRequest, FinishReason, Sampling, TokenEvent
from kvasir_engine.engine import Engine
from kvasir_engine.model import LoadedModel, load_model
from kvasir_engine.stream import TokenStream
from kvasir_kvstore._native import BlockPool
from kvasir_kvstore.core.block import KvLayout

GOLDENS = Path(__file__).parent.parent / "fixtures" / "goldens"
MODELS = ("llama-gqa-tied", "llama3-rope-scaled", "mixtral-moe", "qwen2-bias", "qwen3-qknorm")
VOCAB_SIZE = 512
_ids = itertools.count(1)


def golden_model(name: str = MODELS[0], *, num_threads: int = 1) -> LoadedModel:
    """Loaded anew: a model writes to one pool."""
    return load_model(GOLDENS / name, num_threads=num_threads)


@cache
def golden_arrays(name: str) -> dict[str, np.ndarray]:
    data = (GOLDENS / name / "golden.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    types = {"I32": "<i4", "F32": "<f4"}
    return {
        key: np.frombuffer(
            data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
            types[entry["dtype"]],
        ).reshape(entry["shape"])
        for key, entry in header.items()
    }


def prompt(num_tokens: int, *, seed: int = 1) -> tuple[int, ...]:
    """Token ids that differ from seed to seed from the first one on."""
    return tuple((seed * 131 + i * i * 7 + i * 13) % 509 + 1 for i in range(num_tokens))


def make_request(
    token_ids: tuple[int, ...], *, session: int | None = None, **changes: object
) -> EngineRequest:
    """A greedy request for 8 tokens; `changes` are fields of the request or of its sampling."""
    fields = {key: changes.pop(key) for key in list(changes) if key in EngineRequest.__slots__}
    sampling = replace(Sampling(max_tokens=8, ignore_eos=True), **changes)  # type: ignore[arg-type]
    request = EngineRequest(f"r{next(_ids)}", token_ids, sampling, prefill_only_session=session)
    return replace(request, **fields)  # type: ignore[arg-type]


def deadline_in(timeout_ms: float) -> float:
    return time.monotonic() * 1000 + timeout_ms


def make_pool(layout: KvLayout, num_blocks: int) -> BlockPool:
    return BlockPool(
        num_blocks=num_blocks,
        num_layers=layout.num_layers,
        layer_bytes=layout.layer_bytes,
        layout_digest=layout.digest,
    )


@dataclass
class Served:
    """A running engine and its memory."""

    engine: Engine
    pool: BlockPool
    num_blocks: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_blocks = self.pool.num_blocks

    @property
    def num_blocks_free(self) -> int:
        return self.engine.load().blocks_free

    async def tokens(self, request: EngineRequest) -> list[int]:
        """All tokens of one request."""
        return (await collect(self.engine.generate(request))).tokens

    async def until(self, is_true: Callable[[], bool]) -> None:
        """Waits for what the engine's thread brings about."""
        async with asyncio.timeout(20):
            while not is_true():  # noqa: ASYNC110
                await asyncio.sleep(0.002)

    async def until_empty(self) -> None:
        """Everything has ended and all memory is back."""
        await self.until(lambda: self.engine.num_requests_open == 0)
        assert self.num_blocks_free == self.num_blocks
        assert self.pool.num_sessions == 0


@dataclass
class Output:
    """What a stream held."""

    tokens: list[int] = field(default_factory=list)
    events: list[TokenEvent] = field(default_factory=list)

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.events[-1].finish_reason


async def collect(stream: TokenStream) -> Output:
    """A stream to its end."""
    output = Output()
    async with asyncio.timeout(60):
        async for event in stream:
            output.tokens += event.token_ids
            output.events.append(event)
    return output


@asynccontextmanager
async def serving(
    model: object | None = None,
    *,
    num_blocks: int = 64,
    eos: tuple[int, ...] = (),
    **limits: int,
) -> AsyncIterator[Served]:
    """A running engine; nothing may be left open at its end."""
    loaded = model or golden_model()
    pool = make_pool(loaded.layout, num_blocks)  # type: ignore[attr-defined]
    engine = Engine(
        loaded,  # type: ignore[arg-type]
        pool,
        limits=EngineLimits(num_blocks, 2048, VOCAB_SIZE, **limits),
        eos_token_ids=eos,
    )
    async with engine:
        yield Served(engine, pool)
