"""kopf's watches: every change of a custom resource or of a child puts its owner into the queue.

Only kopf's low-level event handlers are used: they write nothing to the objects (no finalizers,
no annotations), and what to do is decided by the reconcile alone.
"""

import logging
from collections.abc import Callable
from typing import Any

import kopf

from kvasir_operator.api import GROUP, KINDS, MODEL_SERVICE, VERSION
from kvasir_operator.audit import WatchAudit
from kvasir_operator.cluster import login
from kvasir_operator.core.manifests import (
    MANAGED_BY,
    POOL_LABEL,
    ROLE_LABEL,
    SERVICE_LABEL,
    Ref,
    selector_text,
)
from kvasir_operator.core.pool import ROLES

logger = logging.getLogger(__name__)

CHILD_RESOURCES = (
    ("apps", "v1", "replicasets"),
    ("apps", "v1", "statefulsets"),
    ("apps", "v1", "deployments"),
    ("networking.k8s.io", "v1", "networkpolicies"),
    ("policy", "v1", "poddisruptionbudgets"),
    ("", "v1", "services"),
    ("", "v1", "pods"),
)
AUTOSCALERS = ("autoscaling", "v2", "horizontalpodautoscalers")
POOL_KIND_BY_ROLE = {role: kind for kind, role in ROLES.items()}


def owner_of(namespace: str, labels: dict[str, str]) -> Ref | None:
    """The custom resource that a child belongs to, from its labels."""
    if POOL_LABEL in labels:
        kind = POOL_KIND_BY_ROLE.get(labels.get(ROLE_LABEL, ""))
        return Ref(kind, namespace, labels[POOL_LABEL]) if kind else None
    if SERVICE_LABEL in labels:
        return Ref(MODEL_SERVICE.kind, namespace, labels[SERVICE_LABEL])
    return None


def make_registry(enqueue: Callable[[Ref], None], audit: WatchAudit) -> kopf.OperatorRegistry:
    """kopf's handlers: one per watched resource, all of which only enqueue."""
    registry = kopf.OperatorRegistry()
    kopf.on.login(registry=registry, errors=kopf.ErrorsMode.PERMANENT)(login)

    def on_object(*, body: kopf.Body, type: str | None, **_: Any) -> None:  # noqa: A002
        namespace, name = body.metadata.namespace, body.metadata.name
        if namespace and name:
            enqueue(Ref(str(body["kind"]), namespace, name))
            on_child(body=body, type=type)

    def on_child(*, body: kopf.Body, type: str | None, **_: Any) -> None:  # noqa: A002
        audit.delivered(dict(body), is_gone=type == "DELETED")
        owner = owner_of(body.metadata.namespace or "", dict(body.metadata.labels))
        if owner is not None:
            enqueue(owner)

    def on_autoscaler(*, body: kopf.Body, **_: Any) -> None:
        target = body["spec"]["scaleTargetRef"]
        if target["kind"] in ROLES:
            enqueue(Ref(target["kind"], body.metadata.namespace or "", target["name"]))

    kopf.on.event(*AUTOSCALERS, registry=registry, id="autoscalers")(on_autoscaler)
    for kind in KINDS:
        kopf.on.event(GROUP, VERSION, kind.plural, registry=registry, id=kind.kind)(on_object)
    for group, version, plural in CHILD_RESOURCES:
        kopf.on.event(group, version, plural, registry=registry, id=plural)(on_child)
    return registry


def make_settings() -> kopf.OperatorSettings:
    """Watch what is ours, write nothing, and leave events to the reconcile."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True  # the resources are known; no rights on CRDs needed
    for group, version, plural in CHILD_RESOURCES:
        settings.watching.label_selectors[group, version, plural] = selector_text(MANAGED_BY)
    return settings
