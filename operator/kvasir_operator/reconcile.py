"""One level-triggered reconcile: observe, plan, apply, then one write of the status.

Nothing is remembered between two reconciles; a second one without a change in the cluster writes
nothing. What the API server refuses becomes a condition, not a loop.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from kvasir_operator.api import MODEL_SERVICE
from kvasir_operator.cluster import Cluster
from kvasir_operator.core.conditions import Problem, Reason
from kvasir_operator.core.drift import contains, is_as_desired
from kvasir_operator.core.events import Event, events_between, manifest_of
from kvasir_operator.core.gateway import gateway_refs
from kvasir_operator.core.manifests import (
    DELETION_COST_ANNOTATION,
    DELETION_COST_DRAINED,
    DRAIN_ANNOTATION,
    FIELD_MANAGER,
    Manifest,
    Ref,
    ref_of,
    role_labels,
)
from kvasir_operator.core.ownership import AUTOSCALER_KIND
from kvasir_operator.core.plan import (
    WORKER_POOLS,
    child_refs,
    is_scalable,
    listed_children,
    make_plan,
    planned_pools,
    planner_settings,
    pod_labels,
    secrets_of,
    service_of,
    with_fleet,
)
from kvasir_operator.core.slots import selected_pools, selected_refs, with_links_kept
from kvasir_operator.core.views import PodView, WorkerFacts
from kvasir_operator.core.world import Plan, World
from kvasir_operator.drain import Drainer
from kvasir_operator.errors import ClusterError
from kvasir_operator.plan_metrics import PlanMetrics
from kvasir_operator.roles import RoleSetter
from kvasir_operator.routers import Routers
from kvasir_operator.secrets import SecretKeeper
from kvasir_operator.telemetry import Collector

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a reconcile."""

    is_gone: bool = False
    num_writes: int = 0
    requeue_after_ms: int | None = None


