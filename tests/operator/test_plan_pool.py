"""Plans of pools: children, scale-in with drain, status."""

from dataclasses import replace
from typing import Any

import pytest
from kvasir_operator.core.manifests import Manifest
from kvasir_operator.core.plan import make_plan
from kvasir_operator.core.pool import DRAIN_MARGIN_S
from kvasir_operator.core.views import DrainView
from kvasir_operator.core.world import Plan
from operator_builders import (
    IMAGE,
    NOW_MS,
    child_of,
    condition_of,
    make_decode_pool,
    make_object,
    make_pod,
    make_replica_set,
    make_service,
    make_stateful_set,
    make_workers,
    make_world,
    plan_for,
)

NAME = "chat-decode"
LONG_AGO = "2020-01-01T00:00:00+00:00"


def replica_set_of(plan: Plan) -> Manifest:
    """The planned ReplicaSet of the present template."""
    return child_of(plan, "ReplicaSet", f"{NAME}-{plan.status['revision']}")


def pod_spec(plan: Plan) -> Manifest:
    """The pod spec of the planned workers."""
    template: Manifest = replica_set_of(plan)["spec"]["template"]["spec"]
    return template


def replicas_of(plan: Plan) -> int:
    """How many workers of the present template are planned."""
    replicas: int = replica_set_of(plan)["spec"]["replicas"]
    return replicas


def scale_in(*, to: int, pods: list[Manifest], **facts: object) -> Plan:
    """The plan of a pool with these workers that is to have `to` of them."""
    pool = make_decode_pool(replicas=to)
    live = make_replica_set(pool, replicas=len(pods))
    return plan_for(pool, live, pods=make_workers(pool, *pods), **facts)


def test_new_pool_makes_its_children() -> None:
    plan = plan_for(make_decode_pool(replicas=2))
    kinds = [child["kind"] for child in plan.children]
    assert kinds == ["ServiceAccount", "Service", "PodDisruptionBudget", "ReplicaSet"]
    assert replicas_of(plan) == 2
    assert condition_of(plan.status, "Progressing")["reason"] == "Creating"


def test_workers_are_found_before_they_are_ready() -> None:
    service = child_of(plan_for(make_decode_pool()), "Service", NAME)
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["clusterIP"] == "None"


def test_worker_gets_its_flags() -> None:
    pool = make_decode_pool(
        threads=3, kvCacheMb=64, kvNodes=["dns:kv:50051"], redisUrl="redis://r:6379/0", args=["--x"]
    )
    [container] = pod_spec(plan_for(pool))["containers"]
    args = " ".join(container["args"])
    assert container["image"] == IMAGE
    assert args.startswith("worker --name $(KVASIR_POD_NAME) --uid $(KVASIR_POD_UID)")
    for flag in ("--role decode", "--threads 3", "--kv-cache-mb 64", "--kv-node dns:kv:50051"):
        assert flag in args
    assert args.endswith("--redis redis://r:6379/0 --x")
    names = {variable["name"] for variable in container["env"]}
    assert {"KVASIR_POD_NAME", "KVASIR_POD_UID", "KVASIR_POD_IP"} <= names


def kv_nodes(**spec: Any) -> Manifest:
    """The StatefulSet of a KVCachePool, its spec."""
    plan = plan_for(make_object("KVCachePool", NAME, {"replicas": 2, **spec}))
    found: Manifest = child_of(plan, "StatefulSet", NAME)["spec"]
    return found


def test_nodes_without_a_disk_are_as_they_were() -> None:
    nodes = kv_nodes()
    [container] = nodes["template"]["spec"]["containers"]
    added = {"--disk-dir", "--block-ttl-ms", "--tenant-share-max", "--kv-replicas", "--kv-node"}
    assert not added & set(container["args"])
    assert [v["name"] for v in nodes["template"]["spec"]["volumes"]] == ["tmp"]
    assert "volumeClaimTemplates" not in nodes


def test_disk_without_a_claim_goes_with_the_pod() -> None:
    nodes = kv_nodes(disk={"sizeMb": 1000}, blockTtlSeconds=60, tenantSharePercentMax=25)
    [container] = nodes["template"]["spec"]["containers"]
    args = " ".join(container["args"])
    assert "--disk-dir /kv-disk/blocks --disk-mb 1000" in args
    assert "--block-ttl-ms 60000 --tenant-share-max 0.25" in args
    assert {"name": "kvasir-disk", "mountPath": "/kv-disk"} in container["volumeMounts"]
    disk = {"name": "kvasir-disk", "emptyDir": {"sizeLimit": "1100Mi"}}
    assert disk in nodes["template"]["spec"]["volumes"]
    assert "volumeClaimTemplates" not in nodes


