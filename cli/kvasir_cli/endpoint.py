"""A client of the OpenAI HTTP API, as small as the commands need it.

Turns a stream of server-sent events into text, and every way to fail into one clear error.
"""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from kvasir_cli.errors import CommandError

DEFAULT_URL = "http://127.0.0.1:8080"
CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 300.0
"""Longest wait for the next bytes of an answer: a long prompt on a slow machine takes minutes."""
LINE_BYTES_MAX = 1 << 20


@dataclass(slots=True)
class Answer:
    """One answer while it arrives; complete when the stream has ended."""

    started_s: float = field(default_factory=time.monotonic)
    first_s: float = 0.0  # 0: no text yet
    last_s: float = 0.0
    text: str = ""
    finish_reason: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)  # RequestStats; empty: the server has none

    @property
    def ttft_ms(self) -> float:
        """Time to the first text."""
        return 1000 * (self.first_s - self.started_s) if self.first_s else 0.0

    @property
    def num_tokens(self) -> int:
        """Output tokens, as the server counts them."""
        return int(self.usage.get("completion_tokens", 0))

    @property
    def num_cached(self) -> int:
        """Prompt tokens whose KV was reused."""
        details = self.usage.get("prompt_tokens_details") or {}
        return int(details.get("cached_tokens") or 0)

    @property
    def tpot_ms(self) -> float:
        """Time per output token after the first."""
        if self.num_tokens < 2:
            return 0.0
        return 1000 * (self.last_s - self.first_s) / (self.num_tokens - 1)

    def take(self, event: dict[str, Any]) -> str:
        """Account for one event; returns its text."""
        if "error" in event:
            raise CommandError(_message(event) or "the server ended the stream with an error")
        piece = ""
        for choice in event.get("choices") or []:
            delta = choice.get("delta") or choice.get("message") or {}
            piece += choice.get("text") or delta.get("content") or ""
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        self.usage = event.get("usage") or self.usage
        self.stats = event.get("kvasir") or self.stats
        if piece:
            self.last_s = time.monotonic()
            self.first_s = self.first_s or self.last_s
            self.text += piece
        return piece


class Endpoint:
    """One server."""

    def __init__(self, session: aiohttp.ClientSession, url: str, *, api_key: str = "") -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._session = session
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_TIMEOUT_S
        )

    async def model(self) -> str:
        """The first model that the server offers."""
        async with self._open("GET", "/v1/models", None) as response:
            models = (await response.json()).get("data") or []
        if not models:
            raise CommandError(f"{self.url} serves no model")
        return str(models[0]["id"])

    async def stream(self, path: str, body: dict[str, Any], answer: Answer) -> AsyncIterator[str]:
        """Pieces of text as they arrive, accounted for in `answer`."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        async with self._open("POST", path, body) as response:
            try:
                async for line in response.content:
                    data = line.strip().removeprefix(b"data:").strip()
                    if not line.startswith(b"data:") or data == b"[DONE]":
                        continue
                    if piece := answer.take(json.loads(data)):
                        yield piece
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                raise CommandError(f"{self.url}: the stream broke off: {error}") from error
        if not answer.finish_reason:
            raise CommandError(f"{self.url}: the stream ended before the answer did")

    async def whole(self, path: str, body: dict[str, Any], answer: Answer) -> str:
        """The answer in one piece."""
        async with self._open("POST", path, body) as response:
            return answer.take(await response.json())

    def _open(self, method: str, path: str, body: dict[str, Any] | None) -> "_Opened":
        request = self._session.request(
            method,
            self.url + path,
            json=body,
            headers=self._headers,
            timeout=self._timeout,
            read_bufsize=LINE_BYTES_MAX,
        )
        return _Opened(self.url, request)


class _Opened:
    """A response with status 200, or CommandError."""

    def __init__(self, url: str, request: Any) -> None:
        self._url = url
        self._request = request

    async def __aenter__(self) -> aiohttp.ClientResponse:
        try:
            response: aiohttp.ClientResponse = await self._request.__aenter__()
        except aiohttp.InvalidURL as error:
            raise CommandError(f"--url: {self._url!r} is not a URL") from error
        except (aiohttp.ClientConnectionError, TimeoutError) as error:
            raise CommandError(
                f"nothing answers at {self._url}: start a fleet with kvasir up, or name one "
                "with --url"
            ) from error
        if response.status == 200:
            return response
        text = await response.text()
        await self._request.__aexit__(None, None, None)
        try:
            message = _message(json.loads(text))
        except ValueError:
            message = ""
        raise CommandError(f"{self._url}: {message or f'status {response.status}'}")

    async def __aexit__(self, *exception: object) -> None:
        await self._request.__aexit__(*exception)


def _message(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict):
        param = f"{error['param']}: " if error.get("param") else ""
        return f"{param}{error.get('message', '')}"
    return str(error or "")
