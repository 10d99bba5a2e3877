"""Names, labels and owners of the objects that the operator makes, and what an object is here.

A manifest is a Kubernetes object as JSON. The names are a promise to users: they appear in
kubectl and in URLs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

Manifest = dict[str, Any]

FIELD_MANAGER = "kvasir-operator"
MANAGED_BY = {"app.kubernetes.io/managed-by": FIELD_MANAGER}
POOL_LABEL = "kvasir.dev/pool"
ROLE_LABEL = "kvasir.dev/role"
SERVICE_LABEL = "kvasir.dev/model-service"
REVISION_LABEL = "kvasir.dev/revision"
DELETION_COST_ANNOTATION = "controller.kubernetes.io/pod-deletion-cost"
DELETION_COST_DRAINED = "-1000"  # below the default of 0: a ReplicaSet removes it first
DRAIN_ANNOTATION = "kvasir.dev/drain-started"
TLS_ANNOTATION = "kvasir.dev/tls-secret"  # of a pod: the Secret whose certificate it shows

API_OF_GATEWAY_KIND = {  # kinds that a cluster has only if somebody has installed them
    "InferencePool": "inference.networking.k8s.io/v1",
    "HTTPRoute": "gateway.networking.k8s.io/v1",
}

WORKER_GRPC_PORT = 50051
WORKER_HTTP_PORT = 8080
WORKER_DATA_PORT = 50052
WORKER_STREAM_PORT = 50053  # token streams, where links are secure
REDIS_PORT = 6379


class Ref(NamedTuple):
    """Which object: its kind, namespace and name."""

    kind: str
    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class Owner:
    """The custom resource that a child belongs to."""

    api_version: str
    kind: str
    namespace: str
    name: str
    uid: str

    @property
    def ref(self) -> Ref:
        """The owner's own reference."""
        return Ref(self.kind, self.namespace, self.name)


def ref_of(manifest: Manifest) -> Ref:
    """The reference of an object."""
    metadata = manifest["metadata"]
    return Ref(manifest["kind"], metadata.get("namespace", ""), metadata["name"])


def role_labels(owner: Owner, role: str) -> dict[str, str]:
    """Labels that select the pods of one role of one owner; they never change."""
    key = SERVICE_LABEL if owner.kind == "ModelService" else POOL_LABEL
    return {**MANAGED_BY, key: owner.name, ROLE_LABEL: role}


def selector_text(labels: dict[str, str]) -> str:
    """Labels as a selector in a query."""
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def child(
    owner: Owner, api_version: str, kind: str, *, name: str, labels: dict[str, str], **body: Any
) -> Manifest:
    """An object that belongs to `owner` and is collected with it."""
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": owner.namespace,
            "labels": {**labels, "app.kubernetes.io/name": "kvasir"},
            "ownerReferences": [
                {
                    "apiVersion": owner.api_version,
                    "kind": owner.kind,
                    "name": owner.name,
                    "uid": owner.uid,
                    "controller": True,
                }
            ],
        },
        **body,
    }


def is_owned_by(obj: Manifest, uid: str) -> bool:
    """Whether the object's controller is the one with this UID."""
    owners: Iterable[Manifest] = obj["metadata"].get("ownerReferences", ())
    return any(owner.get("controller") and owner.get("uid") == uid for owner in owners)


def without_empty(body: Manifest) -> Manifest:
    """The same object without keys that say nothing (None, empty lists, maps and texts).

    The API server drops or defaults such values, and what it drops cannot be compared.
    """
    return {key: value for key, value in body.items() if value not in (None, [], {}, "", ())}
