"""Channels to the parts of services: plain, or with the certificate that a part demands."""

import base64
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple, Protocol

import grpc.aio
from kvasir_proto.links import (
    AUTHORITIES,
    CERTIFICATE,
    KEY,
    Identity,
    LinkError,
    Links,
    make_identity,
)

from kvasir_operator.core.manifests import Manifest, Ref
from kvasir_operator.core.views import Door
from kvasir_operator.errors import ClusterError, OperatorError

OPTIONS = (("grpc.enable_http_proxy", 0),)  # pods are near, whatever the environment says
FRESH_S = 30.0  # a rotation lets both certificates be valid for much longer
IDENTITIES_MAX = 4096


class ChannelError(OperatorError):
    """A part demands a certificate that cannot be shown; the message says why."""


class Secrets(Protocol):
    """Where certificates are. Calls raise ClusterError."""

    async def fetch(self, ref: Ref) -> Manifest | None:
        """The Secret, or None."""
        ...


class _Known(NamedTuple):
    identity: Identity
    until_s: float


class Channels:
    """Opens channels; certificates are read at most every FRESH_S."""

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets
        self._known: dict[Ref, _Known] = {}

    @asynccontextmanager
    async def open(self, door: Door) -> AsyncIterator[grpc.aio.Channel]:
        """A channel for the length of a block.

        Raises:
            ChannelError: the certificate cannot be read.
        """
        if not door.tls_secret:
            channel = Links().channel(door.address, OPTIONS)
        else:
            identity = await self._identity(Ref("Secret", door.namespace, door.tls_secret))
            channel = identity.channel(door.address, OPTIONS)
        async with channel:
            yield channel

    async def _identity(self, ref: Ref) -> Identity:
        known = self._known.get(ref)
        if known is not None and known.until_s > time.monotonic():
            return known.identity
        try:
            secret = await self._secrets.fetch(ref)
            data = (secret or {}).get("data", {})
            files = (base64.b64decode(data[name]) for name in (CERTIFICATE, KEY, AUTHORITIES))
            identity = make_identity(*files)
        except (ClusterError, LinkError) as error:
            raise ChannelError(f"Secret {ref.namespace}/{ref.name}: {error}") from error
        except KeyError as error:
            raise ChannelError(f"Secret {ref.namespace}/{ref.name}: no {error.args[0]}") from error
        if len(self._known) >= IDENTITIES_MAX:
            self._known.clear()
        self._known[ref] = _Known(identity, time.monotonic() + FRESH_S)
        return identity


def why(error: grpc.aio.AioRpcError | ChannelError) -> str:
    """Why a call failed, for a log."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name} {error.details()}"
    return str(error)
