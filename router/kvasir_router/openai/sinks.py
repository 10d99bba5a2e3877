"""Where output goes: a stream of events to the client, or a text that is kept until the end."""

from collections.abc import Mapping, Sequence

from aiohttp import web

from kvasir_router.core.choose import Route


def worker_headers(route: Route | None) -> dict[str, str]:
    """Who serves, for curious clients."""
    if route is None:
        return {}
    return {
        "x-kvasir-prefill-worker": route.computes,
        "x-kvasir-decode-worker": route.decode,
    }


class EventSink:
    """Server-sent events. The answer begins with the first token: until then errors have a status.

    `send` waits while the client reads slowly, so at most one buffer of output piles up.
    """

    def __init__(self, request: web.Request, headers: Mapping[str, str]) -> None:
        self._request, self._headers = request, dict(headers)
        self.response: web.StreamResponse | None = None

    async def begin(self, route: Route | None) -> None:
        """Sends the headers."""
        self.response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                **self._headers,
                **worker_headers(route),
            }
        )
        await self.response.prepare(self._request)

    async def send(self, payloads: Sequence[bytes]) -> None:
        """Forwards events as they are, those that came together in one write."""
        assert self.response is not None, "begin comes first"
        await self.response.write(b"".join(payloads))

    async def finish(self, payload: bytes) -> web.StreamResponse:
        """The last events, then the end."""
        if self.response is None:
            await self.begin(None)
        assert self.response is not None
        await self.response.write_eof(payload)
        return self.response

    def abort(self) -> None:
        """Cuts the connection of an answer that has begun and cannot be ended properly."""
        if self.response is not None and self._request.transport is not None:
            self._request.transport.abort()


class TextSink:
    """Keeps the text; its size is bounded by max_tokens."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    async def begin(self, route: Route) -> None:
        """Nothing to do: the answer is sent as a whole."""

    async def send(self, payloads: Sequence[bytes]) -> None:
        """Keeps the pieces."""
        self._pieces += payloads

    def text(self) -> str:
        """The whole output. A character never spans two pieces, but a broken one must not fail."""
        return b"".join(self._pieces).decode("utf-8", "replace")
