"""Clients of the Redis that a URL names: one server, one watched by Sentinels, or a cluster.

    redis://[USER:PASSWORD@]HOST:PORT/DB      rediss:// by TLS, unix:// by a socket
    rediss+mtls://HOST:PORT/DB                a part of the service: both sides show certificates
    redis+sentinel://[USER:PASSWORD@]HOST:PORT[,HOST:PORT...]/SERVICE[/DB]
    redis+cluster://[USER:PASSWORD@]HOST:PORT

A URL may hold a password: it is never shown.
"""

from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

import redis.asyncio
import redis.asyncio.sentinel
from kvasir_proto.links import Links
from redis.asyncio.cluster import RedisCluster

LINKED, SENTINEL, CLUSTER = "rediss+mtls", "redis+sentinel", "redis+cluster"
SCHEMES = ("redis", "rediss", "unix", LINKED, SENTINEL, CLUSTER)
SENTINEL_PORT = 26379
CONNECTIONS_MAX = 64

Client = redis.asyncio.Redis | RedisCluster


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


@dataclass(frozen=True, slots=True)
class _Sentinels:
    hosts: tuple[tuple[str, int], ...]
    service: str
    database: int


def check_redis_url(url: str) -> None:
    """Raises ValueError if the URL is not one of Redis."""
    if url.partition("://")[0] not in SCHEMES:
        raise ValueError(
            "not a URL of Redis (redis://HOST:PORT, redis+sentinel://, redis+cluster://)"
        )
    if url.startswith(SENTINEL + ":"):
        _sentinels(url)


def connect(url: str, *, links: Links | None = None, timeout_s: float) -> Client:
    """A client that connects when it is used.

    Args:
        links: with the certificates that rediss+mtls:// needs.
        timeout_s: of connecting, and of each answer.

    Raises:
        ValueError: the URL is not one of Redis, or asks for certificates that there are not.
    """
    check_redis_url(url)
    waits: dict[str, Any] = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    options = {**waits, "max_connections": CONNECTIONS_MAX}
    parts = urlsplit(url)
    if parts.scheme == CLUSTER:
        return RedisCluster.from_url(url.replace(CLUSTER, "redis", 1), **options)
    if parts.scheme == LINKED:
        if links is None or not links.is_secure:
            raise ValueError(f"{LINKED}:// needs a folder with certificates (tls_dir)")
        options |= {"connection_class": _LinkedConnection, "links": links}
        url = url.replace(LINKED, "redis", 1)
    if parts.scheme != SENTINEL:
        pool = redis.asyncio.ConnectionPool.from_url(url, **options)
        return redis.asyncio.Redis.from_pool(pool)
    found = _sentinels(url)
    sentinel = redis.asyncio.sentinel.Sentinel(  # type: ignore[no-untyped-call]
        list(found.hosts), sentinel_kwargs=waits, **waits
    )
    user = unquote(parts.username) if parts.username else None
    password = unquote(parts.password) if parts.password else None
    client: redis.asyncio.Redis = sentinel.master_for(
        found.service,
        db=found.database,
        username=user,
        password=password,
        max_connections=CONNECTIONS_MAX,
    )
    return client


async def close(client: Client) -> None:
    """Closes its connections, those to Sentinels too."""
    await client.aclose()
    pool = getattr(client, "connection_pool", None)
    if isinstance(pool, redis.asyncio.sentinel.SentinelConnectionPool):
        for sentinel in pool.sentinel_manager.sentinels:
            await sentinel.aclose()


def _sentinels(url: str) -> _Sentinels:
    parts = urlsplit(url)
    hosts = []
    for text in parts.netloc.rpartition("@")[2].split(","):
        host, _, port = text.rpartition(":") if ":" in text else (text, "", "")
        if not host or (port and not port.isdecimal()):
            raise ValueError("a Sentinel is HOST or HOST:PORT")
        hosts.append((host, int(port or SENTINEL_PORT)))
    service, _, database = parts.path.strip("/").partition("/")
    if not service or (database and not database.isdecimal()):
        raise ValueError(f"{SENTINEL}:// ends in /SERVICE or /SERVICE/DB")
    return _Sentinels(tuple(hosts), service, int(database or 0))
