"""What a KV node keeps blocks on: its arguments, credentials, volumes and the claims for them."""

from collections.abc import Sequence

from kvasir_operator.api import KVCachePoolSpec
from kvasir_operator.core.manifests import WORKER_GRPC_PORT, Manifest, Owner

CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
MORE_CREDENTIALS = ("AWS_SESSION_TOKEN", "AWS_REGION")  # where the store asks for them
DISK_FOLDER, DISK_VOLUME = "/kv-disk", "kvasir-disk"
BLOCKS_FOLDER = f"{DISK_FOLDER}/blocks"  # beside what a file system keeps at its root


def tier_args(owner: Owner, spec: KVCachePoolSpec) -> Sequence[str]:
    """How much blocks may take, where, for how long and how often."""
    args = ["--memory-mb", str(spec.memory_mb)]
    if spec.disk is not None:
        args += ["--disk-dir", BLOCKS_FOLDER, "--disk-mb", str(spec.disk.size_mb)]
    if spec.object_store is not None:
        args += ["--store-url", spec.object_store.url]
        if spec.object_store.endpoint is not None:
            args += ["--store-endpoint", spec.object_store.endpoint]
    if spec.block_ttl_seconds is not None:
        args += ["--block-ttl-ms", str(1000 * spec.block_ttl_seconds)]
    if spec.tenant_share_percent_max < 100:
        args += ["--tenant-share-max", str(spec.tenant_share_percent_max / 100)]
    if spec.copies > 1:
        args += ["--kv-replicas", str(spec.copies)]
    if spec.move_mb_per_second is not None:
        all_nodes = f"dns:{owner.name}.{owner.namespace}.svc:{WORKER_GRPC_PORT}"
        args += ["--kv-node", all_nodes, "--move-mb-per-s", str(spec.move_mb_per_second)]
    return args


def store_credentials(spec: KVCachePoolSpec) -> dict[str, Manifest]:
    """Keys of a Secret by the variables in which a node looks for them."""
    if spec.object_store is None or spec.object_store.secret_ref is None:
        return {}
    secret = spec.object_store.secret_ref.name
    needed = {key: {"name": secret, "key": key} for key in CREDENTIALS}
    return needed | {
        key: {"name": secret, "key": key, "optional": True} for key in MORE_CREDENTIALS
    }


def disk_mounts(spec: KVCachePoolSpec) -> list[Manifest]:
    """Where a node finds its disk."""
    if spec.disk is None:
        return []
    return [{"name": DISK_VOLUME, "mountPath": DISK_FOLDER}]


def disk_volumes(spec: KVCachePoolSpec) -> list[Manifest]:
    """The disk of a node that has no claim: it goes with the pod."""
    if spec.disk is None or spec.disk.volume_claim is not None:
        return []
    return [{"name": DISK_VOLUME, "emptyDir": {"sizeLimit": _volume_size(spec.disk.size_mb)}}]


def disk_claims(spec: KVCachePoolSpec) -> list[Manifest]:
    """The claims that a StatefulSet makes for its pods, one per node."""
    if spec.disk is None or spec.disk.volume_claim is None:
        return []
    chosen = spec.disk.volume_claim.storage_class_name
    body: Manifest = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": _volume_size(spec.disk.size_mb)}},
        **({"storageClassName": chosen} if chosen else {}),
    }
    kind = {"apiVersion": "v1", "kind": "PersistentVolumeClaim"}
    return [{**kind, "metadata": {"name": DISK_VOLUME}, "spec": body}]


def _volume_size(size_mb: int) -> str:
    """A tenth more than blocks may take: a file system keeps some for itself."""
    return f"{-(-size_mb * 11 // 10)}Mi"
