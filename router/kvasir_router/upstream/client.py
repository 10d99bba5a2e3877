"""The token stream from one worker: one HTTP request, frames back.

Two things can go wrong: the worker answers with an error (KvasirError), or it vanishes, stalls or
talks nonsense (WorkerLostError, which is one too). What follows from either is left to `retry`.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
from google.protobuf.message import DecodeError
from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.frames import Frame, FrameDecoder, FrameError, FrameKind
from kvasir_proto.links import Links
from kvasir_proto.rpc_errors import error_from_message
from kvasir_proto.v1 import common_pb2

READ_BUFFER_BYTES = 1 << 16
ERROR_BYTES_MAX = 1 << 16
KEEPALIVE_S = 30.0
"""Shorter than the workers' own, so that no request meets a connection that is being closed."""

END_OF_BODY_S = 1.0
PATH = "/internal/generate"


class WorkerLostError(KvasirError):
    """The worker did not bring its stream to an end."""

    def __init__(self, message: str) -> None:
        super().__init__(Reason.NO_WORKER, f"the worker was lost: {message}")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a worker may be silent."""

    first_frame_ms: int
    next_frame_ms: int
    lost_ms: int
    """Once it is known to be lost."""


class WorkerClient:
    """Pooled keep-alive connections to all workers."""

    def __init__(self, links: Links, *, connections_max: int, connect_timeout_ms: int) -> None:
        self._links = links
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections_max, keepalive_timeout=KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, connect=connect_timeout_ms / 1_000),
            read_bufsize=READ_BUFFER_BYTES,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        """Closes all connections."""
        await self._session.close()

    async def frames(
        self,
        address: common_pb2.PeerAddress,
        body: bytes,
        patience: Patience,
        lost: "asyncio.Future[KvasirError]",
    ) -> AsyncGenerator[list[Frame], None]:
        """TOKENS frames, then DONE last; those that arrived together come together.

        Leaving early closes the connection: the worker sees it.

        Args:
            lost: done once a worker that the stream needs is known to be lost, and which.

        Raises:
            KvasirError: the worker refused the request or failed it, or `lost` is why it is silent.
            WorkerLostError: it is unreachable, silent, or its stream was cut off.
        """
        url, tls = self._reached_at(address)
        try:
            async with (
                asyncio.timeout(patience.first_frame_ms / 1_000) as limit,
                _hastened(limit, lost, patience),
                self._session.post(url, data=body, **tls) as response,
            ):
                if response.status != 200:
                    raise await _refusal(response)
                async for frames in self._read(response, limit, patience, lost):
                    yield frames
        except TimeoutError:  # an OSError too
            if lost.done():
                raise lost.result() from None
            raise WorkerLostError("silent for too long") from None
        except (aiohttp.ClientError, OSError, FrameError) as error:
            raise WorkerLostError(f"{type(error).__name__}: {error}") from error

    def _reached_at(self, address: common_pb2.PeerAddress) -> tuple[str, dict[str, Any]]:
        """URL of a worker's token streams, and how it is to be trusted."""
        secure = self._links.client_context()
        if secure is None:
            return f"http://{_netloc(address)}{PATH}", {}
        context, name = secure
        return f"https://{_netloc(address)}{PATH}", {"ssl": context, "server_hostname": name}

    async def _read(
        self,
        response: aiohttp.ClientResponse,
        limit: asyncio.Timeout,
        patience: Patience,
        lost: "asyncio.Future[KvasirError]",
    ) -> AsyncGenerator[list[Frame], None]:
        decoder, clock = FrameDecoder(), asyncio.get_running_loop().time
        async for data in response.content.iter_any():
            limit.reschedule(None)  # the reader's own time is not the worker's
            frames = list(decoder.feed(data))
            if frames and frames[-1].kind is FrameKind.DONE:
                await _read_to_end(response)
                yield frames
                return
            if frames and frames[-1].kind is FrameKind.ERROR:
                yield frames[:-1]
                raise _error_of(frames[-1].payload) or WorkerLostError("an unreadable error")
            if frames:
                yield frames
            wait_ms = patience.lost_ms if lost.done() else patience.next_frame_ms
            limit.reschedule(clock() + wait_ms / 1_000)
        raise WorkerLostError("the stream was cut off")


@contextlib.asynccontextmanager
async def _hastened(
    limit: asyncio.Timeout, lost: "asyncio.Future[KvasirError]", patience: Patience
) -> AsyncIterator[None]:
    """Shortens a wait that has begun to `lost_ms` when a worker is lost."""

    def hasten(_: "asyncio.Future[KvasirError]") -> None:
        latest_s = asyncio.get_running_loop().time() + patience.lost_ms / 1_000
        when_s = limit.when()
        if when_s is not None and when_s > latest_s and not limit.expired():
            limit.reschedule(latest_s)

    lost.add_done_callback(hasten)
    try:
        yield
    finally:
        lost.remove_done_callback(hasten)


async def _read_to_end(response: aiohttp.ClientResponse) -> None:
    """Takes the end of the body too, so that the connection can serve again."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(END_OF_BODY_S):
            await response.content.read()


def _netloc(address: common_pb2.PeerAddress) -> str:
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{host}:{address.stream_port or address.http_port}"


async def _refusal(response: aiohttp.ClientResponse) -> KvasirError | WorkerLostError:
    """Why the worker refused: its own words, if that is what the body holds."""
    error = _error_of(await response.content.read(ERROR_BYTES_MAX))
    return error or WorkerLostError(f"status {response.status} without a reason")


def _error_of(payload: bytes) -> KvasirError | None:
    try:
        message = common_pb2.Error.FromString(payload)
    except DecodeError:
        return None
    return error_from_message(message) if message.reason else None
