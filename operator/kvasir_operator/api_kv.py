"""The API of KV nodes: memory, disk, object store, what stays in them for how long."""

from typing import ClassVar

from pydantic import Field

from kvasir_operator.api_base import ApiModel, Rule
from kvasir_operator.api_pods import PodSettings
from kvasir_operator.api_security import SecretName

TIER_MB_MAX = 4_194_304
TTL_S_MAX = 31_536_000
HAS_CLAIM = "has({0}.disk) && has({0}.disk.volumeClaim)"
NODE_FITS_RULE = Rule(
    "!has(self.resources.limits) || !('memory' in self.resources.limits) || "
    "quantity(string(self.resources.limits['memory']))"
    ".asApproximateFloat() > double(self.memoryMb) * 1048576.0",
    "the memory limit must be greater than memoryMb: raise resources.limits.memory or lower "
    "memoryMb",
)
CLAIM_RULE = Rule(
    f"({HAS_CLAIM.format('self')}) == ({HAS_CLAIM.format('oldSelf')}) && "
    f"(!({HAS_CLAIM.format('self')}) || self.disk == oldSelf.disk)",
    "disk with volumeClaim cannot be set, changed or removed later, for volumes stay as they were "
    "made: create another pool",
)


class VolumeClaim(ApiModel):
    """A PersistentVolumeClaim for each KV node; it goes with its node."""

    storage_class_name: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$",
        max_length=253,
        description="The StorageClass. Absent: the cluster's default.",
    )


class KvDisk(ApiModel):
    """A tier of blocks on disk, below memory."""

    size_mb: int = Field(
        default=4096,
        ge=64,
        le=TIER_MB_MAX,
        description="Room for blocks on a node's disk, in MiB; the volume is a tenth larger.",
    )
    volume_claim: VolumeClaim | None = Field(
        default=None,
        description="A claim per node: blocks outlive restarts and moves of a pod, and go when the "
        "node is scaled away. Absent: an emptyDir, which outlives restarts of the container only.",
    )


class ObjectStore(ApiModel):
    """A tier of blocks in a bucket, below memory and disk, which nodes and pools may share."""

    RULES = (
        Rule(
            "!has(self.endpoint) || !self.endpoint.contains('@')",
            "endpoint must not hold a user or password, which everybody could read: put them into "
            "a Secret as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY and name it in secretRef",
        ),
    )
    url: str = Field(
        pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9._/-]*)?$",
        max_length=1024,
        description="The bucket and a prefix in it, s3://BUCKET/PREFIX. Nodes write every block "
        "there and delete none: give the bucket a rule of expiry.",
    )
    endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://[^/?#]+(/[^?#]*)?$",
        max_length=1024,
        description="Where a store is that speaks S3 and is not Amazon's: "
        "http://minio.data.svc:9000. Absent: Amazon's.",
    )
    secret_ref: SecretName | None = Field(
        default=None,
        description="The Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, where needed "
        "also AWS_SESSION_TOKEN and AWS_REGION. Nodes read it when they start, and do not start "
        "without it. Absent: the identity that the node's machine or `env` gives them.",
    )


class KvNodeSettings(PodSettings):
    """A KV node."""

    RULES: ClassVar[tuple[Rule, ...]] = (NODE_FITS_RULE, CLAIM_RULE)
    memory_mb: int = Field(
        default=512,
        ge=1,
        le=TIER_MB_MAX,
        description="Memory for KV blocks in one node, in MiB; the memory limit must cover it.",
    )
    disk: KvDisk | None = Field(
        default=None,
        description="Blocks that memory has no room for go to disk. Absent: memory only.",
    )
    object_store: ObjectStore | None = Field(
        default=None,
        description="Blocks are also kept in a bucket, which outlives nodes. An outage costs hits, "
        "never requests. Absent: memory and disk only.",
    )
    block_ttl_seconds: int | None = Field(
        default=None,
        ge=1,
        le=TTL_S_MAX,
        description="Blocks are dropped this long after they came. Absent: when room is needed.",
    )
    copies: int = Field(
        default=1,
        ge=1,
        le=8,
        description="KV nodes that each block is kept on: with 2, losing a node loses no block.",
    )
    move_mb_per_second: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="When nodes come or go, blocks move to the nodes that they then belong to, at "
        "no more than this per node, in MiB per second. Absent: they stay where they are.",
    )
    tenant_share_percent_max: int = Field(
        default=100,
        ge=1,
        le=100,
        description="How much of each tier the blocks of one tenant may take, in percent.",
    )


class KvSocketSettings(ApiModel):
    """Whether KV between pods of one node moves through shared memory."""

    kv_socket_host_path: str | None = Field(
        default=None,
        pattern=r"^(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+$",
        max_length=512,
        description="A folder of each node, made where it is missing, in which only root should "
        "write. The pods of a namespace share a folder NAMESPACE.kvasir-kv in it: through sockets "
        "they hand one another their memory, and KV between pods of one node is copied once, "
        "without the network. An init container makes that folder their user's own, as root. Pod "
        "Security `baseline` and `restricted` forbid both. Absent: KV moves over TCP. A change "
        "replaces workers and KV nodes.",
    )


class KvUseSettings(ApiModel):
    """How workers use KV of others."""

    kv_nodes: tuple[str, ...] = Field(
        default=(),
        max_length=64,
        description="KV nodes to use: HOST:PORT, or dns:HOST:PORT for every address of a name.",
    )
    kv_copies: int = Field(
        default=1,
        ge=1,
        le=8,
        description="KV nodes that each block is offered to: `copies` of the KVCachePool.",
    )
