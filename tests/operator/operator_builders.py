"""Builders of custom resources, pods and worlds, and a cluster in memory."""

import copy
import json
from collections.abc import Mapping
from typing import Any

from kvasir_operator.api import API_VERSION, KINDS
from kvasir_operator.channels import Channels
from kvasir_operator.cluster import NO_LABELS
from kvasir_operator.core.manifests import (
    DRAIN_ANNOTATION,
    FIELD_MANAGER,
    REVISION_LABEL,
    Manifest,
    Ref,
    ref_of,
)
from kvasir_operator.core.plan import make_plan
from kvasir_operator.core.views import PodView
from kvasir_operator.core.world import Plan, World
from kvasir_operator.errors import ClusterError

NOW_MS = 1_750_000_000_000
IMAGE = "kvasir:test"
MODEL = {"name": "tiny", "source": {"hostPath": {"path": "/models/tiny"}}}


def make_object(kind: str, name: str, spec: Manifest, **metadata: Any) -> Manifest:
    """A custom resource as the API server returns it."""
    return {
        "apiVersion": API_VERSION,
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": "default",
            "uid": f"uid-of-{name}",
            "generation": 1,
            "resourceVersion": "1",
            **metadata,
        },
        "spec": spec,
    }


def make_service(**spec: Any) -> Manifest:
    """A ModelService `chat` with KV nodes."""
    return make_object("ModelService", "chat", {"model": MODEL, "kvCache": {}, **spec})


def make_decode_pool(**spec: Any) -> Manifest:
    """A DecodePool `chat-decode`."""
    return make_object("DecodePool", "chat-decode", {"model": MODEL, **spec})


def make_pod(
    name: str,
    *,
    revision: str = "",
    ready: bool = True,
    running: bool = True,
    drain_started: str = "",
    leaving: bool = False,
    **status: Any,
) -> Manifest:
    """A pod; with a revision, a worker's."""
    metadata: Manifest = {"name": name, "namespace": "default", "uid": f"uid-of-{name}"}
    if revision:
        metadata["labels"] = {REVISION_LABEL: revision}
    if drain_started:
        metadata["annotations"] = {DRAIN_ANNOTATION: drain_started}
    if leaving:
        metadata["deletionTimestamp"] = "2025-06-15T00:00:00Z"
    state = {"running": {}} if running else {"waiting": {"reason": "ContainerCreating"}}
    return {
        "metadata": metadata,
        "status": {
            "podIP": "10.0.0.1",
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
            "containerStatuses": [{"name": "decode", "state": state, "ready": ready}],
            **status,
        },
    }


def make_pod_view(name: str, **facts: Any) -> PodView:
    """A worker that serves and has nothing to do."""
    return PodView(
        **{
            "name": name,
            "uid": f"uid-of-{name}",
            "ip": "10.0.0.1",
            "revision": "new",
            "is_ready": True,
            "is_running": True,
            "is_leaving": False,
            "drain_started_ms": None,
            "problem": None,
            **facts,
        }
    )


def make_stateful_set(name: str, *, replicas: int, ready: int | None = None) -> Manifest:
    """A settled StatefulSet that belongs to the resource of the same name."""
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {
            "name": name,
            "namespace": "default",
            "uid": f"uid-of-{name}-workload",
            "generation": 1,
            "ownerReferences": [{"uid": f"uid-of-{name}", "controller": True}],
        },
        "spec": {"replicas": replicas},
        "status": {
            "observedGeneration": 1,
            "replicas": replicas,
            "readyReplicas": replicas if ready is None else ready,
            "updatedReplicas": replicas,
        },
    }


def revision_of(pool: Manifest) -> str:
    """The revision of a pool's present template."""
    revision: str = plan_for(pool).status["revision"]
    return revision


def make_workers(pool: Manifest, *pods: Manifest) -> list[Manifest]:
    """The pods as workers of the pool's present template, unless they have a revision."""
    revision = revision_of(pool)
    for pod in pods:
        pod["metadata"].setdefault("labels", {}).setdefault(REVISION_LABEL, revision)
    return list(pods)


def make_replica_set(pool: Manifest, *, replicas: int) -> Manifest:
    """The ReplicaSet that the operator makes for the pool's present template."""
    [made] = [c for c in plan_for(pool).children if c["kind"] == "ReplicaSet"]
    made["metadata"]["uid"] = f"uid-of-{made['metadata']['name']}"
    made["spec"]["replicas"] = replicas
    made["status"] = {"replicas": replicas}
    return made


def make_world(obj: Manifest, *live: Manifest, **facts: Any) -> World:
    """A world around one resource."""
    return World(
        **{
            "obj": obj,
            "live": {ref_of(child): child for child in live},
            "pods": (),
            "default_image": IMAGE,
            "now_ms": NOW_MS,
            **facts,
        }
    )


def child_of(plan: Plan, kind: str, name: str) -> Manifest:
    """The planned child of this kind and name."""
    return next(c for c in plan.children if ref_of(c)[0::2] == (kind, name))


def condition_of(status: Manifest, kind: str) -> Manifest:
    """The condition of this type."""
    return next(c for c in status["conditions"] if c["type"] == kind)


def plan_for(obj: Manifest, *live: Manifest, **facts: Any) -> Plan:
    """The plan for a world around one resource."""
    return make_plan(make_world(obj, *live, **facts))


def _defaulted(status: Manifest, kind: str) -> Manifest:
    """A status with the fields that the API server adds by the schema's defaults."""
    fields = next(k.status.model_fields.values() for k in KINDS if k.kind == kind)
    added = {f.alias: f.get_default(call_default_factory=True) for f in fields}
    return {name: list(value) for name, value in added.items() if value == ()} | status


