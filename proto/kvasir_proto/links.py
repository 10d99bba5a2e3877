"""Links between the parts of one service: plain, or TLS in which both sides show a certificate.

One folder is the whole configuration (the layout of a Kubernetes TLS Secret: tls.crt, tls.key,
ca.crt). Peers are dialled by IP address, so a certificate names the service, not a host: its first
DNS name is the name that every peer must show, too. A server refuses a client without a certificate
of these authorities, a client a server without that name; there is no fallback to a plain link.

The files may be replaced at any time, together: connections that begin later use the new ones,
those that live go on. Files that do not fit together are not taken up: the last good ones stay.
"""

import logging
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc
import grpc.aio

log = logging.getLogger(__name__)

CERTIFICATE, KEY, AUTHORITIES = FILES = ("tls.crt", "tls.key", "ca.crt")
_KUBELET_LINK = "..data"  # to the folder of the present version: replaced in one step

ChannelOptions = Sequence[tuple[str, int | str]]


class LinkError(ValueError):
    """The folder does not hold what a link needs; the message names the file."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What this process shows and whom it trusts."""

    name: str  # of the service: what a server must show
    certificate: bytes  # PEM, like the others
    key: bytes
    authorities: bytes

    def channel(self, target: str, options: ChannelOptions = ()) -> grpc.aio.Channel:
        """A channel to a peer, which must show `name`."""
        credentials = grpc.ssl_channel_credentials(self.authorities, self.key, self.certificate)
        checked = ("grpc.ssl_target_name_override", self.name)
        return grpc.aio.secure_channel(target, credentials, options=[*options, checked])


@dataclass(frozen=True, slots=True)
class _Loaded:
    identity: Identity
    server: ssl.SSLContext
    client: ssl.SSLContext


class Links:
    """Makes the two ends of every link of this process; without a folder they are plain."""

    def __init__(self, folder: Path | None = None) -> None:
        """Raises LinkError if the folder does not hold an identity."""
        self._folder = folder
        self._lock = threading.Lock()  # gRPC's server asks from threads of its own
        self._version = 0
        self._seen = _signature(folder)
        self._loaded = _load(folder) if folder is not None else None

    @property
    def version(self) -> int:
        """Grows when the files have changed: a channel made before should be left for a new one."""
        return self._latest()[0]

    @property
    def is_secure(self) -> bool:
        """Whether links are TLS."""
        return self._folder is not None

    def channel(self, target: str, options: ChannelOptions = ()) -> grpc.aio.Channel:
        """A channel to a peer. All its connections show the certificate of now."""
        loaded = self._latest()[1]
        if loaded is None:
            return grpc.aio.insecure_channel(target, options=options)
        return loaded.identity.channel(target, options)

    def listen(self, server: grpc.aio.Server, target: str, *, for_anyone: bool = False) -> int:
        """Lets a gRPC server listen; its port.

        Args:
            for_anyone: those who connect need not show a certificate.

        Raises:
            OSError: the port is taken or cannot be bound.
        """
        version, loaded = self._latest()
        try:
            if loaded is None:
                return server.add_insecure_port(target)
            credentials = grpc.dynamic_ssl_server_credentials(
                _configuration(loaded.identity),
                self._news_after(version),
                require_client_authentication=not for_anyone,
            )
            return server.add_secure_port(target, credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {target} for gRPC: is it taken?") from error

    def server_context(self) -> ssl.SSLContext | None:
        """For a server of HTTP, for ever; None: it is plain."""
        loaded = self._latest()[1]
        if loaded is None:
            return None

        def renew(connection: ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
            latest = self._latest()[1]
            assert latest is not None, "secure links stay secure"
            connection.context = latest.server

        loaded.server.sni_callback = renew
        return loaded.server

    def client_context(self) -> tuple[ssl.SSLContext, str] | None:
        """For one request of a client of HTTP, with the name to check; None: it is plain."""
        loaded = self._latest()[1]
        return None if loaded is None else (loaded.client, loaded.identity.name)

    def _latest(self) -> tuple[int, _Loaded | None]:
        """The version and what belongs to it, after a look at the files."""
        if self._folder is None:
            return 0, None
        with self._lock:
            seen = _signature(self._folder)
            if seen != self._seen:
                self._seen = seen
                try:
                    self._loaded = _load(self._folder)
                    self._version += 1
                    log.info("took up the new certificates in %s", self._folder)
                except LinkError as error:
                    log.error("new certificates are not taken up: %s", error)
            return self._version, self._loaded

    def _news_after(self, version: int) -> Callable[[], grpc.ServerCertificateConfiguration]:
        """What gRPC's server asks before each handshake: a configuration, if there is a newer one.

        Only then: gRPC puts what it is given in the place of what other handshakes may be using,
        and frees that (https://github.com/grpc/grpc/issues/36693).
        """
        known = version

        def news() -> grpc.ServerCertificateConfiguration | None:
            nonlocal known
            latest, loaded = self._latest()
            assert loaded is not None, "secure links stay secure"
            if latest == known:
                return None
            known = latest
            return _configuration(loaded.identity)

        # its stubs do not say that None is an answer
        return cast("Callable[[], grpc.ServerCertificateConfiguration]", news)


def make_identity(certificate: bytes, key: bytes, authorities: bytes) -> Identity:
    """The identity that these files give; whether they fit together is seen when they are used.

    Raises:
        LinkError: the certificate names no service.
    """
    name = _dns_name(certificate)
    if not name:
        raise LinkError(f"{CERTIFICATE} has no DNS name")
    return Identity(name, certificate, key, authorities)


def _load(folder: Path) -> _Loaded:
    """Raises LinkError if a file is missing, cannot be read, or does not fit the others."""
    source = _snapshot(folder)
    try:
        certificate, key, authorities = ((source / name).read_bytes() for name in FILES)
        server, client = _server_context(source), _client_context(source)
    except ssl.SSLError as error:
        raise LinkError(f"{folder}: {', '.join(FILES)} do not fit together: {error}") from error
    except OSError as error:
        raise LinkError(f"{folder}: {error.strerror}: {error.filename}") from error
    return _Loaded(make_identity(certificate, key, authorities), server, client)


def _dns_name(certificate: bytes) -> str:
    """The first DNS name of the first certificate; "": it has none."""
    from cryptography import x509  # only where links are secure: it takes 10 MB

    try:
        leaf = x509.load_pem_x509_certificate(certificate)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return ""
    return next(iter(names.get_values_for_type(x509.DNSName)), "")


def _snapshot(folder: Path) -> Path:
    """The folder with the files of one version; one that is no mounted Secret has but one."""
    link = folder / _KUBELET_LINK
    return link.resolve() if link.exists() else folder


def _signature(folder: Path | None) -> object:
    """Differs when a file was replaced or written."""
    if folder is None:
        return None
    found: list[tuple[int, int, int] | None] = []
    for name in FILES:
        try:
            stat = (folder / name).stat()
            found.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
        except OSError:
            found.append(None)
    return found


def _server_context(source: Path) -> ssl.SSLContext:
    context = _with_files(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), source)
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0  # each connection shows its certificate anew
    return context


def _client_context(source: Path) -> ssl.SSLContext:
    return _with_files(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), source)


def _with_files(context: ssl.SSLContext, source: Path) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(source / CERTIFICATE, source / KEY)
    context.load_verify_locations(source / AUTHORITIES)
    return context


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    pair = (identity.key, identity.certificate)
    return grpc.ssl_server_certificate_configuration([pair], identity.authorities)
