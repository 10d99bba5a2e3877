"""Who sets `spec.replicas` of a pool: one owner at a time, and whoever it is, it is not fought.

The API server notes for every field who wrote it last. A writer other than the operator (kubectl
scale, an autoscaler through the `scale` subresource) owns the number; the operator then leaves it
out of what it applies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvasir_operator.core.manifests import FIELD_MANAGER, Manifest

AUTOSCALER_KIND = "HorizontalPodAutoscaler"
AUTOSCALER_MANAGERS = ("kube-controller-manager", "keda")  # an HPA writes as the former


@dataclass(frozen=True, slots=True)
class Ownership:
    """Who sets the number of workers."""

    owner: str  # for people: "HorizontalPodAutoscaler chat", "kubectl", ...; empty: the operator
    rivals: tuple[str, ...] = ()  # all who write the number, if they are more than one


def foreign_owner(pool: Manifest) -> str | None:
    """The field manager other than the operator that wrote `spec.replicas` last."""
    for entry in pool["metadata"].get("managedFields", ()):
        fields = entry.get("fieldsV1", {})
        if "f:replicas" in fields.get("f:spec", {}) and entry.get("manager") != FIELD_MANAGER:
            return str(entry.get("manager", "unknown"))
    return None


def autoscalers_of(pool: Manifest, autoscalers: Sequence[Manifest]) -> list[str]:
    """HorizontalPodAutoscalers (KEDA makes one, too) that scale the pool or pods of it."""
    name, kind = pool["metadata"]["name"], pool["kind"]
    found = []
    for autoscaler in autoscalers:
        target = autoscaler["spec"]["scaleTargetRef"]
        is_pool = (target.get("kind"), target.get("name")) == (kind, name)
        is_set = target.get("kind") == "ReplicaSet" and target.get("name", "").startswith(
            f"{name}-"
        )
        is_nodes = (target.get("kind"), target.get("name")) == ("StatefulSet", name)
        if is_pool or is_set or is_nodes:
            found.append(autoscaler["metadata"]["name"])
    return sorted(found)


def ownership(pool: Manifest, autoscalers: Sequence[Manifest]) -> Ownership:
    """Who sets the pool's replicas, and whether several do."""
    scalers = [f"{AUTOSCALER_KIND} {name}" for name in autoscalers_of(pool, autoscalers)]
    if scalers:
        return Ownership(scalers[0], tuple(scalers) if len(scalers) > 1 else ())
    return Ownership(foreign_owner(pool) or "")


def autoscaler_owner(pool: Manifest) -> str | None:
    """The autoscaler that wrote `spec.replicas` last; a planner takes over from people only."""
    owner = foreign_owner(pool)
    return owner if owner in AUTOSCALER_MANAGERS else None
