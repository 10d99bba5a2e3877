"""Plans a ModelService: router, Redis and the pools that it owns.

Invariant: a pool that exists keeps its own `replicas` (within the template's bounds); whoever
scales it is never fought. The ModelService's status is that of its parts, in one place.
"""

from collections.abc import Sequence

from kvasir_operator.api import (
    API_VERSION,
    KvCachePoolTemplate,
    ModelServiceSpec,
    WorkerPoolTemplate,
)
from kvasir_operator.api_security import ROUTER_PEER_PORT
from kvasir_operator.core import children as make
from kvasir_operator.core.conditions import (
    ConditionType,
    Finding,
    Problem,
    Reason,
    degraded,
    is_condition_true,
    to_conditions,
)
from kvasir_operator.core.drift import contains
from kvasir_operator.core.gateway import (
    gateway_children,
    gateway_problems,
    gateway_refs,
    gateway_status,
    picker_args,
    picker_ports,
)
from kvasir_operator.core.manifests import (
    MANAGED_BY,
    SERVICE_LABEL,
    WORKER_GRPC_PORT,
    Manifest,
    Owner,
    Ref,
    child,
    is_owned_by,
    ref_of,
    role_labels,
)
from kvasir_operator.core.ownership import autoscaler_owner, foreign_owner
from kvasir_operator.core.pods import GRACE_MARGIN_S, MODEL_FOLDER, Part
from kvasir_operator.core.redis import index_of, redis_children
from kvasir_operator.core.rollout import Progress, updated_max
from kvasir_operator.core.slots import (
    PARTS,
    Slot,
    holder_of,
    kv_key_secret,
    link_secret,
    selected_refs,
    selection_problems,
    slots_of,
)
from kvasir_operator.core.views import pod_views, workload_view
from kvasir_operator.core.world import REQUEUE_UNSETTLED_MS, Plan, World, without_conflicts

WORKER_WAIT_S = 10  # requests wait while a busy node keeps all workers from being heard
LINGER_S = 15  # a leaving router serves on while kube-proxies learn of it; also on a busy node
PEERS = {"prefill": "decode", "decode": "prefill"}
DRAIN_TIMEOUT_S = 60  # the router's streams may take this long to end when its pod leaves
OF_ALL_WORKERS = {"model", "engine", "vllm", "weights", "kv_codec"}
NOT_OF_TEMPLATE = ("replicas", "minReplicas", "maxReplicas", "rollout", "networkPolicy")
STATUS_FIELDS = {"prefill": "prefill", "decode": "decode", "kv": "kvCache"}


def service_children(owner: Owner) -> tuple[Ref, ...]:
    """Every object that a ModelService may own."""
    namespace, router, redis = owner.namespace, f"{owner.name}-router", f"{owner.name}-redis"
    return (
        Ref("ServiceAccount", namespace, owner.name),
        *(Ref(kind, namespace, redis) for kind in ("Deployment", "Service", "NetworkPolicy")),
        *(Ref(kind, namespace, f"{owner.name}-{part}") for part, kind in PARTS.items()),
        Ref("PodDisruptionBudget", namespace, router),
        *(Ref(kind, namespace, router) for kind in ("Deployment", "Service")),
        Ref("Service", namespace, f"{router}-peers"),
    )


def service_pod_labels(owner: Owner) -> dict[str, str]:
    """Labels that select the pods that a ModelService owns itself: router and Redis."""
    return {**MANAGED_BY, SERVICE_LABEL: owner.name}


def plan_service(world: World, spec: ModelServiceSpec) -> Plan:
    """The plan for one ModelService."""
    owner, slots = world.owner, slots_of(world.owner, spec)
    wanted = [
        make.service_account(owner, owner.name, service_pod_labels(owner)),
        *redis_children(world, spec),
        *_pools(world, spec),
        *_router(world, spec),
        *gateway_children(world, spec),
    ]
    children, conflicts = without_conflicts(world, wanted)
    refs = {ref_of(manifest) for manifest in wanted}
    refs.update(selected_refs(world.obj))
    deletions = tuple(
        ref
        for ref in (*service_children(owner), *gateway_refs(world.obj))
        if ref not in refs and ref in world.live and is_owned_by(world.live[ref], owner.uid)
    )
    pods = pod_views(world.pods, world.warnings)
    problems = (
        *world.problems,
        *conflicts,
        *world.workload_problems(*(ref for ref in world.live if ref.kind == "Deployment")),
        *(pod.problem for pod in pods if pod.problem),
        *selection_problems(world, slots, spec),
        *_pool_problems(world, slots),
        *gateway_problems(world, spec),
    )
    findings = _findings(world, slots, problems)
    is_settled = not problems and not findings[1].holds
    return Plan(
        status=_status(world, spec, slots, findings),
        children=(*children, *_planned_selected(world, slots)),
        deletions=deletions,
        requeue_after_ms=_requeue_after_ms(world, is_settled=is_settled),
    )


