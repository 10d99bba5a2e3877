"""Free TCP ports for the parts of a local fleet, chosen before anything starts.

Ports lie below the range from which Linux takes the ports of outgoing connections, so that a part
that dies finds its ports free again when it is restarted.
"""

import errno
import random
import socket

from kvasir_cli.errors import RefusedError

RANGE = range(20_000, 32_000)


def can_bind(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    try:
        _bind(host, port)
    except OSError:
        return False
    return True


def refuse_taken(host: str, port: int, *, flag: str) -> None:
    """Raises RefusedError unless a server could listen there now."""
    try:
        _bind(host, port)
    except socket.gaierror as error:
        raise RefusedError(f"--host: {host!r} cannot be resolved") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise RefusedError(
                f"{flag}: port {port} is taken on {host}; choose another with {flag}"
            ) from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise RefusedError(f"--host: {host} is no address of this machine") from error
        raise RefusedError(f"{flag}: cannot listen on {host}:{port}: {error.strerror}") from error


def free_ports(host: str, count: int, *, avoid: frozenset[int], source: random.Random) -> list[int]:
    """`count` different free ports, searched from a random start.

    Raises:
        RefusedError: there are not that many.
    """
    start = source.randrange(len(RANGE))
    found: list[int] = []
    for offset in range(len(RANGE)):
        port = RANGE[(start + offset) % len(RANGE)]
        if port not in avoid and can_bind(host, port):
            found.append(port)
            if len(found) == count:
                return found
    raise RefusedError(f"only {len(found)} of {count} ports are free in {RANGE.start}-{RANGE.stop}")


def _bind(host: str, port: int) -> None:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
