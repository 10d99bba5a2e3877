"""Connections to Redis: plain, TLS as its URL says, or TLS as between the parts of a service."""

from typing import Any

import redis.asyncio
from kvasir_proto.links import Links

LINKED = "rediss+mtls://"
"""Of a Redis that is a part of the service: both sides show the certificates of `tls_dir`."""
SCHEMES = ("redis://", "rediss://", "unix://", LINKED)
CONNECTIONS_MAX = 64


class _LinkedConnection(redis.asyncio.Connection):
    """Asks for the certificates of now whenever it connects: they are rotated."""

    def __init__(self, *, links: Links, **options: Any) -> None:
        super().__init__(**options)
        self._links = links

    def _connection_arguments(self) -> dict[str, Any]:
        secure = self._links.client_context()
        assert secure is not None, "secure links stay secure"
        context, name = secure
        return {"host": self.host, "port": self.port, "ssl": context, "server_hostname": name}


def connect(url: str, *, links: Links | None, timeout_s: float) -> redis.asyncio.Redis:
    """A client with a pool of connections, made as they are needed.

    Raises:
        ValueError: the URL is not one of Redis, or asks for certificates that there are not.
    """
    options: dict[str, Any] = {
        "decode_responses": False,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "max_connections": CONNECTIONS_MAX,
    }
    if url.startswith(LINKED):
        if links is None or not links.is_secure:
            raise ValueError(f"{LINKED} needs a folder with certificates (tls_dir)")
        url = "redis://" + url.removeprefix(LINKED)
        options |= {"connection_class": _LinkedConnection, "links": links}
    pool = redis.asyncio.ConnectionPool.from_url(url, **options)
    return redis.asyncio.Redis.from_pool(pool)