def _requeue_after_ms(world: World, *, is_settled: bool) -> int | None:
    is_settled = is_settled and not selected_refs(world.obj)  # whose changes bring no event
    if world.fleet is None:
        return None if is_settled else REQUEUE_UNSETTLED_MS
    interval_ms = world.fleet.interval_ms
    return interval_ms if is_settled else min(interval_ms, REQUEUE_UNSETTLED_MS)


def _kv_nodes(owner: Owner, spec: ModelServiceSpec) -> list[str]:
    if spec.kv_cache is None:
        return []
    return [f"dns:{owner.name}-kv.{owner.namespace}.svc:{WORKER_GRPC_PORT}"]


def _pools(world: World, spec: ModelServiceSpec) -> list[Manifest]:
    owner = world.owner
    image = spec.model_dump(
        mode="json",
        by_alias=True,
        exclude_none=True,
        include={"image", "image_pull_policy", "image_pull_secrets", "network_policy"},
    )
    common = image | index_of(owner, spec)
    if secret := link_secret(owner.name, spec):
        common |= {"tlsSecret": secret}
    if key := kv_key_secret(owner.name, spec):
        common |= {"kvKeySecret": key}
    if spec.kv_socket_host_path:
        common |= {"kvSocketHostPath": spec.kv_socket_host_path}
    engine = spec.model_dump(mode="json", by_alias=True, exclude_none=True, include=OF_ALL_WORKERS)
    kv = {
        "kvNodes": _kv_nodes(owner, spec),
        "kvCopies": spec.kv_cache.copies if spec.kv_cache else 1,
    }
    worker = common | engine | kv
    slots = slots_of(owner, spec)
    bodies = {
        slot.part: _body(
            spec.worker_template(slot.part), worker | {"peerPool": _peer(owner, slots, slot.part)}
        )
        for slot in slots
        if slot.is_own and slot.part in PEERS
    }
    pools = [
        _pool(world, part, spec.worker_template(part), body | _pace(world, bodies, part))
        for part, body in bodies.items()
    ]
    if spec.kv_cache is not None:
        pools.append(_pool(world, "kv", spec.kv_cache, _body(spec.kv_cache, common)))
    return pools


def _peer(owner: Owner, slots: Sequence[Slot], part: str) -> str:
    """The pool of the other role that workers are to be near to."""
    names = (slot.name for slot in slots if slot.part == PEERS[part])
    return next(names, f"{owner.name}-{PEERS[part]}")


def _planned_selected(world: World, slots: Sequence[Slot]) -> list[Manifest]:
    """What the planner sets of selected pools: fields of theirs, nothing else."""
    owner, made = world.owner, []
    for slot in slots:
        live = world.live.get(slot.ref(owner))
        planned = {} if slot.is_own else _planned(world, slot.key, live)
        if live is not None and planned:
            version = {"resourceVersion": live["metadata"]["resourceVersion"]}
            metadata = {"name": slot.name, "namespace": owner.namespace, **version}
            made.append(
                {
                    "apiVersion": API_VERSION,
                    "kind": slot.kind,
                    "metadata": metadata,
                    "spec": planned,
                }
            )
    return made


def _body(template: WorkerPoolTemplate | KvCachePoolTemplate, common: Manifest) -> Manifest:
    body = template.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"price"})
    return body | common


def _pace(world: World, bodies: dict[str, Manifest], part: str) -> Manifest:
    """`updatedMax` of a pool: the other one must keep up with its rollout."""
    other = PEERS[part]
    own, pool = _live_pool(world, part), _live_pool(world, other)
    if own is None or pool is None or other not in bodies:
        return {}  # whoever changes a selected pool sets its pace
    wanted = own["spec"].get("replicas", 1)
    other_wanted = pool["spec"].get("replicas", 1)
    if _changes(pool, bodies[other]):
        limit = updated_max(wanted, other=Progress(other_wanted, other_wanted))
    elif _is_current(pool):
        outdated = pool.get("status", {}).get("outdatedReplicas", 0)
        limit = updated_max(wanted, other=Progress(other_wanted, outdated))
    else:
        limit = own["spec"].get("updatedMax")  # the other's status is yet to tell
    return {} if limit is None else {"updatedMax": limit}


