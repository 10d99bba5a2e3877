"""Plans of ModelServices: parts, pools that keep their replicas, status in one place."""

from typing import Any

import pytest
from kvasir_operator.core.manifests import Manifest, Ref, ref_of
from kvasir_operator.core.service import service_children
from operator_builders import (
    MODEL,
    child_of,
    condition_of,
    make_object,
    make_service,
    make_stateful_set,
    make_world,
    plan_for,
)

OWNED = [{"uid": "uid-of-chat", "controller": True}]


def make_pool(kind: str, name: str, *, available: bool = True, **spec: Any) -> Manifest:
    """A settled pool that belongs to ModelService `chat`."""
    pool = make_object(kind, name, {"replicas": 1, **spec}, ownerReferences=OWNED)
    state = "True" if available else "False"
    pool["status"] = {
        "observedGeneration": 1,
        "readyReplicas": 1,
        "conditions": [
            {"type": "Available", "status": state},
            {"type": "Progressing", "status": "False"},
        ],
    }
    return pool


def make_router(*, ready: int = 1) -> Manifest:
    """The router's Deployment, settled."""
    router = make_stateful_set("chat-router", replicas=1, ready=ready)
    router["kind"] = "Deployment"
    router["metadata"]["ownerReferences"] = OWNED
    return router


def settled() -> list[Manifest]:
    """All parts of the service, ready."""
    return [
        make_router(),
        make_pool("PrefillPool", "chat-prefill"),
        make_pool("DecodePool", "chat-decode"),
        make_pool("KVCachePool", "chat-kv"),
    ]


def test_service_makes_router_redis_and_pools() -> None:
    plan = plan_for(make_service())
    made = [(child["kind"], child["metadata"]["name"]) for child in plan.children]
    assert made == [
        ("ServiceAccount", "chat"),
        ("Deployment", "chat-redis"),
        ("Service", "chat-redis"),
        ("NetworkPolicy", "chat-redis"),
        ("PrefillPool", "chat-prefill"),
        ("DecodePool", "chat-decode"),
        ("KVCachePool", "chat-kv"),
        ("PodDisruptionBudget", "chat-router"),
        ("Deployment", "chat-router"),
        ("Service", "chat-router"),
        ("Service", "chat-router-peers"),
    ]
    for child in plan.children:
        [owner] = child["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"]) == ("uid-of-chat", True)


def test_parts_find_one_another() -> None:
    plan = plan_for(make_service())
    decode = child_of(plan, "DecodePool", "chat-decode")["spec"]
    assert decode["kvNodes"] == ["dns:chat-kv.default.svc:50051"]
    assert decode["redisUrl"] == "rediss+mtls://chat-redis.default.svc:6379/0"
    pod = child_of(plan, "Deployment", "chat-router")["spec"]["template"]["spec"]
    args = " ".join(pod["containers"][0]["args"])
    assert "--worker dns:chat-prefill.default.svc:50051" in args
    assert "--worker dns:chat-decode.default.svc:50051" in args
    assert "--kv-node dns:chat-kv.default.svc:50051" in args
    assert "--peer dns:chat-router-peers.default.svc:50054" in args
    assert plan.status["endpoint"] == "http://chat-router.default.svc:8000/v1"


def test_routers_may_watch_kv_nodes_behind_their_network_policy() -> None:
    router = child_of(plan_for(make_service()), "Deployment", "chat-router")
    labels = router["spec"]["template"]["metadata"]["labels"]
    pool = make_object("KVCachePool", "chat-kv", {"networkPolicy": True})
    policy = child_of(plan_for(pool), "NetworkPolicy", "chat-kv")
    [rule] = [
        r for r in policy["spec"]["ingress"] if {"port": "grpc", "protocol": "TCP"} in r["ports"]
    ]
    admitted = [peer["podSelector"]["matchLabels"] for peer in rule["from"]]
    assert any(wanted.items() <= labels.items() for wanted in admitted)


def test_without_kv_nodes_there_is_no_redis() -> None:
    service = make_service()
    del service["spec"]["kvCache"]
    plan = plan_for(service)
    names = {child["metadata"]["name"] for child in plan.children}
    assert not names & {"chat-kv", "chat-redis"}
    assert "redisUrl" not in child_of(plan, "DecodePool", "chat-decode")["spec"]
    router = child_of(plan, "Deployment", "chat-router")["spec"]["template"]["spec"]
    assert "--kv-node" not in router["containers"][0]["args"]


