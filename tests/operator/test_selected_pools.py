"""A ModelService that selects pools which stand alone: use, faults, the planner's cheapest mix."""

from dataclasses import replace
from typing import Any

import pytest
from kvasir_operator.api import ModelServiceSpec
from kvasir_operator.core.admission import references_of, review
from kvasir_operator.core.manifests import Manifest, Ref, ref_of
from kvasir_operator.core.plan import make_plan, planned_pools, service_of, with_fleet
from kvasir_operator.core.planner.facts import Speed
from kvasir_operator.core.planning import TelemetryView
from kvasir_operator.core.world import REQUEUE_UNSETTLED_MS, Plan, World
from kvasir_operator.offline import plan_offline
from operator_builders import (
    MODEL,
    child_of,
    condition_of,
    make_object,
    make_service,
    make_world,
    plan_for,
)
from planner_builders import SPEED, make_load

SECRETS = {"tlsSecret": "chat-kvasir-tls", "kvKeySecret": "chat-kvasir-kv-key"}
FAST = Speed(80.0, 20.0, 0.5, kv_tokens=500_000)


def make_pool(name: str, *, kind: str = "PrefillPool", ready: int = 2, **spec: Any) -> Manifest:
    """A pool that stands alone, of two workers."""
    pool = make_object(kind, name, {"model": MODEL, "replicas": 2, **SECRETS, **spec})
    is_true = "True" if ready else "False"
    pool["status"] = {
        "observedGeneration": 1,
        "readyReplicas": ready,
        "conditions": [
            {"type": "Available", "status": is_true},
            {"type": "Progressing", "status": "False"},
        ],
    }
    return pool


def make_selecting(*names: str, **spec: Any) -> Manifest:
    """A service that selects PrefillPools and has its own DecodePool."""
    return make_service(prefillPools=[{"name": name} for name in names], kvCache=None, **spec)


def problems_of(plan: Plan) -> list[tuple[str, str]]:
    condition = condition_of(plan.status, "Degraded")
    return [(condition["reason"], condition["message"])] if condition["status"] == "True" else []


def test_selected_pools_are_used_and_not_owned() -> None:
    service = make_selecting("a100", "l40")
    plan = plan_for(service, make_pool("a100"), make_pool("l40", ready=1))
    made = {(c["kind"], c["metadata"]["name"]) for c in plan.children}
    assert ("DecodePool", "chat-decode") in made
    assert not [name for kind, name in made if kind == "PrefillPool"]
    router = child_of(plan, "Deployment", "chat-router")
    args = router["spec"]["template"]["spec"]["containers"][0]["args"]
    workers = [args[i + 1] for i, arg in enumerate(args) if arg == "--worker"]
    hosts = ["a100", "l40", "chat-decode"]
    assert workers == [f"dns:{host}.default.svc:50051" for host in hosts]
    assert plan.status["prefill"] == {"replicas": 4, "readyReplicas": 3, "summary": "3/4"}
    assert child_of(plan, "DecodePool", "chat-decode")["spec"]["peerPool"] == "a100"
    assert plan.requeue_after_ms == REQUEUE_UNSETTLED_MS, "their changes bring no event"
    assert not problems_of(plan)


def test_one_ready_pool_of_a_role_is_enough() -> None:
    service = make_selecting("a100", "l40", decodePools=[{"name": "d"}])
    decode = make_pool("d", kind="DecodePool")
    router = {
        "kind": "Deployment",
        "metadata": {"name": "chat-router", "namespace": "default", "uid": "r", "generation": 1},
        "spec": {"replicas": 1},
        "status": {"observedGeneration": 1, "readyReplicas": 1},
    }
    half = plan_for(service, make_pool("a100", ready=0), make_pool("l40"), decode, router)
    available = condition_of(half.status, "Available")
    assert (available["status"], available["message"]) == (
        "True",
        "the router and a pool of each role are ready",
    )
    none = plan_for(service, make_pool("a100", ready=0), decode, router)
    assert condition_of(none.status, "Available")["message"].startswith(
        "not ready: PrefillPool a100, PrefillPool l40"
    )


def owned_by(pool: Manifest, name: str) -> Manifest:
    reference = {"kind": "ModelService", "name": name, "uid": f"uid-of-{name}", "controller": True}
    pool["metadata"]["ownerReferences"] = [reference]
    return pool


