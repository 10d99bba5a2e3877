"""The routes of the OpenAI API: a body in, a stream or a body out."""

import secrets
import time
from collections.abc import Mapping
from typing import Any

from aiohttp import web
from kvasir_proto.errors import KvasirError
from kvasir_proto.v1 import common_pb2, worker_pb2

from kvasir_router.intake import Caller, Intake, Wanted, random_seed
from kvasir_router.openai.body import read_body
from kvasir_router.openai.errors import error_event
from kvasir_router.openai.render import DONE_EVENT, completion_body, usage_event
from kvasir_router.openai.schema import Body, ChatBody, CompletionBody
from kvasir_router.openai.sinks import EventSink, TextSink, worker_headers
from kvasir_router.settings import RouterSettings
from kvasir_router.terms import with_headers
from kvasir_router.upstream.call import Call, Progress
from kvasir_router.upstream.dispatch import Dispatcher

COMPLETION_TOKENS_DEFAULT = 16
"""OpenAI's default for /v1/completions; chat has none."""

CALLER = web.RequestKey("caller", Caller)


class OpenAiApi:
    """Handlers of /v1."""

    def __init__(self, settings: RouterSettings, intake: Intake, dispatcher: Dispatcher) -> None:
        self._settings, self._intake, self._dispatcher = settings, intake, dispatcher
        self._started_s = int(time.time())

    def routes(self) -> list[web.AbstractRouteDef]:
        """What to add to the application."""
        return [
            web.post("/v1/chat/completions", self.chat),
            web.post("/v1/completions", self.complete),
            web.get("/v1/models", self.models),
            web.get("/v1/models/{id:.+}", self.model),
        ]

    async def models(self, request: web.Request) -> web.Response:
        """GET /v1/models."""
        return web.json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: web.Request) -> web.Response:
        """GET /v1/models/{id}."""
        self._intake.check_model(request.match_info["id"])
        return web.json_response(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._settings.model_name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "kvasir",
            "max_model_len": self._intake.context_length,
        }

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        bytes_max = self._settings.body_bytes_max
        body = await read_body(request, ChatBody, bytes_max=bytes_max)
        self._intake.check_model(body.model)
        messages = [message.for_template() for message in body.messages]
        token_ids = await self._intake.encode_chat(messages)
        asked = body.max_completion_tokens
        wanted = _wanted(
            body,
            max_tokens=body.max_tokens if asked is None else asked,
            max_tokens_param="max_tokens" if asked is None else "max_completion_tokens",
            prompt_param="messages",
            headers=request.headers,
        )
        return await self._answer(
            request, body, self._intake.call(token_ids, wanted, request[CALLER])
        )

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        bytes_max = self._settings.body_bytes_max
        body = await read_body(request, CompletionBody, bytes_max=bytes_max)
        self._intake.check_model(body.model)
        token_ids = await self._prompt_ids(body.prompt)
        wanted = _wanted(
            body,
            max_tokens=body.max_tokens or COMPLETION_TOKENS_DEFAULT,
            max_tokens_param="max_tokens",
            prompt_param="prompt",
            headers=request.headers,
        )
        return await self._answer(
            request, body, self._intake.call(token_ids, wanted, request[CALLER])
        )

    async def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return await self._intake.encode(prompt, param="prompt")
        self._intake.check_ids(prompt, param="prompt")
        return prompt

    async def _answer(self, request: web.Request, body: Body, call: Call) -> web.StreamResponse:
        if body.stream:
            return await self._stream(request, body, call)
        sink, progress = TextSink(), Progress()
        done = await self._dispatcher.run(call, sink, progress)
        answer = completion_body(
            call, done, progress, text=sink.text(), is_chat=isinstance(body, ChatBody)
        )
        return web.json_response(answer, headers=worker_headers(progress.route))

    async def _stream(self, request: web.Request, body: Body, call: Call) -> web.StreamResponse:
        sink = EventSink(request, {"x-request-id": call.request_id})
        progress = Progress()
        try:
            done = await self._dispatcher.run(call, sink, progress)
        except KvasirError as error:
            if sink.response is None:
                raise
            return await sink.finish(error_event(error))
        except Exception:
            sink.abort()
            raise
        tail = DONE_EVENT
        if body.includes_usage:
            tail = usage_event(call, done, progress, is_chat=isinstance(body, ChatBody)) + tail
        return await sink.finish(tail)


def _wanted(
    body: Body,
    *,
    max_tokens: int | None,
    max_tokens_param: str,
    prompt_param: str,
    headers: Mapping[str, str],
) -> Wanted:
    is_chat = isinstance(body, ChatBody)
    streamed = (
        worker_pb2.STREAM_FORMAT_OPENAI_CHAT
        if is_chat
        else worker_pb2.STREAM_FORMAT_OPENAI_COMPLETION
    )
    return Wanted(
        sampling=sampling_of(body),
        max_tokens=max_tokens,
        max_tokens_param=max_tokens_param,
        prompt_param=prompt_param,
        terms=with_headers(body, headers),
        format=streamed if body.stream else worker_pb2.STREAM_FORMAT_TEXT,
        stream_id=f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
    )


def sampling_of(body: Body) -> common_pb2.SamplingParams:
    """Sampling as the engine takes it, OpenAI's defaults filled in."""
    return common_pb2.SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=random_seed() if body.seed is None else body.seed % 2**64,
        stop=body.stop,
        ignore_eos=bool(body.ignore_eos),
    )
