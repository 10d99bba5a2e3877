"""Plans a pool: its StatefulSet and what is around it, and who drains before a scale-in.

Invariant: a worker pod that is no longer wanted stays until it is drained, is not running, or its
time is over; the StatefulSet is lowered only past such pods. The pool's `spec.replicas` is what
users and autoscalers write, and the operator only reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvasir_operator.api import DecodePoolSpec, KVCachePoolSpec, PrefillPoolSpec, WorkerPoolSpec
from kvasir_operator.core import children as make
from kvasir_operator.core.conditions import (
    ConditionType,
    Finding,
    Problem,
    Reason,
    degraded,
    to_conditions,
)
from kvasir_operator.core.manifests import (
    WORKER_DATA_PORT,
    WORKER_GRPC_PORT,
    WORKER_HTTP_PORT,
    Manifest,
    Owner,
    Ref,
    role_labels,
    selector_text,
)
from kvasir_operator.core.pods import GRACE_MARGIN_S, MODEL_FOLDER, Part
from kvasir_operator.core.views import PodView, WorkloadView, pod_views, workload_view
from kvasir_operator.core.world import (
    REQUEUE_DRAINING_MS,
    REQUEUE_UNSETTLED_MS,
    Plan,
    World,
    without_conflicts,
)

PoolSpec = WorkerPoolSpec | KVCachePoolSpec
ROLES = {"PrefillPool": "prefill", "DecodePool": "decode", "KVCachePool": "kv"}
SPECS: dict[str, type[PoolSpec]] = {
    "PrefillPool": PrefillPoolSpec,
    "DecodePool": DecodePoolSpec,
    "KVCachePool": KVCachePoolSpec,
}
DRAIN_MARGIN_S = 10  # after the worker's own deadline: it should have answered by then
PORTS = {"grpc": WORKER_GRPC_PORT, "http": WORKER_HTTP_PORT, "data": WORKER_DATA_PORT}


def pool_children(owner: Owner) -> tuple[Ref, ...]:
    """Every object that a pool may own."""
    kinds = ("ServiceAccount", "Service", "PodDisruptionBudget", "StatefulSet")
    return tuple(Ref(kind, owner.namespace, owner.name) for kind in kinds)


def pool_labels(owner: Owner) -> dict[str, str]:
    """Labels that select the pods of a pool."""
    return role_labels(owner, ROLES[owner.kind])


@dataclass(frozen=True, slots=True)
class Removal:
    """Who leaves, and how many pods the StatefulSet has meanwhile."""

    replicas: int
    draining: tuple[PodView, ...] = ()
    restarts: tuple[PodView, ...] = ()


def plan_pool(world: World, spec: PoolSpec) -> Plan:
    """The plan for one pool."""
    owner, labels = world.owner, pool_labels(world.owner)
    ref = Ref("StatefulSet", owner.namespace, owner.name)
    workload = workload_view(world.live.get(ref))
    pods = pod_views(world.pods, world.warnings)
    removal = _plan_removal(world, spec, workload, pods)
    part = _part(world, spec)
    children, conflicts = without_conflicts(
        world,
        [
            make.service_account(owner, owner.name, labels),
            make.headless_service(owner, owner.name, labels, PORTS),
            make.disruption_budget(owner, owner.name, labels),
            make.stateful_set(owner, owner.name, labels, part, replicas=removal.replicas),
        ],
    )
    problems = (
        *world.problems,
        *conflicts,
        *world.workload_problems(ref),
        *(pod.problem for pod in pods if pod.problem),
    )
    status = _status(world, spec, workload, removal, problems)
    is_settled = workload is not None and workload.is_settled and not problems
    requeue = REQUEUE_DRAINING_MS if removal.draining else REQUEUE_UNSETTLED_MS
    return Plan(
        status=status,
        children=children,
        drains=tuple(pod for pod in removal.draining if pod.uid not in world.drains),
        restarts=removal.restarts,
        drain_timeout_s=spec.drain_timeout_seconds if isinstance(spec, WorkerPoolSpec) else 0,
        requeue_after_ms=None if is_settled and not removal.draining else requeue,
    )


def _plan_removal(
    world: World, spec: PoolSpec, workload: WorkloadView | None, pods: Sequence[PodView]
) -> Removal:
    """A KV node just leaves: its blocks are a cache. A worker drains first."""
    if isinstance(spec, KVCachePoolSpec) or workload is None:
        return Removal(spec.replicas)
    present = [pod for pod in pods if not pod.is_leaving]
    surplus = [pod for pod in present if pod.ordinal >= spec.replicas]
    marked = [
        pod for pod in present if pod.ordinal < spec.replicas and pod.drain_started_ms is not None
    ]
    is_busy = {pod.uid: not _is_drained(world, spec, pod) for pod in (*surplus, *marked)}
    busy = [pod for pod in surplus if is_busy[pod.uid]]
    replicas = max([spec.replicas, *(pod.ordinal + 1 for pod in busy)])
    return Removal(
        replicas=min(replicas, max(spec.replicas, workload.replicas_wanted)),
        draining=tuple(pod for pod in (*surplus, *marked) if is_busy[pod.uid]),
        restarts=tuple(pod for pod in marked if not is_busy[pod.uid]),
    )


def _is_drained(world: World, spec: WorkerPoolSpec, pod: PodView) -> bool:
    drain = world.drains.get(pod.uid)
    if not pod.is_running or (drain is not None and drain.is_over):
        return True
    if pod.drain_started_ms is None:
        return False
    limit_ms = 1000 * (spec.drain_timeout_seconds + DRAIN_MARGIN_S)
    return world.now_ms - pod.drain_started_ms > limit_ms


def _part(world: World, spec: PoolSpec) -> Part:
    owner = world.owner
    if isinstance(spec, KVCachePoolSpec):
        args = ["kvnode", *_common_args(), "--memory-mb", str(spec.memory_mb)]
        model, grace_s = None, 30
    else:
        args = ["worker", *_common_args(), *_worker_args(owner, spec)]
        model, grace_s = spec.model, spec.drain_timeout_seconds + GRACE_MARGIN_S
    if spec.redis_url:
        args += ["--redis", spec.redis_url]
    return Part(
        name=ROLES[owner.kind],
        args=args,
        ports=PORTS,
        settings=spec,
        image=spec,
        default_image=world.default_image,
        service_account=owner.name,
        model=model,
        needs_weights=True,
        grace_s=grace_s,
    )


def _common_args() -> list[str]:
    return [
        *("--name", "$(KVASIR_POD_NAME)"),
        *("--uid", "$(KVASIR_POD_UID)"),
        *("--host", "0.0.0.0"),
        *("--advertise-host", "$(KVASIR_POD_IP)"),
        *("--grpc-port", str(WORKER_GRPC_PORT)),
        *("--http-port", str(WORKER_HTTP_PORT)),
        *("--data-port", str(WORKER_DATA_PORT)),
    ]


def _worker_args(owner: Owner, spec: WorkerPoolSpec) -> list[str]:
    args = [
        *("--model", MODEL_FOLDER),
        *("--model-name", spec.model.name),
        *("--role", ROLES[owner.kind]),
        *("--threads", str(spec.threads)),
        *("--kv-cache-mb", str(spec.kv_cache_mb)),
        *("--drain-timeout-ms", str(spec.drain_timeout_seconds * 1000)),
    ]
    for node in spec.kv_nodes:
        args += ["--kv-node", node]
    return args


def _status(
    world: World,
    spec: PoolSpec,
    workload: WorkloadView | None,
    removal: Removal,
    problems: Sequence[Problem],
) -> Manifest:
    findings = [
        _available(spec, workload, problems),
        _progressing(spec, workload, removal),
        degraded(problems),
    ]
    if isinstance(spec, WorkerPoolSpec):
        findings.append(_draining(removal.draining))
    return {
        "observedGeneration": world.generation,
        "replicas": workload.replicas if workload else 0,
        "readyReplicas": workload.replicas_ready if workload else 0,
        "selector": selector_text(pool_labels(world.owner)),
        "drainingPods": [_draining_pod(world, pod) for pod in removal.draining],
        "conditions": to_conditions(
            findings, world.conditions, generation=world.generation, now_ms=world.now_ms
        ),
    }


def _draining_pod(world: World, pod: PodView) -> Manifest:
    drain = world.drains.get(pod.uid)
    entry: Manifest = {"name": pod.name}
    if drain is not None and drain.requests_left is not None:
        entry["requestsLeft"] = drain.requests_left
    if drain is not None and drain.blocks_left is not None:
        entry["blocksLeft"] = drain.blocks_left
    return entry


def _available(
    spec: PoolSpec, workload: WorkloadView | None, problems: Sequence[Problem]
) -> Finding:
    ready = workload.replicas_ready if workload else 0
    text = f"{ready} of {spec.replicas} ready, at least {spec.min_replicas} needed"
    if ready >= spec.min_replicas:
        return Finding(ConditionType.AVAILABLE, True, Reason.READY, text)
    if problems:
        text = f"{text}: {problems[0].message}"
    reason = problems[0].reason if problems else Reason.WORKERS_NOT_READY
    return Finding(ConditionType.AVAILABLE, False, reason, text)


def _progressing(spec: PoolSpec, workload: WorkloadView | None, removal: Removal) -> Finding:
    def under_way(reason: Reason, message: str) -> Finding:
        return Finding(ConditionType.PROGRESSING, True, reason, message)

    if workload is None:
        return under_way(Reason.CREATING, "the pods are being created")
    if removal.draining:
        names = ", ".join(pod.name for pod in removal.draining)
        return under_way(Reason.DRAINING, f"waiting for {names} to drain")
    if workload.replicas_wanted != spec.replicas or workload.replicas != spec.replicas:
        text = f"from {workload.replicas} to {spec.replicas} pods"
        return under_way(Reason.SCALING, text)
    if not workload.is_observed or workload.replicas_updated < workload.replicas_wanted:
        text = f"{workload.replicas_updated} of {workload.replicas_wanted} pods are up to date"
        return under_way(Reason.ROLLING_OUT, text)
    if workload.replicas_ready < workload.replicas_wanted:
        text = f"{workload.replicas_ready} of {workload.replicas_wanted} pods are ready"
        return under_way(Reason.STARTING, text)
    return Finding(ConditionType.PROGRESSING, False, Reason.STABLE, "all pods are as wanted")


def _draining(draining: Sequence[PodView]) -> Finding:
    if not draining:
        return Finding(
            ConditionType.DRAINING, False, Reason.NOT_DRAINING, "no worker is being removed"
        )
    names = ", ".join(pod.name for pod in draining)
    text = f"requests of {names} are finished first"
    return Finding(ConditionType.DRAINING, True, Reason.DRAINING, text)
