"""How a process that peers connect to is configured, and how peers are written on a command line.

Workers, KV nodes and routers share these: one syntax of addresses, one check of host and ports.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kvasir_kvstore._native import BlockPool
from kvasir_kvstore.codecs import CodecTerms
from kvasir_kvstore.nixl import NixlReads, new_agent

DNS_PREFIX = "dns:"
KEY_BYTES_MIN, KEY_BYTES_MAX = 32, 4096


@dataclass(frozen=True, slots=True)
class DataPlane:
    """How KV goes to and from peers."""

    socket_dir: str = ""
    """Where peers of this node are found; "": they are reached by TCP like others."""
    key: bytes = field(default=b"", repr=False)
    """Encrypts KV on its way; empty: it is sent as it is."""
    codecs: CodecTerms = field(default_factory=CodecTerms)
    """How KV that comes to this process may be encoded."""
    is_nixl: bool = False
    """Bytes between nodes are moved by NIXL, not by Kvasir's own TCP."""
    reads: NixlReads | None = None
    """Of the pool that the plane is bound to, if they are NIXL's."""

    def require(self) -> None:
        """Before there is a pool.

        Raises:
            KvasirError: UNSUPPORTED: NIXL was chosen and does not work here.
        """
        if self.is_nixl:
            new_agent()

    def bound_to(self, pool: BlockPool) -> Self:
        """The plane for the blocks of this pool.

        Raises:
            KvasirError: UNSUPPORTED: NIXL was chosen and does not work here.
        """
        return replace(self, reads=NixlReads(pool)) if self.is_nixl else self

    @property
    def remote_agent(self) -> bytes:
        """What peers must know to read the pool by NIXL; empty: they do not."""
        return self.reads.agent if self.reads else b""


@dataclass(frozen=True, slots=True)
class PeerSpec:
    """Where peers are found: one address, or all addresses behind a name."""

    host: str
    port: int
    is_dns: bool

    @property
    def target(self) -> str:
        """What gRPC dials."""
        return join_target(self.host, self.port)


def parse_spec(text: str) -> PeerSpec:
    """The spec of HOST:PORT or dns:HOST:PORT.

    Raises:
        ValueError: it is neither.
    """
    host, _, port = text.removeprefix(DNS_PREFIX).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is neither HOST:PORT nor dns:HOST:PORT")
    return PeerSpec(host.strip("[]"), int(port), text.startswith(DNS_PREFIX))


def join_target(host: str, port: int) -> str:
    """What gRPC dials; IPv6 addresses get brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class PeerSettings(BaseModel):
    """A process with an address. Ports of 0 are chosen by the system (and shown in the log)."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str = Field(min_length=1)
    """Stable across restarts: the pod's name."""
    uid: bytes | None = None
    """16 bytes: the pod's UID; none: random."""

    host: str = "127.0.0.1"
    """Where it listens."""
    advertise_host: str | None = None
    """Where peers reach it; none: the host it listens on."""
    grpc_port: int = Field(default=0, ge=0, le=65535)
    """gRPC: control, health, reflection."""
    http_port: int = Field(default=0, ge=0, le=65535)
    """/metrics, /healthz, /readyz; a worker's token streams."""
    data_port: int = Field(default=0, ge=0, le=65535)
    """KV blocks for peers."""
    tls_dir: Path | None = None
    """Folder with tls.crt, tls.key and ca.crt: peers must show a certificate, and so does this
    process; none: links are plain. Health and metrics stay plain."""

    @field_validator("uid")
    @classmethod
    def _check_uid(cls, value: bytes | None) -> bytes | None:
        if value is not None and len(value) != 16:
            raise ValueError("must be 16 bytes")
        return value

    @model_validator(mode="after")
    def _check_addresses(self) -> Self:
        if self.host in ("0.0.0.0", "::") and self.advertise_host is None:
            raise ValueError(f"advertise_host is needed: peers cannot reach {self.host}")
        ports = [port for port in (self.grpc_port, self.http_port, self.data_port) if port]
        if len(set(ports)) != len(ports):
            raise ValueError("grpc_port, http_port and data_port must differ")
        return self

    @property
    def peer_host(self) -> str:
        """Where peers reach this process."""
        return self.advertise_host or self.host


class DataPeerSettings(PeerSettings):
    """A process with KV memory: peers pull blocks from it, and it from them."""

    kv_socket_dir: Path | None = None
    """Folder that the processes of this node share: KV between them goes through shared memory."""

    kv_key_file: Path | None = None
    """Key that all workers and KV nodes share, 32 bytes or more: KV between them is encrypted, and
    peers without it are refused; none: KV is sent as it is."""

    kv_transport: Literal["native", "nixl"] = "native"
    """What moves KV between nodes: Kvasir's own TCP, or NIXL (RDMA), which must be installed
    (kvasir[nixl]) and chosen by all workers and KV nodes; it does not encrypt."""

    @field_validator("kv_socket_dir")
    @classmethod
    def _check_kv_socket_dir(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_dir():
            raise ValueError(f"{value} is not a folder")
        if value is not None:
            _check_writable(value)
        return value

    @field_validator("kv_key_file")
    @classmethod
    def _check_kv_key_file(cls, value: Path | None) -> Path | None:
        if value is not None:
            _read_key(value)
        return value

    @model_validator(mode="after")
    def _check_kv_transport(self) -> Self:
        if self.kv_transport == "nixl" and self.kv_key_file is not None:
            raise ValueError("kv_transport nixl does not encrypt: it cannot have a kv_key_file")
        return self

    @cached_property
    def data_plane(self) -> DataPlane:
        """As the native data plane takes it; the key is read once."""
        key = _read_key(self.kv_key_file) if self.kv_key_file else b""
        return DataPlane(
            socket_dir=str(self.kv_socket_dir or ""),
            key=key,
            is_nixl=self.kv_transport == "nixl",
        )


def _check_writable(folder: Path) -> None:
    """By a file that never has a name: what the owner may do, a mount may still forbid."""
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from error


def _read_key(file: Path) -> bytes:
    """The key: the whole file, as a key of random bytes may end in what looks like a line's end."""
    try:
        key = file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    if not KEY_BYTES_MIN <= len(key) <= KEY_BYTES_MAX:
        raise ValueError(
            f"{file} has {len(key)} bytes; a key has from {KEY_BYTES_MIN} to {KEY_BYTES_MAX}"
        )
    return key
