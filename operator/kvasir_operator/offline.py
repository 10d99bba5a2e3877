"""What the operator would make of resources in a file: the same plans, without a cluster.

A ModelService is planned first, then the pools that it makes; nothing exists yet, so every plan is
the first one. With a load, the planner says which numbers the service would be given.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from pydantic import ValidationError

from kvasir_operator.api import API_VERSION, KINDS, MODEL_SERVICE, ModelServiceSpec
from kvasir_operator.core.manifests import Manifest, ref_of
from kvasir_operator.core.plan import make_plan, secrets_of, with_fleet
from kvasir_operator.core.planner.facts import Demand, Load
from kvasir_operator.core.planning import TelemetryView
from kvasir_operator.core.slots import selected_refs
from kvasir_operator.core.world import World
from kvasir_operator.errors import OperatorError

KNOWN = {kind.kind: kind for kind in KINDS}
POOLS = frozenset(KNOWN) - {MODEL_SERVICE.kind}


class ManifestError(OperatorError):
    """A file does not hold resources that the operator could read; the message says why."""


@dataclass(frozen=True, slots=True)
class OfflinePlan:
    """One resource of the file and all that would be made for it."""

    resource: Manifest
    children: tuple[Manifest, ...]
    secrets: tuple[tuple[str, str], ...]  # names and types of those that the operator fills
    problems: tuple[str, ...]
    fleet: Manifest  # status.plan; empty without a planner or a load


def read_resources(path: Path) -> list[Manifest]:
    """Kvasir's resources of a YAML file, in order.

    Raises:
        OSError: the file cannot be read.
        ManifestError: it is not YAML, or holds none of Kvasir's resources.
    """
    try:
        documents = list(yaml.safe_load_all(path.read_text()))
    except yaml.YAMLError as error:
        raise ManifestError(f"{path}: not YAML: {error}") from error
    found = [d for d in documents if isinstance(d, dict) and d.get("apiVersion") == API_VERSION]
    unknown = [d.get("kind") for d in found if d.get("kind") not in KNOWN]
    if unknown:
        raise ManifestError(f"{path}: {API_VERSION} has no kind {unknown[0]}")
    if not found:
        raise ManifestError(f"{path}: no resource of {API_VERSION}")
    return [_named(document, path) for document in found]


def _named(document: Manifest, path: Path) -> Manifest:
    metadata = document.get("metadata") or {}
    if not metadata.get("name"):
        raise ManifestError(f"{path}: a {document['kind']} has no metadata.name")
    uid = {"namespace": "default", "uid": f"offline-{metadata['name']}", "resourceVersion": "1"}
    return {**document, "metadata": {**uid, **metadata, "generation": 1}}


def plan_offline(
    resources: Iterable[Manifest],
    *,
    image: str,
    model_memory_mb: Callable[[str], int] | None = None,
    demand: Demand | None = None,
) -> list[OfflinePlan]:
    """The plans for resources as if they were applied to an empty cluster.

    `model_memory_mb` tells what a worker's model takes, by the format of its weights.

    Raises:
        ManifestError: a spec is not valid; the message names the field.
    """
    resources = list(resources)
    return [
        _plan_one(resource, resources, image=image, model_memory_mb=model_memory_mb, demand=demand)
        for resource in resources
    ]


def _plan_one(
    resource: Manifest,
    others: Sequence[Manifest],
    *,
    image: str,
    model_memory_mb: Callable[[str], int] | None,
    demand: Demand | None,
) -> OfflinePlan:
    resource = _with_memory(_checked(resource), model_memory_mb)
    selected = {ref_of(o): o for o in others if ref_of(o) in selected_refs(resource)}
    world = replace(_world(resource, image), live=selected)
    fleet: Manifest = {}
    if demand is not None and resource["kind"] == MODEL_SERVICE.kind:
        load = Load(demand, demand)
        planned = with_fleet(replace(world, telemetry=TelemetryView(now=load, kept=load)))
        fleet = dict(planned.fleet.status) if planned.fleet else {}
    plan = make_plan(world)
    children, problems = list(plan.children), _problems(plan.status)
    for child in plan.children:
        if child["kind"] in POOLS:
            below = make_plan(_world(_named(child, Path(child["kind"])), image))
            children += below.children
            problems += [f"{child['metadata']['name']}: {p}" for p in _problems(below.status)]
    links = secrets_of(resource)
    made = links.made() if links else ()
    return OfflinePlan(resource, tuple(children), made, tuple(problems), fleet)


def _checked(resource: Manifest) -> Manifest:
    kind = KNOWN[resource["kind"]]
    try:
        kind.spec.model_validate(resource.get("spec", {}))
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        name = f"{resource['kind']} {resource['metadata']['name']}"
        raise ManifestError(f"{name}: spec.{field}: {problem['msg']}") from error
    return resource


def _with_memory(resource: Manifest, model_memory_mb: Callable[[str], int] | None) -> Manifest:
    spec = resource["spec"]
    if model_memory_mb is None or "model" not in spec or "memoryMb" in spec["model"]:
        return resource
    memory_mb = model_memory_mb(spec.get("weights", "bf16"))
    return {**resource, "spec": {**spec, "model": {**spec["model"], "memoryMb": memory_mb}}}


def _world(resource: Manifest, image: str) -> World:
    return World(obj=resource, live={}, pods=(), default_image=image, now_ms=0)


def _problems(status: Mapping[str, Sequence[Manifest]]) -> list[str]:
    return [
        condition["message"]
        for condition in status.get("conditions", ())
        if condition["type"] == "Degraded" and condition["status"] == "True"
    ]


def has_planner(resource: Manifest) -> bool:
    """Whether a resource is a ModelService with a planner."""
    if resource["kind"] != MODEL_SERVICE.kind:
        return False
    return ModelServiceSpec.model_validate(resource["spec"]).planner is not None