def _changes(pool: Manifest, body: Manifest) -> bool:
    """Whether applying `body` gives the pool's workers another template."""
    template = {key: value for key, value in body.items() if key not in NOT_OF_TEMPLATE}
    return not contains(pool["spec"], template)


def _pool(
    world: World, part: str, template: WorkerPoolTemplate | KvCachePoolTemplate, body: Manifest
) -> Manifest:
    owner, kind, name = world.owner, PARTS[part], f"{world.owner.name}-{part}"
    live = world.live.get(Ref(kind, owner.namespace, name))
    if live is not None:
        kept = live["spec"].get("replicas", template.replicas)
        bounded = min(max(kept, template.min_replicas), template.max_replicas)
        body = body | {"replicas": bounded}
        if bounded == kept and foreign_owner(live) is not None:
            del body["replicas"]  # an autoscaler or a person sets it: it is theirs
    body = body | _planned(world, part, live)
    labels = role_labels(owner, part)
    manifest = child(owner, API_VERSION, kind, name=name, labels=labels, spec=body)
    if live is not None:  # refuse to overwrite `replicas` if somebody has scaled it since
        manifest["metadata"]["resourceVersion"] = live["metadata"]["resourceVersion"]
    return manifest


def _planned(world: World, key: str, live: Manifest | None) -> Manifest:
    """What the planner sets of a pool. It takes over from people, not from an autoscaler."""
    fleet = world.fleet
    if fleet is None or key not in fleet.targets or live is None:
        return {}
    target = fleet.targets[key]
    lent = {"lentReplicas": target.lent} if fleet.may_lend else {}
    return lent | ({"replicas": target.replicas} if autoscaler_owner(live) is None else {})


def _router(world: World, spec: ModelServiceSpec) -> list[Manifest]:
    owner, name = world.owner, f"{world.owner.name}-router"
    labels = role_labels(owner, "router")
    ports = {"http": spec.router.http_port, "grpc": spec.router.grpc_port, **picker_ports(spec)}
    peer_port, secret = spec.router.grpc_port, link_secret(owner.name, spec)
    inner_ports = dict(ports)
    if secret:
        peer_port = inner_ports["peer"] = ROUTER_PEER_PORT
    workers = (
        f"dns:{slot.name}.{owner.namespace}.svc:{WORKER_GRPC_PORT}"
        for slot in slots_of(owner, spec)
        if slot.part in PEERS and not holder_of(world, slot)
    )
    part = Part(
        name="router",
        args=(
            "router",
            *("--model", MODEL_FOLDER),
            *("--model-name", spec.model.name),
            *("--host", "0.0.0.0"),
            *("--http-port", str(spec.router.http_port)),
            *("--grpc-port", str(spec.router.grpc_port)),
            *("--ttft-slo-ms", str(spec.slo.ttft_ms)),
            *("--tpot-slo-ms", str(spec.slo.tpot_ms)),
            *("--worker-wait-ms", str(1000 * WORKER_WAIT_S)),
            *("--shutdown-linger-ms", str(1000 * LINGER_S)),
            *("--drain-timeout-ms", str(1000 * DRAIN_TIMEOUT_S)),
            *(arg for worker in workers for arg in ("--worker", worker)),
            *(arg for node in _kv_nodes(owner, spec) for arg in ("--kv-node", node)),
            *("--peer", f"dns:{name}-peers.{owner.namespace}.svc:{peer_port}"),
            *(("--peer-port", str(peer_port)) if secret else ()),
            *picker_args(world, spec),
        ),
        ports=inner_ports,
        tls_secret=secret,
        settings=spec.router,
        image=spec,
        default_image=world.default_image,
        service_account=owner.name,
        model=spec.model,
        grace_s=LINGER_S + DRAIN_TIMEOUT_S + GRACE_MARGIN_S,
    )
    return [
        make.disruption_budget(owner, name, labels),
        make.deployment(owner, name, labels, part, replicas=spec.router.replicas),
        make.cluster_service(owner, name, labels, ports),
        make.headless_service(owner, f"{name}-peers", labels, inner_ports),
    ]


def _live_pool(world: World, part: str) -> Manifest | None:
    owner = world.owner
    return world.live.get(Ref(PARTS[part], owner.namespace, f"{owner.name}-{part}"))


