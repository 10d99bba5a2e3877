"""How a router leaves: clients move on first, then it closes, and no answer is cut off.

Invariant: whoever is answered after `begin` is told to close the connection, so that the next
request goes through the Service, which by then knows better.
"""

import asyncio
import contextlib
from collections.abc import Iterator

from aiohttp import hdrs, web


class Leaving:
    """Whether the router is told to stop, and the HTTP requests that it still owes an answer."""

    def __init__(self) -> None:
        self.has_begun = False
        self._num_requests = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self) -> None:
        """The router is told to stop."""
        self.has_begun = True

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Around a request, from its headers to its answer."""
        self._num_requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_requests -= 1
            if not self._num_requests:
                self._idle.set()

    async def idle(self) -> None:
        """Returns when no request is being answered."""
        await self._idle.wait()

    async def mark(self, request: web.Request, response: web.StreamResponse) -> None:
        """Before the headers of any answer are sent: the last one on its connection?"""
        if self.has_begun:
            response.force_close()
            response.headers[hdrs.CONNECTION] = "close"
