"""Plans a pool: the workloads that make its pods, and what is around them.

Workers belong to a ReplicaSet per revision of their template, so that any one of them can leave
(see core/workers.py and adr 6); KV nodes belong to a StatefulSet. The pool's `spec.replicas` is
what users and autoscalers write, and the operator only reads it.
"""

from collections.abc import Sequence

from kvasir_operator.api import DecodePoolSpec, KVCachePoolSpec, PrefillPoolSpec, WorkerPoolSpec
from kvasir_operator.core import children as make
from kvasir_operator.core.conditions import Problem
from kvasir_operator.core.fit import memory_problem
from kvasir_operator.core.kv_nodes import (
    disk_claims,
    disk_mounts,
    disk_volumes,
    store_credentials,
    tier_args,
)
from kvasir_operator.core.manifests import (
    REVISION_LABEL,
    WORKER_DATA_PORT,
    WORKER_GRPC_PORT,
    WORKER_HTTP_PORT,
    WORKER_STREAM_PORT,
    Manifest,
    Owner,
    Ref,
    is_owned_by,
    ref_of,
    role_labels,
)
from kvasir_operator.core.pods import GRACE_MARGIN_S, MODEL_FOLDER, Engine, Part
from kvasir_operator.core.pool_status import PoolFacts, pool_status
from kvasir_operator.core.roles import Flip, Phase, plan_roles
from kvasir_operator.core.views import PodView, pod_views, worker_views, workload_view
from kvasir_operator.core.vllm import EVENTS_URL, REPLAY_URL, VLLM_URL, vllm_engine
from kvasir_operator.core.workers import Goal, Step, plan_step
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
WORKLOADS = ("ReplicaSet", "StatefulSet")
PORTS = {"grpc": WORKER_GRPC_PORT, "http": WORKER_HTTP_PORT, "data": WORKER_DATA_PORT}


def pool_children(owner: Owner) -> tuple[Ref, ...]:
    """Every object with a fixed name that a pool may own."""
    kinds = ("ServiceAccount", "Service", "PodDisruptionBudget", "NetworkPolicy", "StatefulSet")
    return tuple(Ref(kind, owner.namespace, owner.name) for kind in kinds)


def pool_labels(owner: Owner) -> dict[str, str]:
    """Labels that select the pods of a pool."""
    return role_labels(owner, ROLES[owner.kind])


def plan_pool(world: World, spec: PoolSpec) -> Plan:
    """The plan for one pool."""
    owner, labels = world.owner, pool_labels(world.owner)
    around = [
        make.service_account(owner, owner.name, labels),
        make.headless_service(owner, owner.name, labels, _ports(spec)),
        make.disruption_budget(owner, owner.name, labels),
    ]
    if spec.network_policy:
        around.append(
            make.network_policy(
                owner,
                owner.name,
                labels,
                inner_ports=[name for name in _ports(spec) if name != "http"],
                open_ports=("http",),
            )
        )
    if isinstance(spec, KVCachePoolSpec):
        return _plan_kv_nodes(world, spec, around)
    return _plan_workers(world, spec, around)


def _plan_kv_nodes(world: World, spec: KVCachePoolSpec, around: list[Manifest]) -> Plan:
    """KV nodes keep their names; one that is not wanted just leaves: its blocks are a cache."""
    owner = world.owner
    part = _part(world, spec)
    nodes = make.stateful_set(
        owner,
        owner.name,
        pool_labels(owner),
        part,
        replicas=spec.replicas,
        claims=disk_claims(spec),
    )
    children, conflicts = without_conflicts(world, [*around, nodes])
    workload = workload_view(world.live.get(ref_of(nodes)))
    pods = pod_views(world.pods, world.warnings)
    problems = _problems(world, conflicts, pods)
    facts = PoolFacts(
        wanted=spec.replicas,
        needed=spec.min_replicas,
        present=workload.replicas if workload else 0,
        ready=workload.replicas_ready if workload else 0,
        outdated=workload.replicas_outdated if workload else 0,
        is_created=workload is not None,
        is_observed=workload is not None and workload.is_observed,
    )
    return Plan(
        status=pool_status(world, pool_labels(owner), facts, problems),
        children=children,
        deletions=_unwanted_policy(world, spec),
        requeue_after_ms=None if facts.is_settled and not problems else REQUEUE_UNSETTLED_MS,
    )


