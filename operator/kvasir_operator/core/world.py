"""The input and the output of a plan, and what the plans of all kinds have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvasir_operator.core.conditions import Problem, Reason
from kvasir_operator.core.manifests import Manifest, Owner, Ref, is_owned_by, ref_of
from kvasir_operator.core.planning import PlannedFleet, TelemetryView
from kvasir_operator.core.problems import workload_problem
from kvasir_operator.core.views import DrainView, PodView, WorkerFacts

REQUEUE_DRAINING_MS = 1_000  # also while routers are yet to see a worker
REQUEUE_UNSETTLED_MS = 5_000


@dataclass(frozen=True, slots=True)
class World:
    """One custom resource and all that it depends on, as observed."""

    obj: Manifest
    live: Mapping[Ref, Manifest]  # children that exist, and objects of others under their names
    pods: Sequence[Manifest]
    default_image: str
    now_ms: int
    warnings: Mapping[str, str] = field(default_factory=dict)  # latest one by UID of its object
    drains: Mapping[str, DrainView] = field(default_factory=dict)  # by pod UID
    facts: Mapping[str, WorkerFacts] | None = None  # by worker; None: no router has told
    told_roles: Mapping[str, str] = field(default_factory=dict)  # by pod UID
    autoscalers: Sequence[Manifest] = ()  # of the namespace, where the object is a pool
    services: Sequence[Manifest] = ()  # of the namespace, where a ModelService selects pools
    telemetry: TelemetryView | None = None  # of a ModelService with a planner
    fleet: PlannedFleet | None = None  # what the planner makes of it
    unserved: frozenset[str] = frozenset()  # kinds for gateways that the API server lacks
    problems: tuple[Problem, ...] = ()  # met while the plan was carried out

    @property
    def owner(self) -> Owner:
        """The resource as an owner of children."""
        metadata = self.obj["metadata"]
        return Owner(
            api_version=self.obj["apiVersion"],
            kind=self.obj["kind"],
            namespace=metadata["namespace"],
            name=metadata["name"],
            uid=metadata["uid"],
        )

    def workload_problems(self, *refs: Ref) -> list[Problem]:
        """Why these Deployments and StatefulSets have fewer pods than they want."""
        found = []
        for workload in (self.live[ref] for ref in refs if ref in self.live):
            warning = self.warnings.get(workload["metadata"]["uid"], "")
            found.append(workload_problem(workload, warning))
        return [problem for problem in found if problem is not None]

    @property
    def generation(self) -> int:
        """The generation of the spec that is planned for."""
        generation: int = self.obj["metadata"].get("generation", 0)
        return generation

    @property
    def conditions(self) -> Sequence[Manifest]:
        """The conditions of the live status."""
        conditions: Sequence[Manifest] = self.obj.get("status", {}).get("conditions", ())
        return conditions


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do: children to apply, objects to delete, workers to drain, the status to write."""

    status: Manifest
    children: tuple[Manifest, ...] = ()
    deletions: tuple[Ref, ...] = ()
    drains: tuple[PodView, ...] = ()
    roles: tuple[tuple[PodView, str], ...] = ()  # workers to be told their role
    restarts: tuple[PodView, ...] = ()  # drained workers that are wanted again
    drain_timeout_s: int = 0
    requeue_after_ms: int | None = None  # None: at the next change or resync


def without_conflicts(
    world: World, children: Sequence[Manifest]
) -> tuple[tuple[Manifest, ...], tuple[Problem, ...]]:
    """The children that may be applied, and a problem for each name that somebody else has."""
    free, problems = [], []
    for manifest in children:
        live = world.live.get(ref_of(manifest))
        if live is None or is_owned_by(live, world.owner.uid):
            free.append(manifest)
            continue
        name = manifest["metadata"]["name"]
        text = f"{manifest['kind']} {name} exists and does not belong to {world.owner.kind}"
        problems.append(Problem(Reason.NAME_CONFLICT, f"{text} {world.owner.name}"))
    return tuple(free), tuple(problems)