class Reconciler:
    """Reconciles any of Kvasir's custom resources."""

    def __init__(
        self,
        cluster: Cluster,
        drainer: Drainer,
        roles: RoleSetter,
        routers: Routers,
        collector: Collector,
        secrets: SecretKeeper,
        *,
        default_image: str,
    ) -> None:
        self._cluster = cluster
        self._drainer = drainer
        self._roles = roles
        self._routers = routers
        self._collector = collector
        self._secrets = secrets
        self._default_image = default_image
        self._plans = PlanMetrics()

    async def reconcile(self, ref: Ref) -> Outcome:
        """Bring one object's children and status to what its spec asks for."""
        # 1. Observe.
        obj = await self._cluster.get(ref)
        if obj is None or "deletionTimestamp" in obj["metadata"]:
            self._plans.forget(ref)
            return Outcome(is_gone=True)  # the garbage collector removes the children
        world = await self._observe(obj)
        # 2. Plan and apply, the Secret first; the plan after the writes gives the status.
        world, num_steps = await self._keep_secret(world)
        if any(problem.reason is Reason.NAME_CONFLICT for problem in world.problems):
            plan, num_writes = make_plan(world), 0  # pods would take somebody else's certificate
        else:
            world, plan = await self._with_taken_names(world, make_plan(world))
            world, num_writes = await self._carry_out(world, plan)
        num_writes += num_steps
        plan = make_plan(world) if num_writes or world.problems else plan
        # 3. One write of the status.
        if not _is_status_current(obj, plan.status):
            await self._cluster.apply_status(ref, plan.status)
            num_writes += 1
            await self._tell(obj, events_between(obj.get("status", {}), plan.status))
        self._plans.note(ref, obj.get("status", {}).get("plan", {}), plan.status.get("plan", {}))
        return Outcome(num_writes=num_writes, requeue_after_ms=plan.requeue_after_ms)

    async def _keep_secret(self, world: World) -> tuple[World, int]:
        """The certificate of a service's parts, before there are pods that wait for it."""
        wanted = secrets_of(world.obj)
        if wanted is None:
            return world, 0
        try:
            problems, num_writes = await self._secrets.keep(
                world.owner, wanted, users=selected_pools(world)
            )
        except ClusterError as error:
            if not error.is_refusal:
                raise
            logger.warning("Secrets of %s: %s", world.owner.ref, error)
            text = f"Secret {wanted.certificate} cannot be read or made: {error.message}"
            problems, num_writes = [Problem(Reason.APPLY_FAILED, text)], 0
        return replace(world, problems=(*world.problems, *problems)), num_writes

    async def _tell(self, obj: Manifest, events: Sequence[Event]) -> None:
        """Record events; one that cannot be recorded is not worth a second reconcile."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        for event in events:
            name = uuid.uuid4().hex[:16]
            manifest = manifest_of(event, obj, component=FIELD_MANAGER, time=now, name=name)
            try:
                await self._cluster.create_event(obj["metadata"]["namespace"], manifest)
            except ClusterError as error:
                logger.info("event %s of %s: %s", event.reason, ref_of(obj), error)

    async def _observe(self, obj: Manifest) -> World:
        world = World(
            obj=obj,
            live={},
            pods=(),
            default_image=self._default_image,
            now_ms=time.time_ns() // 1_000_000,
        )
        live = {}
        for child in (*child_refs(world.owner), *selected_refs(obj), *gateway_refs(obj)):
            found = await self._cluster.get(child)
            if found is not None:
                live[child] = found
        labels = pod_labels(world.owner)
        for kind in listed_children(world.owner):
            for found in await self._cluster.list(kind, world.owner.namespace, labels=labels):
                live[ref_of(found)] = found
        pods = await self._cluster.list("Pod", world.owner.namespace, labels=labels)
        autoscalers = []
        if is_scalable(world.owner):
            autoscalers = await self._cluster.list(AUTOSCALER_KIND, world.owner.namespace)
        router = live.get(Ref("Deployment", world.owner.namespace, f"{world.owner.name}-router"))
        observed = replace(
            world,
            obj=with_links_kept(obj, router),
            live=live,
            pods=pods,
            warnings=await self._warnings(world.owner.namespace, [*live.values(), *pods]),
            drains=self._drainer.views(),
            facts=await self._facts(obj),
            told_roles=self._roles.told(),
            autoscalers=autoscalers,
            services=await self._services(world.owner.namespace) if selected_refs(obj) else (),
            unserved=await self._unserved(obj),
        )
        return await self._with_plan(observed)

    async def _with_plan(self, world: World) -> World:
        """With the planner's outcome: one per reconcile, whatever is planned from it."""
        settings = planner_settings(world.obj)
        if settings is None:
            return world
        telemetry = await self._collector.view(
            world.owner.ref,
            world.pods,
            pools=planned_pools(world.obj, world.owner),
            interval_s=settings.interval_seconds,
            keep_s=settings.keep_window_seconds,
        )
        return with_fleet(replace(world, telemetry=telemetry))

    async def _unserved(self, obj: Manifest) -> frozenset[str]:
        """Kinds for gateways that the API server does not know, where somebody asks for them."""
        kinds = [ref.kind for ref in gateway_refs(obj)]
        return frozenset([kind for kind in kinds if not await self._cluster.is_served(kind)])

    async def _services(self, namespace: str) -> Sequence[Manifest]:
        """All ModelServices of a namespace: any of them may select a pool that stands alone."""
        return await self._cluster.list(MODEL_SERVICE.kind, namespace)

    async def _facts(self, obj: Manifest) -> Mapping[str, WorkerFacts] | None:
        """What the routers of a worker pool's ModelService know of its workers."""
        service = service_of(obj)
        if service is None and obj["kind"] in WORKER_POOLS:
            service = service_of(obj, await self._services(obj["metadata"]["namespace"]))
        if service is None:
            return None
        labels = role_labels(service, "router")
        pods = await self._cluster.list("Pod", service.namespace, labels=labels)
        return await self._routers.facts(service.ref, pods)

    async def _warnings(self, namespace: str, objects: list[Manifest]) -> Mapping[str, str]:
        """The latest warning event of each object that waits for something."""
        waiting = [obj["metadata"]["uid"] for obj in objects if _is_waiting(obj)]
        warnings = {uid: await self._cluster.warning(uid, namespace) for uid in waiting}
        return {uid: text for uid, text in warnings.items() if text}

    async def _with_taken_names(self, world: World, plan: Plan) -> tuple[World, Plan]:
        """See also those objects under the names of new children that are not ours.

        The caches hold only our own: what they do not show may yet be there.
        """
        absent = [ref for ref in map(ref_of, plan.children) if ref not in world.live]
        found = await asyncio.gather(*map(self._cluster.fetch, absent))
        taken = {ref: obj for ref, obj in zip(absent, found, strict=True) if obj is not None}
        if not taken:
            return world, plan
        world = replace(world, live={**world.live, **taken})
        return world, make_plan(world)

    async def _carry_out(self, world: World, plan: Plan) -> tuple[World, int]:
        """Apply what differs; the world as it is afterwards, and the number of writes."""
        live, problems, num_writes = dict(world.live), list(world.problems), 0
        for manifest in plan.children:
            ref = ref_of(manifest)
            if is_as_desired(manifest, live.get(ref)):
                continue
            try:
                live[ref] = await self._cluster.apply(_of_the_seen(manifest, live.get(ref)))
                num_writes += 1
                logger.info("applied %s %s/%s", *ref)
            except ClusterError as error:
                if not error.is_refusal:
                    raise
                logger.warning("applying %s %s/%s: %s", *ref, error)
                text = f"{ref.kind} {ref.name} was refused: {error.message}"
                problems.append(Problem(Reason.APPLY_FAILED, text))
        for ref in plan.deletions:
            gone = live.pop(ref, None)
            await self._cluster.delete(ref, uid=gone["metadata"]["uid"] if gone else "")
            num_writes += 1
            logger.info("deleted %s %s/%s", *ref)
        num_writes += await self._move_workers(world, plan)
        return replace(world, live=live, problems=tuple(problems)), num_writes

    async def _move_workers(self, world: World, plan: Plan) -> int:
        """Begin the drains and restarts of the plan; the number of writes."""
        num_writes = 0
        for pod in plan.drains:
            num_writes += await self._start_drain(world, pod, plan.drain_timeout_s)
        for pod, role in plan.roles:
            self._roles.start(world.owner.ref, pod, role)
        for pod in plan.restarts:
            await self._cluster.delete(_pod_ref(world, pod), uid=pod.uid)
            num_writes += 1
            logger.info("restarted %s: it was drained and is wanted again", pod.name)
        return num_writes

    async def _start_drain(self, world: World, pod: PodView, timeout_s: int) -> int:
        num_writes = 0
        if pod.drain_started_ms is None:
            started = datetime.fromtimestamp(world.now_ms // 1000, UTC).isoformat()
            ref = _pod_ref(world, pod)
            marks = {
                DRAIN_ANNOTATION: started,
                DELETION_COST_ANNOTATION: DELETION_COST_DRAINED,
            }
            await self._cluster.annotate(ref, pod.uid, marks)
            num_writes = 1
        self._drainer.start(world.owner.ref, pod, timeout_s=timeout_s)
        return num_writes


def _of_the_seen(manifest: Manifest, seen: Manifest | None) -> Manifest:
    """Refused (409) unless it changes the very object that was planned for.

    One of the same name that was made since is somebody else's: forced, it would be taken over.
    """
    if seen is None:
        return manifest
    return {**manifest, "metadata": {**manifest["metadata"], "uid": seen["metadata"]["uid"]}}


def _pod_ref(world: World, pod: PodView) -> Ref:
    return Ref("Pod", world.owner.namespace, pod.name)


def _is_waiting(obj: Manifest) -> bool:
    """Whether a StatefulSet lacks pods, or a pod's container has not been made yet."""
    status = obj.get("status", {})
    if obj.get("kind") in ("StatefulSet", "ReplicaSet"):
        return bool(status.get("replicas", 0) < obj["spec"].get("replicas", 1))
    containers = [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]
    return any(
        container.get("state", {}).get("waiting", {}).get("reason")
        in ("ContainerCreating", "PodInitializing")
        for container in containers
    )


def _is_status_current(obj: Manifest, status: Manifest) -> bool:
    """Whether the live status says the same; what we no longer say must be gone, too.

    An empty list says nothing: the API server adds those that the schema has as defaults.
    """
    live, said = ({k: v for k, v in s.items() if v != []} for s in (obj.get("status", {}), status))
    return set(live) == set(said) and contains(live, said) and contains(said, live)
