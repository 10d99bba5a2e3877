"""The worker's HTTP side: token streams for routers, health, readiness and metrics.

`POST /internal/generate` answers with frames (kvasir_proto.frames). The status line waits for the
first token, so that a request which cannot be served gets a plain HTTP status with a serialised
kvasir.v1.Error as body; once tokens flow, an error is a frame. A client that goes away cancels.
"""

import logging
from collections.abc import Sequence

from aiohttp import web
from google.protobuf.message import DecodeError
from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.frames import FrameKind, encode_frame
from kvasir_proto.rpc_errors import error_to_message
from kvasir_proto.v1 import worker_pb2

from kvasir_engine.worker.generate import Delta, Done, Generator
from kvasir_engine.worker.host import Host
from kvasir_engine.worker.metrics import CONTENT_TYPE
from kvasir_engine.worker.stream import ChunkFormat, GrpcFormat, chunk_format

log = logging.getLogger(__name__)

BODY_BYTES_MAX = 16 << 20
CLIENT_GONE = 499
FRAMES_TYPE = "application/x-kvasir-frames"
ERROR_TYPE = "application/x-kvasir-error"


class _FrameStream:
    """One response: begun by the first output, ended by DONE or ERROR."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._chunks: ChunkFormat = GrpcFormat()
        self._first = True
        self._response: web.StreamResponse | None = None
        self._text_chars = 0

    def begin(self, chunks: ChunkFormat, *, resumed: bool) -> None:
        """Sets the payloads' format; `resumed`: the client has received output before."""
        self._chunks = chunks
        self._first = not resumed

    async def send(self, output: Delta | Done) -> None:
        """Writes one output as a frame, two for the last."""
        if isinstance(output, Delta):
            payload = self._chunks.delta(output.text, output.token_ids, first=self._first)
            self._first = False
            self._text_chars = output.text_chars
            await self._write(
                encode_frame(
                    FrameKind.TOKENS,
                    payload,
                    token_ids=output.token_ids,
                    text_chars=output.text_chars,
                )
            )
            return
        frames = b""
        if payload := self._chunks.finish(output.finish_reason):
            frames = encode_frame(FrameKind.TOKENS, payload, text_chars=self._text_chars)
        done = output.chunk().SerializeToString()
        frames += encode_frame(FrameKind.DONE, done, text_chars=self._text_chars)
        await self._write(frames)

    async def fail(self, error: KvasirError) -> web.StreamResponse:
        """Ends with an error: a status before the first output, a frame after it."""
        body = error_to_message(error).SerializeToString()
        if self._response is None:
            return web.Response(status=error.status.http, body=body, content_type=ERROR_TYPE)
        await self._write(encode_frame(FrameKind.ERROR, body, text_chars=self._text_chars))
        return await self.end()

    def abandoned(self) -> web.StreamResponse:
        """The client left while a frame was written to it: nobody reads what is returned."""
        return self._response or web.Response(status=CLIENT_GONE)

    async def end(self) -> web.StreamResponse:
        """Ends the body."""
        if self._response is None:
            raise RuntimeError("a stream ended without any output")
        await self._response.write_eof()
        return self._response

    async def _write(self, data: bytes) -> None:
        if self._response is None:
            self._response = web.StreamResponse(headers={"Content-Type": FRAMES_TYPE})
            await self._response.prepare(self._request)
        await self._response.write(data)


def make_app(routes: Sequence[web.RouteDef]) -> web.Application:
    """An application; run it with `handler_cancellation=True`."""
    app = web.Application(client_max_size=BODY_BYTES_MAX)
    app.add_routes(routes)
    return app


class HttpApi:
    """The handlers."""

    def __init__(self, host: Host, generator: Generator) -> None:
        self._host = host
        self._generator = generator

    def streams(self) -> list[web.RouteDef]:
        """What routers ask."""
        return [web.post("/internal/generate", self.generate)]

    def probes(self) -> list[web.RouteDef]:
        """What Kubernetes and Prometheus ask."""
        return [
            web.get("/metrics", self.metrics),
            web.get("/healthz", self.healthz),
            web.get("/readyz", self.readyz),
        ]

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """POST /internal/generate."""
        message = worker_pb2.GenerateRequest()
        stream = _FrameStream(request)
        try:
            message.ParseFromString(await _body(request))
            stream.begin(chunk_format(message), resumed=bool(message.resume_token_ids))
            async with self._generator.opened(message) as outputs:
                async for output in outputs:
                    await stream.send(output)
            return await stream.end()
        except KvasirError as error:
            return await stream.fail(error)
        except ConnectionError:
            return stream.abandoned()
        except DecodeError:
            refusal = KvasirError(Reason.INVALID_REQUEST, "the body is not a GenerateRequest")
            return await stream.fail(refusal)
        except Exception as error:
            log.exception("request %s failed", message.request_id)
            return await stream.fail(KvasirError(Reason.INTERNAL, type(error).__name__))

    async def metrics(self, _request: web.Request) -> web.Response:
        """GET /metrics."""
        body = self._host.metrics.render()
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    async def healthz(self, _request: web.Request) -> web.Response:
        """GET /healthz: 200 unless only a restart can help."""
        problem = self._host.fatal
        return web.json_response({"alive": not problem}, status=503 if problem else 200)

    async def readyz(self, _request: web.Request) -> web.Response:
        """GET /readyz: 200 only when requests can be served."""
        problems = self._host.problems()
        return web.json_response(
            {"ready": not problems, "problems": problems}, status=503 if problems else 200
        )


async def _body(request: web.Request) -> bytes:
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        message = f"the body is larger than {BODY_BYTES_MAX} bytes"
        raise KvasirError(Reason.TOO_LARGE, message) from error
