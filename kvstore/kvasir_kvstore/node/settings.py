"""Settings of one KV node: where it listens, how much it holds and what bounds it."""

from pathlib import Path

from pydantic import Field, field_validator

from kvasir_kvstore.peers import DataPeerSettings
from kvasir_kvstore.redis_pool import SCHEMES


class KvNodeSettings(DataPeerSettings):
    """One KV node."""

    memory_mb: int = Field(default=1024, ge=1)
    """Memory for blocks, in MiB; taken as blocks arrive."""
    disk_dir: Path | None = None
    """Folder for blocks on disk, of this node alone, kept over restarts; none: memory only."""
    disk_mb: int = Field(default=4096, ge=1)
    """Disk space for blocks, in MiB; taken as blocks are written."""
    block_ttl_ms: int = Field(default=0, ge=0)
    """Blocks are given up so long after they were stored; 0: no limit."""
    tenant_share_max: float = Field(default=1.0, gt=0, le=1)
    """Part of each tier that blocks of one tenant may take."""
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
    watch_queue_max: int = Field(default=4096, ge=1)
    """Events that wait for one watcher; one that falls further behind must reconnect."""
    lease_ttl_ms: int = Field(default=60_000, ge=100)
    """Entries in the index end so long after this node has died."""
    stop_timeout_ms: int = Field(default=3_000, ge=0)
    """After SIGTERM, running calls may take so long to end."""

    @field_validator("redis")
    @classmethod
    def _check_redis(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(SCHEMES):
            raise ValueError("not a URL of Redis (redis://HOST:PORT)")  # it may hold a password
        return value
