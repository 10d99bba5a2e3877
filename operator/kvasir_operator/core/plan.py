"""From a world to a plan, whatever the kind: the one door into the core."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError

from kvasir_operator.api import API_VERSION, MODEL_SERVICE, ModelServiceSpec
from kvasir_operator.api_planner import PlannerSettings
from kvasir_operator.core.conditions import (
    ConditionType,
    Finding,
    Problem,
    Reason,
    degraded,
    to_conditions,
)
from kvasir_operator.core.manifests import Manifest, Owner, Ref, ref_of
from kvasir_operator.core.planning import plan_fleet
from kvasir_operator.core.pool import SPECS, plan_pool, pool_children, pool_labels
from kvasir_operator.core.service import plan_service, service_children, service_pod_labels
from kvasir_operator.core.slots import kv_key_secret, link_secret, selecting, slots_of
from kvasir_operator.core.world import Plan, World

CERTIFICATE_TYPE, KEY_TYPE = "kubernetes.io/tls", "Opaque"
WORKER_POOLS = ("PrefillPool", "DecodePool")


def make_plan(world: World) -> Plan:
    """The plan for one custom resource; a spec that cannot be read yields only a status."""
    kind, raw = world.obj["kind"], world.obj.get("spec", {})
    try:
        if kind == MODEL_SERVICE.kind:
            return plan_service(world, ModelServiceSpec.model_validate(raw))
        return plan_pool(world, SPECS[kind].model_validate(raw))
    except ValidationError as error:
        return _invalid(world, error)


def planner_settings(obj: Manifest) -> PlannerSettings | None:
    """The planner's settings, where a resource has one and its spec can be read."""
    if obj["kind"] != MODEL_SERVICE.kind:
        return None
    try:
        return ModelServiceSpec.model_validate(obj.get("spec", {})).planner
    except ValidationError:
        return None  # `make_plan` tells


def planned_pools(obj: Manifest, owner: Owner) -> dict[str, str]:
    """Names of the worker pools of a ModelService by what plans call them."""
    slots = slots_of(owner, ModelServiceSpec.model_validate(obj["spec"]))
    return {slot.key: slot.name for slot in slots if slot.part != "kv"}


@dataclass(frozen=True, slots=True)
class LinkSecrets:
    """The Secrets of a ModelService's links by name; "": there is none."""

    certificate: str
    is_own: bool  # the operator makes the certificate
    kv_key: str

    def made(self) -> tuple[tuple[str, str], ...]:
        """Names and types of those that the operator makes."""
        own = (self.certificate, CERTIFICATE_TYPE) if self.is_own else ("", "")
        return tuple(made for made in (own, (self.kv_key, KEY_TYPE)) if made[0])


def secrets_of(obj: Manifest) -> LinkSecrets | None:
    """The Secrets of a ModelService; None: nobody asks for any."""
    if obj["kind"] != MODEL_SERVICE.kind:
        return None
    try:
        spec = ModelServiceSpec.model_validate(obj.get("spec", {}))
    except ValidationError:
        return None  # `make_plan` tells
    service = obj["metadata"]["name"]
    certificate = link_secret(service, spec)
    is_own = spec.security.secret_name is None
    return LinkSecrets(certificate, is_own, kv_key_secret(service, spec)) if certificate else None


def with_fleet(world: World) -> World:
    """The world with what the planner makes of it."""
    spec = ModelServiceSpec.model_validate(world.obj["spec"])
    return replace(world, fleet=plan_fleet(world, spec))


def child_refs(owner: Owner) -> tuple[Ref, ...]:
    """Every object with a fixed name that a resource may own."""
    if owner.kind == MODEL_SERVICE.kind:
        return service_children(owner)
    return pool_children(owner)


def listed_children(owner: Owner) -> tuple[str, ...]:
    """Kinds of children whose names are not fixed: they are found by `pod_labels`."""
    return ("ReplicaSet",) if owner.kind in WORKER_POOLS else ()


def is_scalable(owner: Owner) -> bool:
    """Whether autoscalers may set the number of its pods."""
    return owner.kind != MODEL_SERVICE.kind


def service_of(obj: Manifest, services: Sequence[Manifest] = ()) -> Owner | None:
    """The ModelService that a worker pool takes part in: its owner, or of `services` the one that
    has selected it."""
    metadata = obj["metadata"]
    for owner in metadata.get("ownerReferences", ()):
        is_service = owner.get("controller") and owner.get("kind") == MODEL_SERVICE.kind
        if is_service and obj["kind"] in WORKER_POOLS:
            return Owner(
                api_version=owner.get("apiVersion", API_VERSION),
                kind=owner["kind"],
                namespace=metadata["namespace"],
                name=owner["name"],
                uid=owner["uid"],
            )
    found = selecting(ref_of(obj), services)
    if found is None:
        return None
    return Owner(
        api_version=API_VERSION,
        kind=MODEL_SERVICE.kind,
        namespace=metadata["namespace"],
        name=found["metadata"]["name"],
        uid=found["metadata"]["uid"],
    )


def pod_labels(owner: Owner) -> dict[str, str]:
    """Labels of the pods to observe."""
    if owner.kind == MODEL_SERVICE.kind:
        return service_pod_labels(owner)
    return pool_labels(owner)


def _invalid(world: World, error: ValidationError) -> Plan:
    """The API server lets this pass only if its CRDs are of another version than the operator."""
    details = "; ".join(
        f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()
    )
    problem = Problem(Reason.INVALID_SPEC, f"spec cannot be read: {details}")
    findings = [
        Finding(ConditionType.PROGRESSING, False, problem.reason, problem.message),
        degraded([problem]),
    ]
    conditions = to_conditions(
        findings, world.conditions, generation=world.generation, now_ms=world.now_ms
    )
    kept = [c for c in world.conditions if c.get("type") == ConditionType.AVAILABLE.value]
    status = {"observedGeneration": world.generation, "conditions": [*kept, *conditions]}
    return Plan(status=status)
