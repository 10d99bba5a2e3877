"""A worker at the transport seam: real gRPC and HTTP on loopback, scripted behaviour, no engine.

Its output token at index i is the letter i of the alphabet, over and over, whoever produced the
tokens before: a continuation that is right reads as if nothing had happened.
"""

import asyncio
import contextlib
import os
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from aiohttp import web
from kvasir_engine.worker.stream import chunk_format
from kvasir_kvstore.events import EventHub
from kvasir_proto.errors import PEER_PARAM, KvasirError, Reason
from kvasir_proto.frames import FrameKind, encode_frame
from kvasir_proto.rpc_errors import error_to_message
from kvasir_proto.v1 import common_pb2, worker_pb2, worker_pb2_grpc

ROLES = {
    "prefill": common_pb2.ROLE_PREFILL,
    "decode": common_pb2.ROLE_DECODE,
    "both": common_pb2.ROLE_BOTH,
}


@dataclass
class Script:
    """What the worker does to requests. `None`: it serves them."""

    refuse: Reason | None = None
    peer_refuses: Reason | None = None  # the error names the prefill peer, as a frame
    die_after: int | None = None  # tokens, then the connection is cut
    stall_after: int | None = None  # tokens, then silence
    pause_after: int | None = None  # tokens, then it waits for `resume`
    fail_after: int | None = None  # tokens, then an ERROR frame
    queue: bool = False  # it waits until it is handed back
    times: int = 1_000_000  # how many requests are treated so


def letter(index: int) -> str:
    return chr(ord("a") + index % 26)