@pytest.mark.parametrize(
    ("pool", "reason", "message"),
    [
        (None, "PoolNotFound", "PrefillPool gpu does not exist"),
        (
            make_pool("gpu", model={**MODEL, "name": "large"}),
            "ModelMismatch",
            "PrefillPool gpu serves model large, not tiny: select another one",
        ),
        (
            make_pool("gpu", engine="vllm"),
            "ModelMismatch",
            "PrefillPool gpu runs engine vllm, not kvasir: select another one",
        ),
        (
            owned_by(make_pool("gpu"), "other"),
            "PoolTaken",
            "PrefillPool gpu takes part in ModelService other",
        ),
    ],
    ids=["missing", "other-model", "other-engine", "owned-by-another"],
)
def test_a_pool_that_cannot_be_used_is_a_condition(
    pool: Manifest | None, reason: str, message: str
) -> None:
    plan = plan_for(make_selecting("gpu"), *([pool] if pool else []))
    assert problems_of(plan) == [(reason, message)]
    assert condition_of(plan.status, "Available")["status"] == "False"


def test_a_pool_takes_part_in_the_service_that_selected_it_first() -> None:
    pool, mine = make_pool("gpu"), make_selecting("gpu")
    mine["metadata"]["creationTimestamp"] = "2026-01-02T00:00:00Z"
    other = make_object("ModelService", "other", {"prefillPools": [{"name": "gpu"}]})
    for created, problems in (
        ("2026-01-03T00:00:00Z", []),
        (
            "2026-01-01T00:00:00Z",
            [("PoolTaken", "PrefillPool gpu takes part in ModelService other")],
        ),
    ):
        other["metadata"]["creationTimestamp"] = created
        plan = plan_for(mine, pool, services=[mine, other])
        assert problems_of(plan) == problems
        router = child_of(plan, "Deployment", "chat-router")
        args = router["spec"]["template"]["spec"]["containers"][0]["args"]
        assert ("dns:gpu.default.svc:50051" in args) is not bool(problems)
        found = service_of(pool, [mine, other])
        assert found is not None
        assert found.name == ("other" if problems else "chat")
    assert service_of(pool, []) is None
    assert service_of(make_pool("else"), [mine, other]) is None


def test_an_own_pool_that_is_selected_stays() -> None:
    own = owned_by(make_pool("chat-prefill"), "chat")
    left = owned_by(make_pool("chat-decode", kind="DecodePool"), "chat")
    service = make_selecting("chat-prefill", decodePools=[{"name": "d"}])
    plan = plan_for(service, own, left, make_pool("d", kind="DecodePool"))
    assert Ref("PrefillPool", "default", "chat-prefill") not in plan.deletions
    assert Ref("DecodePool", "default", "chat-decode") in plan.deletions
    assert not problems_of(plan)


def make_planned(mode: str = "Apply", **planner: Any) -> World:
    """Dear fast workers and cheap slow ones under a load that either could serve."""
    service = make_selecting(
        "dear",
        "cheap",
        decodePools=[{"name": "prefill"}],
        planner={"mode": mode, "roleFlips": False, **planner},
        slo={"ttftMs": 4000, "tpotMs": 50},
    )
    pools = (
        make_pool("dear", price={"hourlyCents": 1000}, minReplicas=1),
        make_pool("cheap", price={"hourlyCents": 100}, minReplicas=1),
        make_pool("prefill", kind="DecodePool", price={"hourlyCents": 300}),
    )
    load = make_load(30.0)
    speeds = {"dear": FAST, "cheap": SPEED, "decode:prefill": SPEED}
    world = make_world(service, *pools)
    return with_fleet(replace(world, telemetry=TelemetryView(load, load, speeds=speeds)))


def test_the_planner_numbers_selected_pools_by_the_cheapest_mix() -> None:
    plan = make_plan(make_planned())
    pools = {pool["name"]: pool for pool in plan.status["plan"]["pools"]}
    assert set(pools) == {"dear", "cheap", "decode:prefill"}
    assert pools["cheap"]["target"] > 2, "more of the cheap ones"
    assert pools["dear"]["target"] <= 2, "not of the dear ones"
    [applied] = [c for c in plan.children if c["metadata"]["name"] == "cheap"]
    assert applied["spec"] == {"replicas": pools["cheap"]["target"]}
    assert set(applied["metadata"]) == {"name", "namespace", "resourceVersion"}
    twice = make_plan(make_planned(budget={"hourlyCents": 100_000}))
    assert twice.status["plan"]["pools"] == plan.status["plan"]["pools"]


