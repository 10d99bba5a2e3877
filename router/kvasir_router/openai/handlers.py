"""The routes of the OpenAI API: a body in, a stream or a body out."""

import time
from typing import Any

from aiohttp import web
from kvasir_proto.errors import KvasirError

from kvasir_router.intake import Caller, Intake
from kvasir_router.openai.body import read_body
from kvasir_router.openai.calls import OpenAiCalls
from kvasir_router.openai.errors import error_event
from kvasir_router.openai.render import DONE_EVENT, completion_body, usage_event
from kvasir_router.openai.schema import Body, ChatBody, CompletionBody
from kvasir_router.openai.sinks import EventSink, TextSink, worker_headers
from kvasir_router.settings import RouterSettings
from kvasir_router.upstream.call import Call, Progress
from kvasir_router.upstream.dispatch import Dispatcher

CALLER = web.RequestKey("caller", Caller)


class OpenAiApi:
    """Handlers of /v1."""

    def __init__(
        self,
        settings: RouterSettings,
        intake: Intake,
        calls: OpenAiCalls,
        dispatcher: Dispatcher,
    ) -> None:
        self._settings, self._intake, self._dispatcher = settings, intake, dispatcher
        self._calls = calls
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
        return await self._answer(request, body)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        bytes_max = self._settings.body_bytes_max
        body = await read_body(request, CompletionBody, bytes_max=bytes_max)
        return await self._answer(request, body)

    async def _answer(self, request: web.Request, body: Body) -> web.StreamResponse:
        call = await self._calls.call_of(body, request.headers, request[CALLER])
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
