"""A router on loopback with fake workers behind it, and a model folder that is text only."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import openai
import tokenizers
from fake_worker import FakeWorker
from kvasir_engine.text import Tokenizer
from kvasir_proto.v1 import inference_pb2_grpc
from kvasir_router.server import RouterServer
from kvasir_router.settings import RouterSettings

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT_LENGTH = 512


def make_model_dir(folder: Path) -> Path:
    """A byte-level tokenizer (one token per byte), a chat template and a context length."""
    vocab = {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.save(str(folder / "tokenizer.json"))
    config = {"max_position_embeddings": CONTEXT_LENGTH, "vocab_size": 256}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


class RouterUnderTest:
    """A running router, its workers and clients."""

    def __init__(self, server: RouterServer, workers: list[FakeWorker]) -> None:
        self.server, self.workers = server, {w.name: w for w in workers}
        self.url = f"http://127.0.0.1:{server.http_port}"
        self.openai = openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20
        )
        self.http = aiohttp.ClientSession(self.url)
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}")
        self.stub = inference_pb2_grpc.InferenceStub(self.channel)

    async def close(self) -> None:
        await self.openai.close()
        await self.http.close()
        await self.channel.close()

    def requests(self) -> list[Any]:
        """What all workers were sent."""
        return [request for worker in self.workers.values() for request in worker.requests]

    def served_by(self) -> list[str]:
        """Names of the workers that were sent something."""
        return sorted(name for name, worker in self.workers.items() if worker.requests)

    async def until(self, condition: Callable[[], Any]) -> None:
        """Waits for a condition that a member's change brings about."""
        async with asyncio.timeout(10):
            while not condition():
                await self.server.fleet.changed()

    async def has_members(self, *names: str) -> None:
        """Waits until exactly these workers are routed to."""
        await self.until(lambda: set(self.server.fleet.view().workers) == set(names))

    async def post(self, path: str, body: Any, **kwargs: Any) -> tuple[int, Any]:
        """Status and JSON of a raw request; `body` bytes are sent as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.http.post(path, data=data, **kwargs) as response:
            return response.status, await response.json()

    async def chat_text(self, **kwargs: Any) -> str:
        """The text of a streamed chat, and that its shape is right."""
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}
        stream = await self.openai.chat.completions.create(**{**asked, **kwargs}, stream=True)
        chunks = [chunk async for chunk in stream]
        deltas = [c.choices[0].delta for c in chunks if c.choices]
        assert [i for i, delta in enumerate(deltas) if delta.role] == [0]
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
        return "".join(delta.content or "" for delta in deltas)


@contextlib.asynccontextmanager
async def running_router(
    folder: Path, *workers: FakeWorker, ready: bool = True, **settings: Any
) -> AsyncIterator[RouterUnderTest]:
    """Starts workers and router; waits until all workers are known."""
    async with contextlib.AsyncExitStack() as stack:
        for worker in workers:
            await worker.start()
            stack.push_async_callback(worker.stop)
        known = {"workers": tuple(w.target for w in workers), "http_port": 0, "grpc_port": 0}
        server = RouterServer(
            RouterSettings(
                model=folder, model_name="tiny", **{**known, "drain_timeout_ms": 2_000, **settings}
            ),
            Tokenizer.load(make_model_dir(folder)),
        )
        stack.push_async_callback(server.stop)
        await server.start()
        router = RouterUnderTest(server, list(workers))
        stack.push_async_callback(router.close)
        if ready:
            await router.until(lambda: len(server.fleet.view().workers) == len(workers))
        yield router