def test_other_modes_and_pools_of_others_are_not_touched() -> None:
    names = {"dear", "cheap", "prefill"}
    recommended = make_plan(make_planned("Recommend"))
    assert not names & {c["metadata"]["name"] for c in recommended.children}
    world = make_planned()
    live = {**world.live}
    live[Ref("PrefillPool", "default", "cheap")] = owned_by(make_pool("cheap"), "other")
    plan = make_plan(with_fleet(replace(world, live=live)))
    assert "cheap" not in {pool["name"] for pool in plan.status["plan"]["pools"]}
    assert "cheap" not in {c["metadata"]["name"] for c in plan.children}


def test_without_a_pool_for_a_role_there_is_no_plan() -> None:
    world = make_planned()
    gone = Ref("DecodePool", "default", "prefill")
    live = {ref: obj for ref, obj in world.live.items() if ref != gone}
    status = make_plan(with_fleet(replace(world, live=live))).status
    assert status["plan"]["reason"] == "NoMeasurements"
    assert "a role has no pool" in status["plan"]["message"]


def test_plans_call_pools_by_names_that_differ() -> None:
    world = make_planned()
    assert planned_pools(world.obj, world.owner) == {
        "dear": "dear",
        "cheap": "cheap",
        "decode:prefill": "prefill",
    }
    own = make_service()
    assert planned_pools(own, make_world(own).owner) == {
        "prefill": "chat-prefill",
        "decode": "chat-decode",
    }


def test_the_webhook_warns_of_a_missing_pool_and_lets_a_namesake_be_selected() -> None:
    service = make_selecting("chat-prefill", "gpu")
    pool = make_pool("chat-prefill")
    assert Ref("PrefillPool", "default", "gpu") in references_of(service)
    verdict = review(service, {ref_of(pool): pool})
    assert not verdict.refusal
    assert verdict.warnings == (
        "PrefillPool gpu does not exist: nothing is served by it before it does",
    )


def test_a_file_may_hold_the_pools_that_a_service_selects() -> None:
    service = make_selecting("gpu")
    alone, together = (
        plan_offline(resources, image="kvasir:test")[0]
        for resources in ([service], [service, make_pool("gpu")])
    )
    assert alone.problems == ("PrefillPool gpu does not exist",)
    assert together.problems == ()


def test_a_service_without_templates_makes_its_own_pools() -> None:
    spec = ModelServiceSpec.model_validate({"model": MODEL})
    assert (spec.prefill, spec.decode) == (None, None)
    plan = plan_for(make_service())
    assert child_of(plan, "PrefillPool", "chat-prefill")["spec"]["replicas"] == 1


def test_a_selected_pool_must_show_the_certificate_of_its_service() -> None:
    service = make_selecting("gpu", security={"mtls": True})
    assert problems_of(plan_for(service, make_pool("gpu", tlsSecret="chat-kvasir-tls"))) == []
    for pool in (make_pool("gpu", tlsSecret="other"), make_pool("gpu", tlsSecret=None)):
        [(reason, text)] = problems_of(plan_for(service, pool))
        assert reason == "LinkMismatch"
        assert "tlsSecret must be chat-kvasir-tls" in text


@pytest.mark.parametrize(
    ("url", "is_wrong"),
    [
        ("redis://chat-redis.default.svc:6379/0", True),
        ("rediss+mtls://chat-redis.default.svc:6379/0", False),
        ("redis://elsewhere:6379/0", False),
    ],
)
def test_a_selected_pool_must_call_the_redis_of_its_service_as_it_answers(
    url: str, *, is_wrong: bool
) -> None:
    found = problems_of(plan_for(make_selecting("gpu"), make_pool("gpu", redisUrl=url)))
    assert [reason for reason, _ in found] == (["LinkMismatch"] if is_wrong else [])
    assert not is_wrong or "redisUrl must be rediss+mtls://chat-redis" in found[0][1]
