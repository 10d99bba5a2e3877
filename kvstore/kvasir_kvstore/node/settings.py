"""Settings of one KV node: where it listens, how much it holds and what bounds it."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class KvNodeSettings(BaseModel):
    """One KV node. Ports of 0 are chosen by the system (and shown in the log)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    """Stable across restarts: the pod's name."""
    uid: bytes | None = None
    """The pod's UID (16 bytes); none: random."""

    host: str = "127.0.0.1"
    """Where it listens."""
    advertise_host: str | None = None
    """Where peers reach it; none: the host it listens on."""
    grpc_port: int = Field(default=0, ge=0, le=65535)
    """Offers, look-ups, health."""
    http_port: int = Field(default=0, ge=0, le=65535)
    """/metrics, /healthz, /readyz."""
    data_port: int = Field(default=0, ge=0, le=65535)
    """Block transfers."""

    memory_mb: int = Field(default=1024, ge=1)
    """Memory for blocks, in MiB; taken as blocks arrive."""
    redis: str | None = None
    """URL of the block index that all share; none: an index in this process."""

    offers_running_max: int = Field(default=4, ge=1)
    """Offers pulled at the same time; each takes a thread and a connection."""
    offers_waiting_max: int = Field(default=64, ge=0)
    """Offers that wait for their turn; more are refused."""
    offer_timeout_ms_max: int = Field(default=60_000, ge=1)
    """Longest time that one offer may ask for."""
    connections_max: int = Field(default=256, ge=1)
    """Data-plane connections; each takes a thread."""
    lease_ttl_ms: int = Field(default=60_000, ge=100)
    """Entries in the index end so long after this node has died."""
    stop_timeout_ms: int = Field(default=3_000, ge=0)
    """After SIGTERM, running calls may take so long to end."""

    @field_validator("uid")
    @classmethod
    def _check_uid(cls, value: bytes | None) -> bytes | None:
        if value is not None and len(value) != 16:
            raise ValueError("must be 16 bytes")
        return value

    @field_validator("redis")
    @classmethod
    def _check_redis(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError(f"{value!r} is not a URL of Redis (redis://HOST:PORT)")
        return value

    @model_validator(mode="after")
    def _check_addresses(self) -> Self:
        if self.host in ("0.0.0.0", "::") and self.advertise_host is None:
            raise ValueError(
                f"advertise_host is needed: peers cannot reach the node at {self.host}"
            )
        ports = [port for port in (self.grpc_port, self.http_port, self.data_port) if port]
        if len(set(ports)) != len(ports):
            raise ValueError("grpc_port, http_port and data_port must differ")
        return self

    @property
    def peer_host(self) -> str:
        """Where peers reach this node."""
        return self.advertise_host or self.host
