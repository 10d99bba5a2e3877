"""A server that answers like vLLM's OpenAI server, as far as a worker asks it. Real HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

METRICS = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{model_name="tiny"}} {running}
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{model_name="tiny"}} 1.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{engine="0",model_name="tiny"}} 0.5
vllm:kv_cache_usage_perc{{engine="1",model_name="tiny"}} 1.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{{block_size="16",engine="0",num_gpu_blocks="800"}} 1.0
vllm:cache_config_info{{block_size="16",engine="1",num_gpu_blocks="800"}} 1.0
"""


@dataclass
class FakeVllm:
    """What it is to answer, and what it was asked."""

    output: list[int]
    finish: str = "length"
    cached_tokens: int = 0
    gives_token_ids: bool = True
    echoed: list[int] = field(default_factory=list)
    """The prompt as the first event repeats it, if not as it was."""
    refusal: tuple[int, str] | None = None
    is_healthy: bool = True
    cuts_after: int | None = None
    """Tokens after which the connection breaks."""
    holds_after: int | None = None
    """Tokens after which nothing more comes."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    num_running: int = 0
    num_left_early: int = 0
    num_not_ready: int = 0
    """Times that it was asked too early."""
    url: str = ""

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        body = await request.json()
        self.bodies.append(body)
        if self.refusal is not None:
            status, message = self.refusal
            return web.json_response({"error": {"message": message}}, status=status)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.num_running += 1
        try:
            await self._stream(body, request, response)
        except (asyncio.CancelledError, ConnectionError):
            self.num_left_early += 1
            raise
        finally:
            self.num_running -= 1
        return response

    async def _stream(
        self, body: dict[str, Any], request: web.Request, response: web.StreamResponse
    ) -> None:
        tokens = self.output[: body["max_tokens"]]
        for count, token in enumerate(tokens, 1):
            finish = self.finish if count == len(tokens) else None
            choice = {"index": 0, "text": "x", "finish_reason": finish}
            if self.gives_token_ids:
                choice["token_ids"] = [token]
                choice["prompt_token_ids"] = self.echoed or body["prompt"] if count == 1 else None
            await _event(response, {"choices": [choice]})
            if count == self.cuts_after:
                assert request.transport is not None
                request.transport.close()
                return
            if count == self.holds_after:
                await asyncio.Event().wait()
        details = {"cached_tokens": self.cached_tokens}
        await _event(response, {"choices": [], "usage": {"prompt_tokens_details": details}})
        await response.write(b"data: [DONE]\n\n")

    async def models(self, _request: web.Request) -> web.Response:
        """GET /v1/models."""
        status = 200 if self.is_healthy else 503
        self.num_not_ready += not self.is_healthy
        model = {"id": "tiny", "max_model_len": 256}
        return web.json_response({"data": [model]}, status=status)

    async def metrics(self, _request: web.Request) -> web.Response:
        """GET /metrics."""
        if not self.is_healthy:
            return web.Response(status=503)
        return web.Response(text=METRICS.format(running=self.num_running))


async def _event(response: web.StreamResponse, data: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(data)}\n\n".encode())


@asynccontextmanager
async def fake_vllm(output: list[int], **settings: Any) -> AsyncIterator[FakeVllm]:
    """A server that answers every prompt with the same tokens."""
    fake = FakeVllm(output, **settings)
    app = web.Application()
    app.add_routes(
        [
            web.post("/v1/completions", fake.completions),
            web.get("/v1/models", fake.models),
            web.get("/metrics", fake.metrics),
        ]
    )
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield fake
    finally:
        await runner.cleanup()
