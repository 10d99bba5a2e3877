"""From `--worker` specs to gRPC targets: fixed ones, and those behind a DNS name."""

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable

from kvasir_kvstore.peers import join_target, parse_spec

log = logging.getLogger(__name__)

RESOLVE_TIMEOUT_S = 5.0
TARGETS_MAX = 4_096
"""More addresses behind one name than any fleet has: the rest is ignored."""


def static_targets(specs: Iterable[str]) -> frozenset[str]:
    """Targets of the specs that name one address each."""
    return frozenset(spec.target for spec in map(parse_spec, specs) if not spec.is_dns)


def dns_names(specs: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """(host, port) of the specs that stand for every address behind a name."""
    return tuple((spec.host, spec.port) for spec in map(parse_spec, specs) if spec.is_dns)


async def resolve(host: str, port: int) -> frozenset[str] | None:
    """Targets behind a name; None: the name server did not answer, nothing is known."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(RESOLVE_TIMEOUT_S):
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        gone = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
        return frozenset() if error.errno in gone else None
    except (TimeoutError, OSError):
        return None
    return frozenset(sorted(join_target(str(entry[4][0]), port) for entry in found)[:TARGETS_MAX])


async def follow_dns(
    host: str, port: int, *, interval_ms: int, on_targets: Callable[[frozenset[str]], None]
) -> None:
    """Reports the targets behind a name whenever they change, for ever."""
    known: frozenset[str] | None = None
    while True:
        targets = await resolve(host, port)
        if targets is not None and targets != known:
            log.info("%s:%d has %d addresses", host, port, len(targets))
            on_targets(targets)
            known = targets
        await asyncio.sleep(interval_ms / 1_000)


async def follow_targets(
    specs: Iterable[str], *, interval_ms: int, on_targets: Callable[[frozenset[str]], None]
) -> None:
    """Reports all targets of the specs, at once and whenever they change, for ever."""
    specs = tuple(specs)
    by_origin = {"": static_targets(specs)}
    on_targets(by_origin[""])

    async def follow(host: str, port: int) -> None:
        def found(targets: frozenset[str]) -> None:
            by_origin[f"{host}:{port}"] = targets
            on_targets(frozenset().union(*by_origin.values()))

        await follow_dns(host, port, interval_ms=interval_ms, on_targets=found)

    async with asyncio.TaskGroup() as group:
        for host, port in dns_names(specs):
            group.create_task(follow(host, port))
        await asyncio.Event().wait()
