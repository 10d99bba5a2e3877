"""What is kept of an object in memory: only what plans read.

A pod is some 4 kB of JSON, of which a plan reads an eighth. Of `managedFields` it reads what the
operator owns, and who else writes `spec.replicas`.
"""

from collections.abc import Iterable

from kvasir_operator.core.manifests import (
    DELETION_COST_ANNOTATION,
    FIELD_MANAGER,
    POOL_LABEL,
    SERVICE_LABEL,
    Manifest,
    Ref,
)
from kvasir_operator.core.pool import ROLES

LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
OWN_PREFIX = "kvasir.dev/"
MESSAGE_CHARS_MAX = 1000
POD_METADATA = ("name", "namespace", "uid", "resourceVersion", "labels", "creationTimestamp")
CONTAINER_STATUS = ("name", "ready", "restartCount", "state", "lastState")
CONDITION = ("type", "status", "reason", "message")
EVENT = ("reason", "lastTimestamp", "eventTime")


def slim_object(obj: Manifest) -> Manifest:
    """A custom resource or a child: all but what others note about their own fields."""
    metadata = dict(obj["metadata"])
    metadata["managedFields"] = [*_own_fields(metadata.pop("managedFields", ()))]
    if LAST_APPLIED in metadata.get("annotations", {}):
        kept = {k: v for k, v in metadata["annotations"].items() if k != LAST_APPLIED}
        metadata["annotations"] = kept
    return {**obj, "metadata": metadata}


def _own_fields(entries: Iterable[Manifest]) -> Iterable[Manifest]:
    for entry in entries:
        named = {"manager": entry.get("manager", ""), "operation": entry.get("operation", "")}
        if entry.get("manager") == FIELD_MANAGER:
            if not entry.get("subresource"):
                yield named | {"fieldsV1": entry.get("fieldsV1", {})}
        elif "f:replicas" in entry.get("fieldsV1", {}).get("f:spec", {}):
            yield named | {"fieldsV1": {"f:spec": {"f:replicas": {}}}}


def slim_pod(pod: Manifest) -> Manifest:
    """A pod: its marks, where it answers, and how it is."""
    metadata, spec, status = pod["metadata"], pod.get("spec", {}), pod.get("status", {})
    kept = _only(metadata, (*POD_METADATA, "deletionTimestamp"))
    marks = {k: v for k, v in metadata.get("annotations", {}).items() if _is_mark(k)}
    if marks:
        kept["annotations"] = marks
    containers = [_only(container, ("name", "ports")) for container in spec.get("containers", ())]
    state = _only(status, ("phase", "podIP"))
    state["conditions"] = [_only(c, CONDITION) for c in status.get("conditions", ())]
    for field in ("initContainerStatuses", "containerStatuses"):
        if field in status:
            state[field] = [_only(c, CONTAINER_STATUS) for c in status[field]]
    where = _only(spec, ("nodeName",)) | {"containers": containers}
    return {**_only(pod, ("apiVersion", "kind")), "metadata": kept, "spec": where, "status": state}


def _is_mark(annotation: str) -> bool:
    return annotation.startswith(OWN_PREFIX) or annotation == DELETION_COST_ANNOTATION


def slim_autoscaler(autoscaler: Manifest) -> Manifest | None:
    """What an autoscaler scales; None: nothing of ours."""
    target = autoscaler["spec"]["scaleTargetRef"]
    if target.get("kind") not in (*ROLES, "ReplicaSet", "StatefulSet"):
        return None
    metadata = _only(autoscaler["metadata"], ("name", "namespace", "uid", "resourceVersion"))
    return {"kind": autoscaler["kind"], "metadata": metadata, "spec": {"scaleTargetRef": target}}


def slim_event(event: Manifest) -> Manifest:
    """What a warning says, and about which object."""
    metadata = _only(event["metadata"], ("name", "namespace", "uid", "resourceVersion"))
    about = _only(event.get("involvedObject", {}), ("kind", "namespace", "name", "uid"))
    said = _only(event, EVENT) | {"message": event.get("message", "")[:MESSAGE_CHARS_MAX]}
    return {"kind": event["kind"], "metadata": metadata, "involvedObject": about, **said}


def group_of(obj: Manifest) -> str:
    """Which objects are read together: those of one owner, or the warnings about one object."""
    if "involvedObject" in obj:
        return str(obj["involvedObject"].get("uid", ""))
    return group_of_labels(obj["metadata"].get("labels", {}))


def group_of_labels(labels: Manifest) -> str:
    """The pool or ModelService that labels name."""
    return str(labels.get(POOL_LABEL) or labels.get(SERVICE_LABEL) or "")


def about(event: Manifest) -> Ref:
    """The object that an event is about."""
    found = event["involvedObject"]
    return Ref(found.get("kind", ""), found.get("namespace", ""), found.get("name", ""))


def _only(obj: Manifest, fields: Iterable[str]) -> Manifest:
    return {field: obj[field] for field in fields if field in obj}