def _pool_problems(world: World, slots: Sequence[Slot]) -> list[Problem]:
    """What the pools report as wrong; a report on an earlier generation counts no more."""
    problems = []
    for slot in slots:
        pool = world.live.get(slot.ref(world.owner), {})
        for condition in pool.get("status", {}).get("conditions", ()):
            if condition.get("type") == "Degraded" and condition.get("status") == "True":
                text = f"{slot}: {condition['message']}"
                problems.append(Problem(Reason(condition["reason"]), text))
    return problems


def _is_current(pool: Manifest) -> bool:
    seen: int = pool.get("status", {}).get("observedGeneration", 0)
    wanted: int = pool["metadata"].get("generation", 0)
    return seen >= wanted


def _findings(
    world: World, slots: Sequence[Slot], problems: Sequence[Problem]
) -> tuple[Finding, ...]:
    return (
        _available(world, slots, problems),
        _progressing(world, slots),
        degraded(problems),
        *((world.fleet.finding,) if world.fleet else ()),
    )


def _is_available(world: World, slot: Slot) -> bool:
    status = world.live.get(slot.ref(world.owner), {}).get("status", {})
    return is_condition_true(status, ConditionType.AVAILABLE)


def _available(world: World, slots: Sequence[Slot], problems: Sequence[Problem]) -> Finding:
    router = workload_view(world.live.get(_router_ref(world.owner)))
    waiting = [slot for slot in slots if not _is_available(world, slot)]
    able = {slot.part for slot in slots if slot not in waiting}
    missing = [str(slot) for slot in waiting if slot.part not in able]
    reason = Reason.POOLS_NOT_READY
    if router is None or router.replicas_ready == 0:
        reason = Reason.ROUTER_NOT_READY if not missing else reason
        missing.append("the router")
    if not missing:
        pools = "every pool" if not waiting else "a pool of each role"
        text = f"the router and {pools} are ready"
        return Finding(ConditionType.AVAILABLE, True, Reason.READY, text)
    text = f"not ready: {', '.join(missing)}"
    if problems:
        return Finding(
            ConditionType.AVAILABLE, False, problems[0].reason, f"{text}; {problems[0].message}"
        )
    return Finding(ConditionType.AVAILABLE, False, reason, text)


def _router_ref(owner: Owner) -> Ref:
    return Ref("Deployment", owner.namespace, f"{owner.name}-router")


def _progressing(world: World, slots: Sequence[Slot]) -> Finding:
    waiting = []
    router = workload_view(world.live.get(_router_ref(world.owner)))
    if router is None or not router.is_settled:
        waiting.append("the router")
    for slot in slots:
        pool = world.live.get(slot.ref(world.owner))
        is_done = (
            pool is not None
            and _is_current(pool)
            and bool(pool.get("status", {}).get("conditions"))
            and not is_condition_true(pool["status"], ConditionType.PROGRESSING)
        )
        if not is_done:
            waiting.append(str(slot))
    if not waiting:
        return Finding(ConditionType.PROGRESSING, False, Reason.STABLE, "all parts are as wanted")
    reason = Reason.CREATING if router is None else Reason.ROLLING_OUT
    return Finding(ConditionType.PROGRESSING, True, reason, f"under way: {', '.join(waiting)}")


def _status(
    world: World, spec: ModelServiceSpec, slots: Sequence[Slot], findings: Sequence[Finding]
) -> Manifest:
    owner = world.owner
    router = workload_view(world.live.get(_router_ref(owner)))
    host = f"{owner.name}-router.{owner.namespace}.svc"
    status: Manifest = {
        "observedGeneration": world.generation,
        "endpoint": f"http://{host}:{spec.router.http_port}/v1",
        "router": _part_status(spec.router.replicas, ready=router.replicas_ready if router else 0),
        **gateway_status(world, spec),
    }
    for part in dict.fromkeys(slot.part for slot in slots):
        pools = [world.live.get(slot.ref(owner), {}) for slot in slots if slot.part == part]
        status[STATUS_FIELDS[part]] = _part_status(
            sum(pool.get("spec", {}).get("replicas", 0) for pool in pools),
            ready=sum(pool.get("status", {}).get("readyReplicas", 0) for pool in pools),
        )
    if world.fleet is not None:
        status["plan"] = world.fleet.status
    status["conditions"] = to_conditions(
        findings, world.conditions, generation=world.generation, now_ms=world.now_ms
    )
    return status


def _part_status(wanted: int, *, ready: int) -> Manifest:
    return {"replicas": wanted, "readyReplicas": ready, "summary": f"{ready}/{wanted}"}