@dataclass
class FakeWorker(worker_pb2_grpc.WorkerServicer):
    """One worker. `requests` are all that it was sent, in order."""

    name: str
    role: str = "both"
    fingerprint: bytes = b"f" * 16
    model: str = "tiny"
    script: Script = field(default_factory=Script)
    load: dict[str, Any] = field(default_factory=dict)
    draining: bool = False
    transfer_healthy: bool = True
    blocks_unannounced: bool = False
    crossed: bool = False
    canaries: dict[str, str] | None = None  # error by lender; None: of a release without canaries
    checked: list[tuple[str, ...]] = field(default_factory=list)
    requests: list[worker_pb2.GenerateRequest] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    resume: asyncio.Event = field(default_factory=asyncio.Event)
    watchers: list[asyncio.Queue[worker_pb2.WorkerEvent]] = field(default_factory=list)
    held: set[bytes] = field(default_factory=set)
    mute: bool = False
    hub: EventHub[worker_pb2.WorkerEvent] | None = None  # tells events as a real worker does
    breaks_stream: bool = False  # the next event of the hub is lost, and the stream that it was on
    waiting: dict[str, asyncio.Event] = field(default_factory=dict)
    grpc_port: int = 0

    async def start(self) -> "FakeWorker":
        self.server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self.server)
        self.grpc_port = self.server.add_insecure_port(f"127.0.0.1:{self.grpc_port}")
        await self.server.start()
        app = web.Application()
        app.router.add_post("/internal/generate", self._generate)
        self.runner = web.AppRunner(
            app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None
        )
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.http_port = self.runner.addresses[0][1]
        return self

    async def stop(self) -> None:
        await self.server.stop(None)
        await self.runner.cleanup()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def description(self) -> worker_pb2.WorkerDescription:
        load = {"blocks_total": 1_000, "blocks_free": 1_000, **self.load}
        return worker_pb2.WorkerDescription(
            address=common_pb2.PeerAddress(
                name=self.name,
                uid=b"u" * 16,
                epoch=1,
                host="127.0.0.1",
                grpc_port=self.grpc_port,
                http_port=self.http_port,
            ),
            role=ROLES[self.role],
            model=self.model,
            fingerprint=self.fingerprint,
            context_length=512,
            draining=self.draining,
            kv_transfer_healthy=self.transfer_healthy,
            blocks_unannounced=self.blocks_unannounced,
            kv_crossed=self.crossed,
            kv_transfer_error="" if self.transfer_healthy else "canary failed",
            load=worker_pb2.WorkerLoad(**load),
        )

    def tell(self, **event: Any) -> None:
        """An event to every router that watches."""
        event.setdefault("description", self.description())
        for queue in self.watchers:
            queue.put_nowait(worker_pb2.WorkerEvent(**event))

    async def WatchEvents(self, request, context):
        if self.hub is not None:
            watch = self.hub.watch(load_interval_ms=50, after=request.after)
            async with contextlib.aclosing(watch) as events:
                async for event in events:
                    if self.breaks_stream:
                        self.breaks_stream = False
                        return
                    yield event
            return
        queue: asyncio.Queue[worker_pb2.WorkerEvent] = asyncio.Queue()
        self.watchers.append(queue)
        sequence = 1
        yield worker_pb2.WorkerEvent(
            sequence=1, snapshot=True, stored=sorted(self.held), description=self.description()
        )
        try:
            while True:
                try:
                    async with asyncio.timeout(0.1):
                        event = await queue.get()
                except TimeoutError:
                    if self.mute:
                        continue
                    event = worker_pb2.WorkerEvent(description=self.description())
                sequence += 1
                event.sequence = event.sequence or sequence
                yield event
        finally:
            self.watchers.remove(queue)

    async def CheckTransfer(self, request, context):
        """Canaries cross from all but those that `canaries` names."""
        if self.canaries is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no canaries here")
        check, found = worker_pb2.TransferCheck, []
        self.checked.append(tuple(peer.name for peer in request.peers))
        for peer in request.peers:
            error = self.canaries.get(peer.name, "")
            found.append(check(outcome=check.OUTCOME_FAILED, error=error))
            if not error:
                found[-1] = check(outcome=check.OUTCOME_CROSSED)
                self.crossed = True
                break
        return worker_pb2.CheckTransferResponse(checks=found)

    async def HandBack(self, request, context):
        """Requests that wait before their first token end as busy."""
        found = [key for key in request.request_ids if key in self.waiting]
        for key in found:
            self.waiting.pop(key).set()
        return worker_pb2.HandBackResponse(num_handed_back=len(found))

    def _scripted(self) -> Script:
        if self.script.times <= 0:
            return Script()
        self.script.times -= 1
        return self.script

    async def _generate(self, http: web.Request) -> web.StreamResponse:
        request = worker_pb2.GenerateRequest.FromString(await http.read())
        self.requests.append(request)
        script = self._scripted()
        if script.refuse is not None:
            error = KvasirError(script.refuse, "scripted", retry_after_ms=2_500)
            body = error_to_message(error).SerializeToString()
            return web.Response(status=error.status.http, body=body)
        if script.queue:
            handed_back = self.waiting[request.request_id] = asyncio.Event()
            await handed_back.wait()
            error = KvasirError(Reason.BUSY, "handed back")
            return web.Response(status=429, body=error_to_message(error).SerializeToString())
        response = web.StreamResponse()
        await response.prepare(http)
        try:
            await self._stream(http, request, script, response)
        except (asyncio.CancelledError, ConnectionError):
            self.cancelled.set()
            raise
        return response

    async def _stream(self, http, request, script: Script, response) -> None:
        if script.peer_refuses is not None and request.HasField("prefill_peer"):
            await response.write(_error_frame(script.peer_refuses, PEER_PARAM))
            return
        output, start = chunk_format(request), len(request.resume_token_ids)
        for index in range(start, request.sampling.max_tokens):
            if index - start == script.die_after:
                http.transport.abort()
                return
            if index - start == script.stall_after:
                await asyncio.Event().wait()
            if index - start == script.pause_after:
                await self.resume.wait()
            if index - start == script.fail_after:
                await response.write(_error_frame(Reason.KV_TRANSFER, ""))
                return
            payload = output.delta(letter(index), (97 + index % 26,), first=index == 0)
            await response.write(_tokens_frame(payload, (97 + index % 26,), index + 1))
            await asyncio.sleep(0)
        finish = output.finish(common_pb2.FINISH_REASON_LENGTH)
        if finish:
            chars = request.sampling.max_tokens
            await response.write(encode_frame(FrameKind.TOKENS, finish, text_chars=chars))
        await response.write(encode_frame(FrameKind.DONE, self._done(request)))

    def _done(self, request: worker_pb2.GenerateRequest) -> bytes:
        return worker_pb2.GenerateChunk(
            finish_reason=common_pb2.FINISH_REASON_LENGTH,
            usage=common_pb2.Usage(
                prompt_tokens=len(request.token_ids),
                completion_tokens=request.sampling.max_tokens,
                cached_tokens=3,
            ),
            stats=common_pb2.RequestStats(
                prefill_worker=request.prefill_peer.name or self.name,
                decode_worker=self.name,
                kv_bytes_moved=2**40,
            ),
        ).SerializeToString()


def _tokens_frame(payload: bytes, token_ids: tuple[int, ...], text_chars: int) -> bytes:
    return encode_frame(FrameKind.TOKENS, payload, token_ids=token_ids, text_chars=text_chars)


def _error_frame(reason: Reason, param: str) -> bytes:
    error = KvasirError(reason, "scripted", param=param or None)
    return encode_frame(FrameKind.ERROR, error_to_message(error).SerializeToString())


def random_name() -> bytes:
    return os.urandom(16)