def _plan_workers(world: World, spec: WorkerPoolSpec, around: list[Manifest]) -> Plan:
    """Workers come and go one by one: see core/workers.py."""
    owner, labels, part = world.owner, pool_labels(world.owner), _part(world, spec)
    newest = make.revision_of(part, labels)
    sets = _replica_sets(world)
    misfit = memory_problem(spec)
    if misfit is not None and newest not in sets:
        return _without_new_workers(world, spec, around, misfit)
    pods = worker_views(world.pods, world.warnings, world.facts)
    goal = Goal(
        replicas=spec.replicas,
        newest=newest,
        updated_max=spec.updated_max,
        max_surge=spec.rollout.max_surge,
        max_unavailable=spec.rollout.max_unavailable,
    )
    step = plan_step(
        goal, pods, revisions=sets, is_drained=lambda pod: _is_drained(world, spec, pod)
    )
    current = make.replica_set(owner, newest, labels, part, replicas=step.replicas[newest])
    earlier = [
        _scaled(live, step.replicas[revision])
        for revision, live in sets.items()
        if revision != newest and not _is_over(live, step.replicas[revision], pods)
    ]
    children, conflicts = without_conflicts(world, [*around, current])
    problems = _problems(world, conflicts, pods)
    facts = _worker_facts(world, spec, step, pods, newest)
    flips = _flips(world, spec, pods)
    return Plan(
        status=pool_status(world, labels, facts, problems, draining=step.draining, flips=flips),
        children=(*children, *earlier),
        deletions=(
            *_unwanted_policy(world, spec),
            *_superfluous(world, sets, step, facts, pods),
        ),
        drains=tuple(pod for pod in step.draining if pod.uid not in world.drains),
        roles=tuple((f.pod, f.target) for f in flips if f.phase is Phase.CORDON),
        restarts=step.restarts,
        drain_timeout_s=spec.drain_timeout_seconds,
        requeue_after_ms=_requeue_ms(step, flips, facts, problems),
    )


def _without_new_workers(
    world: World, spec: WorkerPoolSpec, around: list[Manifest], misfit: Problem
) -> Plan:
    """Workers of an earlier template stay as they are; none of this one is made."""
    children, conflicts = without_conflicts(world, around)
    pods = worker_views(world.pods, world.warnings, world.facts)
    problems = (misfit, *_problems(world, conflicts, pods))
    facts = PoolFacts(
        wanted=spec.replicas,
        needed=spec.min_replicas,
        present=len(pods),
        ready=sum(pod.is_ready for pod in pods),
        outdated=len(pods),
        is_created=bool(pods),
        is_observed=True,
    )
    return Plan(
        status=pool_status(world, pool_labels(world.owner), facts, problems),
        children=children,
        requeue_after_ms=REQUEUE_UNSETTLED_MS,
    )


def _requeue_ms(
    step: Step, flips: Sequence[Flip], facts: PoolFacts, problems: Sequence[Problem]
) -> int | None:
    is_flipping = any(flip.phase is not Phase.SERVE for flip in flips)
    if step.draining or is_flipping or facts.unrouted:
        return REQUEUE_DRAINING_MS
    return None if facts.is_settled and not problems else REQUEUE_UNSETTLED_MS


def _flips(world: World, spec: WorkerPoolSpec, pods: Sequence[PodView]) -> tuple[Flip, ...]:
    own = ROLES[world.owner.kind]
    return plan_roles(
        pods,
        own_role=own,
        other_role="decode" if own == "prefill" else "prefill",
        num_lent=spec.lent_replicas,
        told=world.told_roles,
    )


def _replica_sets(world: World) -> dict[str, Manifest]:
    """The pool's ReplicaSets by revision."""
    return {
        live["metadata"].get("labels", {}).get(REVISION_LABEL, ""): live
        for ref, live in sorted(world.live.items())
        if ref.kind == "ReplicaSet" and is_owned_by(live, world.owner.uid)
    }


def _scaled(live: Manifest, replicas: int) -> Manifest:
    """A ReplicaSet of an earlier revision as it stands, with another number of workers."""
    metadata = live["metadata"]
    return {
        "apiVersion": "apps/v1",
        "kind": "ReplicaSet",
        "metadata": {
            key: metadata[key] for key in ("name", "namespace", "labels", "ownerReferences")
        },
        "spec": {**live["spec"], "replicas": replicas},
    }


def _is_over(live: Manifest, replicas: int, pods: Sequence[PodView]) -> bool:
    """Whether an earlier revision has no worker any more and wants none."""
    revision = live["metadata"]["labels"].get(REVISION_LABEL)
    return (
        replicas == 0
        and live["spec"].get("replicas") == 0
        and not any(pod.revision == revision for pod in pods)
    )


def _superfluous(
    world: World,
    sets: dict[str, Manifest],
    step: Step,
    facts: PoolFacts,
    pods: Sequence[PodView],
) -> tuple[Ref, ...]:
    """ReplicaSets of earlier revisions without workers, and the StatefulSet of earlier releases."""
    owner = world.owner
    over = [
        Ref("ReplicaSet", owner.namespace, live["metadata"]["name"])
        for revision, live in sets.items()
        if step.replicas[revision] == 0 and _is_over(live, 0, pods)
    ]
    before = world.live.get(Ref("StatefulSet", owner.namespace, owner.name))
    if before is not None and is_owned_by(before, owner.uid) and facts.ready >= facts.wanted:
        over.append(Ref("StatefulSet", owner.namespace, owner.name))
    return tuple(over)


