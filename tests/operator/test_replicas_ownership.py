"""Whoever sets the number of workers is not fought, and several at once are told of."""

from typing import Any

from kvasir_operator.core.manifests import FIELD_MANAGER, Manifest
from kvasir_operator.core.ownership import autoscalers_of, ownership
from operator_builders import (
    child_of,
    condition_of,
    make_decode_pool,
    make_object,
    make_service,
    plan_for,
)

OWNED = [{"uid": "uid-of-chat", "controller": True}]


def make_autoscaler(name: str, *, kind: str = "DecodePool", of: str = "chat-decode") -> Manifest:
    target = {"apiVersion": "kvasir.dev/v1alpha1", "kind": kind, "name": of}
    return {"metadata": {"name": name}, "spec": {"scaleTargetRef": target}}


def written_by(pool: Manifest, *managers: str) -> Manifest:
    """The pool, its replicas last written by these."""
    pool["metadata"]["managedFields"] = [
        {"manager": manager, "operation": "Update", "fieldsV1": {"f:spec": {"f:replicas": {}}}}
        for manager in managers
    ]
    return pool


def planned_replicas(pool: Manifest, **template: Any) -> int | None:
    """What the ModelService applies as `replicas` of this live pool."""
    pool["metadata"]["ownerReferences"] = OWNED
    plan = plan_for(make_service(decode=template), pool)
    replicas: int | None = child_of(plan, "DecodePool", "chat-decode")["spec"].get("replicas")
    return replicas


def test_number_of_an_autoscaler_is_left_out_of_what_is_applied() -> None:
    pool = written_by(make_decode_pool(replicas=4), "kube-controller-manager")
    assert planned_replicas(pool, replicas=1) is None


def test_number_that_the_operator_wrote_is_applied_again() -> None:
    assert planned_replicas(written_by(make_decode_pool(replicas=4), FIELD_MANAGER)) == 4


def test_bounds_of_the_template_count_more_than_the_owner() -> None:
    pool = written_by(make_decode_pool(replicas=9), "kubectl")
    assert planned_replicas(pool, maxReplicas=4) == 4


def test_owner_is_shown() -> None:
    pool = written_by(make_decode_pool(replicas=2), "kubectl")
    assert plan_for(pool).status["replicasOwner"] == "kubectl"
    scaled = plan_for(pool, autoscalers=[make_autoscaler("cpu")])
    assert scaled.status["replicasOwner"] == "HorizontalPodAutoscaler cpu"
    assert condition_of(scaled.status, "ReplicasContested")["status"] == "False"
    assert "replicasOwner" not in plan_for(make_decode_pool()).status


def test_two_autoscalers_of_one_pool_are_a_condition() -> None:
    rivals = [make_autoscaler("b"), make_autoscaler("a"), make_autoscaler("c", of="other")]
    contested = condition_of(
        plan_for(make_decode_pool(), autoscalers=rivals).status, "ReplicasContested"
    )
    assert (contested["status"], contested["reason"]) == ("True", "SeveralOwners")
    assert "HorizontalPodAutoscaler a and HorizontalPodAutoscaler b" in contested["message"]


def test_an_autoscaler_of_the_pods_below_counts_as_well() -> None:
    pool = make_decode_pool()
    below = make_autoscaler("low", kind="ReplicaSet", of="chat-decode-0a7a4e38")
    assert autoscalers_of(pool, [below, make_autoscaler("top")]) == ["low", "top"]
    assert len(ownership(pool, [below, make_autoscaler("top")]).rivals) == 2
    nodes = make_object("KVCachePool", "chat-kv", {})
    assert autoscalers_of(nodes, [make_autoscaler("x", kind="StatefulSet", of="chat-kv")]) == ["x"]