class FakeCluster:
    """A cluster in memory: server-side apply with owned fields, generations, UIDs and defaults."""

    def __init__(self) -> None:
        self.objects: dict[Ref, Manifest] = {}
        self.pods: list[Manifest] = []
        self.warnings: dict[str, str] = {}  # by UID
        self.told: list[Manifest] = []
        self.writes: list[tuple[str, Ref]] = []
        self.refused: dict[Ref, ClusterError] = {}
        self.unserved: set[str] = set()
        self._version = 100

    def add(self, obj: Manifest) -> None:
        """Put an object there, as a user or a controller would."""
        self._version += 1
        obj["metadata"]["resourceVersion"] = str(self._version)
        self.objects[ref_of(obj)] = obj

    async def get(self, ref: Ref) -> Manifest | None:
        """See Cluster."""
        return copy.deepcopy(self.objects.get(ref))

    async def is_served(self, kind: str) -> bool:
        """See Cluster."""
        return kind not in self.unserved

    async def fetch(self, ref: Ref) -> Manifest | None:
        """See Cluster."""
        return await self.get(ref)

    async def list(
        self, kind: str, namespace: str, *, labels: Mapping[str, str] = NO_LABELS
    ) -> list[Manifest]:
        """See Cluster; any pods, others by their labels."""
        if kind == "Pod":
            return copy.deepcopy(self.pods)
        return [
            copy.deepcopy(obj)
            for ref, obj in self.objects.items()
            if ref[:2] == (kind, namespace)
            and labels.items() <= obj["metadata"].get("labels", {}).items()
        ]

    async def warning(self, uid: str, namespace: str) -> str:
        """See Cluster."""
        assert namespace == "default"
        return self.warnings.get(uid, "")

    async def apply(self, manifest: Manifest) -> Manifest:
        """See Cluster: fields that are owned and no longer given are removed."""
        ref = ref_of(manifest)
        if ref in self.refused:
            raise self.refused[ref]
        self.writes.append(("apply", ref))
        live = self.objects.get(ref, {"metadata": {"uid": f"uid-of-{ref.name}", "generation": 0}})
        uid = manifest["metadata"].get("uid", live["metadata"]["uid"])
        if uid != live["metadata"]["uid"] or ("uid" in manifest["metadata"]) > (
            ref in self.objects
        ):
            raise ClusterError(409, "Conflict", "UID mismatch")
        expected = manifest["metadata"].get("resourceVersion")
        if expected is not None and expected != live["metadata"].get("resourceVersion"):
            raise ClusterError(409, "Conflict", "the object has been modified")
        merged = _merge(_without_owned(live), manifest)
        if merged.get("spec") != live.get("spec"):
            merged["metadata"]["generation"] = live["metadata"].get("generation", 0) + 1
        merged["metadata"]["managedFields"] = [
            {"manager": FIELD_MANAGER, "operation": "Apply", "fieldsV1": _fields(manifest)}
        ]
        self.add(merged)
        return copy.deepcopy(merged)

    async def apply_status(self, ref: Ref, status: Manifest) -> Manifest:
        """See Cluster."""
        self.writes.append(("status", ref))
        self.objects[ref]["status"] = _defaulted(json.loads(json.dumps(status)), ref.kind)
        return copy.deepcopy(self.objects[ref])

    async def create_event(self, namespace: str, event: Manifest) -> None:
        """See Cluster."""
        assert namespace == event["metadata"]["namespace"]
        self.told.append(event)

    async def annotate(self, ref: Ref, uid: str, annotations: Mapping[str, str]) -> Manifest:
        """See Cluster; pods only."""
        self.writes.append(("annotate", ref))
        pod = next(pod for pod in self.pods if pod["metadata"]["uid"] == uid)
        pod["metadata"].setdefault("annotations", {}).update(annotations)
        return copy.deepcopy(pod)

    async def delete(self, ref: Ref, *, uid: str = "") -> Manifest | None:
        """See Cluster."""
        self.writes.append(("delete", ref))
        self.pods = [pod for pod in self.pods if not uid or pod["metadata"]["uid"] != uid]
        return self.objects.pop(ref, None)


def make_channels(*secrets: Manifest) -> Channels:
    """Channels that find these Secrets."""
    cluster = FakeCluster()
    for secret in secrets:
        cluster.add(secret)
    return Channels(cluster)


def _merge(live: Any, desired: Any) -> Any:
    if not isinstance(live, dict) or not isinstance(desired, dict):
        return copy.deepcopy(desired)
    return {**live, **{key: _merge(live.get(key), value) for key, value in desired.items()}}


def _without_owned(live: Manifest) -> Manifest:
    left = copy.deepcopy(live)
    for entry in live["metadata"].get("managedFields", ()):
        _remove(left, entry["fieldsV1"])
    return left


def _remove(node: Any, fields: Manifest) -> None:
    for key, inner in fields.items():
        name = key.removeprefix("f:")
        if not isinstance(node, dict) or name not in node:
            continue
        if inner and isinstance(node[name], dict):
            _remove(node[name], inner)
        else:
            del node[name]


def _fields(manifest: Any) -> Manifest:
    """fieldsV1 of a manifest; lists count as atomic, but for owners."""
    skipped = ("apiVersion", "kind", "name", "namespace", "resourceVersion", "uid")
    if not isinstance(manifest, dict):
        return {}
    top = "kind" in manifest and "metadata" in manifest
    fields = {}
    for key, value in manifest.items():
        if top and key in skipped:
            continue
        if top and key == "metadata":
            value = {k: v for k, v in value.items() if k not in skipped}
        fields[f"f:{key}"] = _fields(value)
        if key == "ownerReferences":
            owners = (json.dumps({"uid": owner["uid"]}) for owner in value)
            fields[f"f:{key}"] = {f"k:{owner}": {} for owner in owners}
    return fields