def test_copies_are_a_matter_of_nodes_and_workers() -> None:
    [node] = kv_nodes(copies=2, moveMbPerSecond=32)["template"]["spec"]["containers"]
    args = " ".join(node["args"])
    assert "--kv-replicas 2" in args
    assert f"--kv-node dns:{NAME}.default.svc:50051 --move-mb-per-s 32" in args
    plan = plan_for(make_service(kvCache={"copies": 2}))
    for kind, part in (("PrefillPool", "prefill"), ("DecodePool", "decode")):
        pool = child_of(plan, kind, f"chat-{part}")["spec"]
        assert pool["kvCopies"] == 2
        [worker] = pod_spec(plan_for(make_object(kind, NAME, pool)))["containers"]
        assert "--kv-replicas 2" in " ".join(worker["args"])
    plain = child_of(plan_for(make_service()), "DecodePool", "chat-decode")["spec"]
    assert plain["kvCopies"] == 1
    assert "--kv-replicas" not in pod_spec(plan_for(make_decode_pool()))["containers"][0]["args"]


def test_disk_with_a_claim_goes_with_the_node() -> None:
    nodes = kv_nodes(disk={"volumeClaim": {"storageClassName": "fast"}})
    [claim] = nodes["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == "kvasir-disk"
    assert claim["spec"]["storageClassName"] == "fast"
    assert claim["spec"]["resources"]["requests"] == {"storage": "4506Mi"}
    kept = {"whenDeleted": "Delete", "whenScaled": "Delete"}
    assert nodes["persistentVolumeClaimRetentionPolicy"] == kept
    volumes = [v["name"] for v in nodes["template"]["spec"]["volumes"]]
    assert volumes == ["tmp"], "the StatefulSet adds the claim's own"


def test_pods_are_locked_down() -> None:
    image = {"image": {"reference": "models:1"}}
    spec = pod_spec(plan_for(make_decode_pool(model={"name": "tiny", "source": image})))
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    for container in (*spec["containers"], *spec["initContainers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_a_worker_has_time_to_drain_before_it_is_killed() -> None:
    assert (
        pod_spec(plan_for(make_decode_pool(drainTimeoutSeconds=90)))[
            "terminationGracePeriodSeconds"
        ]
        > 90
    )


SOURCES = {
    "hostPath": (
        {"hostPath": {"path": "/m"}},
        {"name": "model", "hostPath": {"path": "/m", "type": "Directory"}},
    ),
    "pvc": (
        {"pvc": {"claimName": "c", "path": "sub"}},
        {"name": "model", "persistentVolumeClaim": {"claimName": "c", "readOnly": True}},
    ),
    "image": ({"image": {"reference": "i"}}, {"name": "model", "emptyDir": {}}),
}


@pytest.mark.parametrize(("source", "volume"), SOURCES.values(), ids=SOURCES)
def test_model_source_becomes_a_volume(source: Manifest, volume: Manifest) -> None:
    pool = make_decode_pool(model={"name": "tiny", "source": source})
    spec = pod_spec(plan_for(pool))
    assert volume in spec["volumes"]
    mount = next(m for m in spec["containers"][0]["volumeMounts"] if m["name"] == "model")
    assert (mount["mountPath"], mount["readOnly"]) == ("/model", True)
    assert ("initContainers" in spec) == ("image" in source)


def test_scale_in_drains_before_it_removes() -> None:
    plan = scale_in(to=1, pods=[make_pod(f"{NAME}-0"), make_pod(f"{NAME}-1")])
    assert replicas_of(plan) == 2
    assert [pod.name for pod in plan.drains] == [f"{NAME}-0"]
    assert condition_of(plan.status, "Draining")["status"] == "True"
    assert plan.status["drainingPods"] == [{"name": f"{NAME}-0"}]


def test_a_running_drain_is_shown_and_not_started_again() -> None:
    drains = {f"uid-of-{NAME}-1": DrainView(requests_left=3, blocks_left=7)}
    marked = make_pod(f"{NAME}-1", drain_started="2025-06-15T15:06:39+00:00")
    plan = scale_in(to=1, pods=[make_pod(f"{NAME}-0"), marked], drains=drains)
    assert plan.drains == ()
    [shown] = plan.status["drainingPods"]
    assert shown == {"name": f"{NAME}-1", "requestsLeft": 3, "blocksLeft": 7}


REMOVABLE = {
    "drained": (
        make_pod(f"{NAME}-1", drain_started=LONG_AGO),
        {f"uid-of-{NAME}-1": DrainView(0, 0, is_over=True)},
    ),
    "not running": (make_pod(f"{NAME}-1", running=False, ready=False), {}),
    "out of time": (make_pod(f"{NAME}-1", drain_started=LONG_AGO), {}),
}


@pytest.mark.parametrize(("pod", "drains"), REMOVABLE.values(), ids=REMOVABLE)
def test_a_worker_that_need_not_be_waited_for_is_removed(
    pod: Manifest, drains: dict[str, DrainView]
) -> None:
    plan = scale_in(to=1, pods=[make_pod(f"{NAME}-0"), pod], drains=drains)
    assert replicas_of(plan) == 1
    assert plan.drains == ()


def test_drain_deadline_is_the_workers_own_and_a_margin() -> None:
    started = "2025-06-15T15:06:40+00:00"  # NOW_MS
    pool = make_decode_pool(replicas=1, drainTimeoutSeconds=5)
    pods = [make_pod(f"{NAME}-0"), make_pod(f"{NAME}-1", drain_started=started)]
    world = make_world(pool, make_replica_set(pool, replicas=2), pods=make_workers(pool, *pods))
    limit_ms = NOW_MS + 1000 * (5 + DRAIN_MARGIN_S)
    assert replicas_of(make_plan(replace(world, now_ms=limit_ms))) == 2
    assert replicas_of(make_plan(replace(world, now_ms=limit_ms + 1))) == 1


def test_a_drained_worker_that_is_wanted_again_is_restarted() -> None:
    drained = make_pod(f"{NAME}-1", drain_started=LONG_AGO)
    plan = scale_in(to=2, pods=[make_pod(f"{NAME}-0"), drained])
    assert [pod.name for pod in plan.restarts] == [f"{NAME}-1"]
    assert replicas_of(plan) == 2


def test_kv_nodes_leave_without_a_drain() -> None:
    pool = make_object("KVCachePool", "chat-kv", {"replicas": 1})
    live = make_stateful_set("chat-kv", replicas=2)
    plan = plan_for(pool, live, pods=[make_pod("chat-kv-0"), make_pod("chat-kv-1")])
    assert child_of(plan, "StatefulSet", "chat-kv")["spec"]["replicas"] == 1
    assert plan.drains == ()


def test_settled_pool_is_available_and_rests() -> None:
    pods = [make_pod(f"{NAME}-0"), make_pod(f"{NAME}-1")]
    plan = scale_in(to=2, pods=pods)
    states = {c["type"]: c["status"] for c in plan.status["conditions"]}
    assert states == {
        "Available": "True",
        "Progressing": "False",
        "Degraded": "False",
        "Draining": "False",
        "ReplicasContested": "False",
    }
    assert plan.requeue_after_ms is None
    assert "kvasir.dev/pool=chat-decode" in plan.status["selector"]


def test_unavailable_pool_says_what_its_worker_said() -> None:
    pool = make_decode_pool()
    failed = {"exitCode": 1, "message": "starting\nerror: /model: no config.json\n"}
    status = [{"name": "decode", "state": {"terminated": failed}}]
    pod = make_pod(f"{NAME}-0", ready=False, containerStatuses=status)
    live = make_replica_set(pool, replicas=1)
    plan = plan_for(pool, live, pods=make_workers(pool, pod))
    available = condition_of(plan.status, "Available")
    assert (available["status"], available["reason"]) == ("False", "ContainerFailed")
    assert "error: /model: no config.json" in available["message"]
    assert condition_of(plan.status, "Degraded")["status"] == "True"
    assert plan.requeue_after_ms is not None


def test_refused_pods_are_a_problem() -> None:
    pool = make_decode_pool()
    live = make_replica_set(pool, replicas=1) | {"status": {}}
    warnings = {live["metadata"]["uid"]: "FailedCreate: forbidden: violates PodSecurity"}
    degraded = condition_of(plan_for(pool, live, warnings=warnings).status, "Degraded")
    assert degraded["reason"] == "PodsRefused"
    assert "violates PodSecurity" in degraded["message"]
    live = make_replica_set(pool, replicas=1)
    settled = plan_for(pool, live, warnings=warnings)
    assert condition_of(settled.status, "Degraded")["status"] == "False"


def test_name_of_a_foreign_object_is_not_taken_over() -> None:
    foreign = make_replica_set(make_decode_pool(), replicas=1)
    foreign["metadata"]["ownerReferences"] = []
    plan = plan_for(make_decode_pool(), foreign)
    assert "ReplicaSet" not in [child["kind"] for child in plan.children]
    assert condition_of(plan.status, "Degraded")["reason"] == "NameConflict"


def test_unreadable_spec_becomes_a_condition() -> None:
    plan = plan_for(make_decode_pool(future=1))
    assert plan.children == ()
    degraded = condition_of(plan.status, "Degraded")
    assert degraded["reason"] == "InvalidSpec"
    assert "future" in degraded["message"]


def test_transition_time_stays_while_the_status_stays() -> None:
    first = plan_for(make_decode_pool())
    pool = make_decode_pool() | {"status": first.status}
    later = make_plan(make_world(pool, now_ms=NOW_MS + 60_000))
    assert later.status == first.status