def test_external_redis_replaces_the_own_one() -> None:
    plan = plan_for(make_service(redis={"url": "redis://elsewhere:6379/1"}))
    assert "chat-redis" not in {child["metadata"]["name"] for child in plan.children}
    pool = child_of(plan, "KVCachePool", "chat-kv")
    assert pool["spec"]["redisUrl"] == "redis://elsewhere:6379/1"


def test_parts_that_are_no_longer_wanted_are_deleted_if_they_are_ours() -> None:
    service = make_service()
    del service["spec"]["kvCache"]
    foreign = make_stateful_set("chat-redis", replicas=1)
    foreign["kind"] = "Service"
    plan = plan_for(service, *settled(), foreign)
    assert plan.deletions == (Ref("KVCachePool", "default", "chat-kv"),)


REPLICAS = {
    "a new pool starts with the template's": (None, {"replicas": 3}, 3),
    "a scaled pool keeps its own": (5, {"replicas": 3}, 5),
    "a new lower bound lifts it": (1, {"replicas": 3, "minReplicas": 2}, 2),
    "a new upper bound lowers it": (9, {"replicas": 3, "maxReplicas": 4}, 4),
}


@pytest.mark.parametrize(("live", "template", "expected"), REPLICAS.values(), ids=REPLICAS)
def test_replicas_of_a_pool(live: int | None, template: Manifest, expected: int) -> None:
    pools = [] if live is None else [make_pool("DecodePool", "chat-decode", replicas=live)]
    pool = child_of(plan_for(make_service(decode=template), *pools), "DecodePool", "chat-decode")
    assert pool["spec"]["replicas"] == expected
    assert ("resourceVersion" in pool["metadata"]) == (live is not None)


def test_available_when_router_and_pools_are() -> None:
    plan = plan_for(make_service(), *settled())
    states = {c["type"]: c["status"] for c in plan.status["conditions"]}
    assert states == {"Available": "True", "Progressing": "False", "Degraded": "False"}
    assert plan.status["decode"] == {"replicas": 1, "readyReplicas": 1, "summary": "1/1"}
    assert plan.requeue_after_ms is None


def test_not_available_without_a_ready_router() -> None:
    parts = settled()
    parts[0] = make_router(ready=0)
    available = condition_of(plan_for(make_service(), *parts).status, "Available")
    assert (available["status"], available["reason"]) == ("False", "RouterNotReady")


def test_not_available_while_a_pool_is_not() -> None:
    parts = settled()
    parts[2] = make_pool("DecodePool", "chat-decode", available=False)
    available = condition_of(plan_for(make_service(), *parts).status, "Available")
    assert available["reason"] == "PoolsNotReady"
    assert "chat-decode" in available["message"]


def test_problem_of_a_pool_shows_in_the_service() -> None:
    parts = settled()
    parts[1]["status"]["conditions"].append(
        {
            "type": "Degraded",
            "status": "True",
            "reason": "ModelUnavailable",
            "message": "pod chat-prefill-0: no such folder",
        }
    )
    degraded = condition_of(plan_for(make_service(), *parts).status, "Degraded")
    assert degraded["reason"] == "ModelUnavailable"
    assert degraded["message"].endswith("pod chat-prefill-0: no such folder")


def test_router_whose_pods_are_refused_is_a_problem() -> None:
    router = make_router(ready=0)
    router["status"] = {"conditions": [{"type": "ReplicaFailure", "message": "exceeded quota"}]}
    degraded = condition_of(plan_for(make_service(), router).status, "Degraded")
    assert degraded["reason"] == "PodsRefused"
    assert "exceeded quota" in degraded["message"]


def test_router_copies_no_weights() -> None:
    model = {"name": "tiny", "source": {"image": {"reference": "models:1"}}}
    plan = plan_for(make_service(model=model))
    pod = child_of(plan, "Deployment", "chat-router")["spec"]["template"]["spec"]
    assert "*.safetensors" in pod["initContainers"][0]["command"][2]
    assert MODEL["name"] == "tiny"


def test_every_child_is_one_that_is_observed() -> None:
    """A child that is never read would be applied in every reconcile."""
    plan = plan_for(make_service())
    observed = service_children(make_world(make_service()).owner)
    assert {ref_of(child) for child in plan.children} <= set(observed)
