"""Settings of one KV node: where it listens, how much it holds and what bounds it."""

from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from kvasir_kvstore.node.object_store import open_store
from kvasir_kvstore.peers import DataPeerSettings, parse_spec
from kvasir_kvstore.redis_url import check_redis_url


class KvNodeSettings(DataPeerSettings):
    """One KV node."""

    memory_mb: int = Field(default=1024, ge=1)
    """Memory for blocks, in MiB; taken as blocks arrive."""
    memory_high: float = Field(default=0.98, gt=0, le=1)
    """Above this part of its memory a node gives up blocks before others need room; 1: never."""
    memory_low: float = Field(default=0.95, gt=0, le=1)
    """Down to this part of its memory."""
    disk_dir: Path | None = None
    """Folder for blocks on disk, of this node alone, kept over restarts; none: memory only."""
    disk_mb: int = Field(default=4096, ge=1)
    """Disk space for blocks, in MiB; taken as blocks are written."""
    store_url: str | None = None
    """s3://BUCKET/PREFIX for blocks; credentials and region from AWS_* in the environment; none: no
    object store."""
    store_endpoint: str | None = None
    """URL of a store that speaks S3 and is not Amazon's."""
    block_ttl_ms: int = Field(default=0, ge=0)
    """Blocks are given up so long after they were stored; 0: no limit."""
    tenant_share_max: float = Field(default=1.0, gt=0, le=1)
    """Part of each tier that blocks of one tenant may take."""
    kv_nodes: tuple[str, ...] = ()
    """HOST:PORT or dns:HOST:PORT of all KV nodes' gRPC: blocks move to the nodes that chains belong
    to when some come or go; none: they stay where they were offered."""
    kv_replicas: int = Field(default=1, ge=1, le=8)
    """KV nodes that each block is kept on; workers' setting of the same name."""
    move_mb_per_s: float = Field(default=64, gt=0)
    """Blocks move to other nodes at no more than this, in MiB per second."""
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

    @field_validator("store_url")
    @classmethod
    def _check_store_url(cls, value: str | None) -> str | None:
        if value is not None:
            open_store(value, None)
        return value

    @model_validator(mode="after")
    def _check_watermarks(self) -> Self:
        if self.memory_low > self.memory_high:
            raise ValueError("memory_low must not be above memory_high")
        return self

    @field_validator("kv_nodes")
    @classmethod
    def _check_kv_nodes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for spec in value:
            parse_spec(spec)
        return value

    @field_validator("redis")
    @classmethod
    def _check_redis(cls, value: str | None) -> str | None:
        if value is not None:
            check_redis_url(value)
        return value