def _unwanted_policy(world: World, spec: PoolSpec) -> tuple[Ref, ...]:
    ref = Ref("NetworkPolicy", world.owner.namespace, world.owner.name)
    live = world.live.get(ref)
    is_ours = live is not None and is_owned_by(live, world.owner.uid)
    return (ref,) if is_ours and not spec.network_policy else ()


def _worker_facts(
    world: World, spec: WorkerPoolSpec, step: Step, pods: Sequence[PodView], newest: str
) -> PoolFacts:
    present = [pod for pod in pods if not pod.is_leaving]
    live = world.live.get(Ref("ReplicaSet", world.owner.namespace, f"{world.owner.name}-{newest}"))
    return PoolFacts(
        wanted=spec.replicas,
        needed=spec.min_replicas,
        present=len(present),
        ready=sum(pod.is_ready for pod in present),
        outdated=step.num_outdated,
        unrouted=tuple(f"{p.name}: {p.route_problem}" for p in present if p.route_problem),
        is_created=live is not None,
        is_observed=live is not None,
        revision=newest,
    )


def _problems(
    world: World, conflicts: Sequence[Problem], pods: Sequence[PodView]
) -> tuple[Problem, ...]:
    return (
        *world.problems,
        *conflicts,
        *world.workload_problems(*(ref for ref in world.live if ref.kind in WORKLOADS)),
        *(pod.problem for pod in pods if pod.problem),
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
        args = ["kvnode", *_common_args(), *tier_args(owner, spec)]
        model, grace_s = None, 30
    else:
        args = ["worker", *_common_args(), *_worker_args(owner, spec)]
        model, grace_s = spec.model, spec.drain_timeout_seconds + GRACE_MARGIN_S
    if spec.redis_url:
        args += ["--redis", spec.redis_url]
    return Part(
        name=ROLES[owner.kind],
        args=args,
        ports=_ports(spec),
        tls_secret=spec.tls_secret or "",
        kv_key_secret=spec.kv_key_secret or "",
        kv_socket_host_path=_socket_folder(owner, spec),
        settings=spec,
        image=spec,
        default_image=world.default_image,
        service_account=owner.name,
        secret_env=_secret_env(spec),
        model=model,
        needs_weights=True,
        volumes=disk_volumes(spec) if isinstance(spec, KVCachePoolSpec) else (),
        mounts=disk_mounts(spec) if isinstance(spec, KVCachePoolSpec) else (),
        engine=_engine(spec),
        near=_near(spec),
        grace_s=grace_s,
    )


def _socket_folder(owner: Owner, spec: PoolSpec) -> str:
    """On the node; the namespace's own, so that it changes no folder that is there already."""
    if not spec.kv_socket_host_path:
        return ""
    return f"{spec.kv_socket_host_path}/{owner.namespace}.kvasir-kv"


def _secret_env(spec: PoolSpec) -> dict[str, Manifest]:
    keys = store_credentials(spec) if isinstance(spec, KVCachePoolSpec) else {}
    if spec.redis_url_secret_ref is not None:
        keys["KVASIR_REDIS"] = spec.redis_url_secret_ref.model_dump()
    return keys


def _engine(spec: PoolSpec) -> Engine | None:
    if isinstance(spec, KVCachePoolSpec) or spec.vllm is None:
        return None
    return vllm_engine(spec, spec.vllm)


def _near(spec: PoolSpec) -> tuple[str, str] | None:
    if isinstance(spec, KVCachePoolSpec) or not (spec.peer_pool and spec.near_topology_key):
        return None
    return spec.peer_pool, spec.near_topology_key


def _ports(spec: PoolSpec) -> dict[str, int]:
    """By name; what is plain and what is not must not share one."""
    has_streams = not isinstance(spec, KVCachePoolSpec) and spec.tls_secret
    return {**PORTS, "stream": WORKER_STREAM_PORT} if has_streams else PORTS


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
    role, engine = "both", ["--vllm-url", VLLM_URL]
    engine += ["--vllm-events", EVENTS_URL, "--vllm-replay", REPLAY_URL]
    if spec.vllm is None:
        role = ROLES[owner.kind]
        engine = ["--threads", str(spec.threads), "--kv-cache-mb", str(spec.kv_cache_mb)]
        if spec.weights != "bf16":
            engine += ["--weights", spec.weights]
    args = [
        *("--model", MODEL_FOLDER),
        *("--model-name", spec.model.name),
        *("--role", role),
        *engine,
        *("--drain-timeout-ms", str(spec.drain_timeout_seconds * 1000)),
    ]
    for node in spec.kv_nodes:
        args += ["--kv-node", node]
    if spec.kv_copies > 1:
        args += ["--kv-replicas", str(spec.kv_copies)]
    if spec.kv_codec != "raw":
        args += ["--kv-codec", spec.kv_codec]
    return args + (["--stream-port", str(WORKER_STREAM_PORT)] if spec.tls_secret else [])
