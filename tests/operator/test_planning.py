"""The planner in the cluster: modes, status.plan, who owns replicas, writes."""

from dataclasses import replace
from typing import Any

import pytest
from kvasir_operator.api import ModelServiceSpec
from kvasir_operator.core.manifests import Manifest
from kvasir_operator.core.plan import make_plan, with_fleet
from kvasir_operator.core.planner.facts import Load, Observed, Role, Speed
from kvasir_operator.core.planning import TelemetryView, coarse
from kvasir_operator.core.world import Plan, World
from operator_builders import (
    NOW_MS,
    child_of,
    condition_of,
    make_object,
    make_service,
    make_world,
)
from planner_builders import SPEED, make_load

OWNED = [{"uid": "uid-of-chat", "controller": True}]
SPEEDS = dict.fromkeys(Role, SPEED)


def make_pool(part: str, *, manager: str = "", **spec: Any) -> Manifest:
    """A pool of ModelService `chat` with two workers."""
    kind = {"prefill": "PrefillPool", "decode": "DecodePool"}[part]
    metadata: dict[str, Any] = {"ownerReferences": OWNED}
    if manager:
        fields = {"f:spec": {"f:replicas": {}}}
        metadata["managedFields"] = [
            {"manager": manager, "operation": "Update", "fieldsV1": fields, "subresource": "scale"}
        ]
    return make_object(kind, f"chat-{part}", {"replicas": 2, **spec}, **metadata)


def make_planned_world(
    mode: str = "Apply",
    *,
    view: TelemetryView | None = None,
    load: Load | None = None,
    prefill: Manifest | None = None,
    **planner: Any,
) -> World:
    """A service with a planner whose telemetry is known."""
    load = load or make_load(12.0)
    view = view or TelemetryView(now=load, kept=load, speeds=SPEEDS)
    service = make_service(
        planner={"mode": mode, "roleFlips": False, **planner}, slo={"ttftMs": 2000, "tpotMs": 50}
    )
    world = make_world(service, prefill or make_pool("prefill"), make_pool("decode"))
    return with_fleet(replace(world, telemetry=view))


def replicas(plan: Plan, part: str) -> int | None:
    """`replicas` as applied to a pool."""
    kind = {"prefill": "PrefillPool", "decode": "DecodePool"}[part]
    found: int | None = child_of(plan, kind, f"chat-{part}")["spec"].get("replicas")
    return found


def test_apply_sets_what_the_load_needs() -> None:
    plan = make_plan(make_planned_world())
    status = plan.status["plan"]
    targets = {pool["name"]: pool["target"] for pool in status["pools"]}
    assert targets["prefill"] > 2
    assert replicas(plan, "prefill") == targets["prefill"]
    assert status["reason"] == "Growing"
    assert status["predicted"]["ttftMs"] <= 2000
    assert "ttftMs" not in status["present"]
    assert status["scaledAt"] == status["madeAt"]
    assert condition_of(plan.status, "PlanApplied")["status"] == "True"


@pytest.mark.parametrize("mode", ["Observe", "Recommend"])
def test_other_modes_change_no_pool(mode: str) -> None:
    plan = make_plan(make_planned_world(mode))
    status = plan.status["plan"]
    targets = {pool["name"]: pool["target"] for pool in status["pools"]}
    assert replicas(plan, "prefill") == 2
    assert "scaledAt" not in status
    assert (targets["prefill"] > 2) == (mode == "Recommend")
    condition = condition_of(plan.status, "PlanApplied")
    assert condition["status"] == "False"
    assert ("prefill 2 ->" in condition["message"]) == (mode == "Recommend")


def test_without_measurements_nothing_is_planned() -> None:
    for view, words in (
        (TelemetryView(problem="no router is ready"), "no router is ready"),
        (TelemetryView(now=make_load(1.0)), "has measured its speed"),
    ):
        plan = make_plan(make_planned_world(view=view))
        assert plan.status["plan"]["reason"] == "NoMeasurements"
        assert words in plan.status["plan"]["message"]
        assert replicas(plan, "prefill") == 2


def test_assumed_profile_serves_until_one_is_measured() -> None:
    profile = {
        "prefillUsPerToken": 160,
        "decodeBaseUs": 20_000,
        "decodeUsPerRequest": 500,
        "kvTokens": 500_000,
    }
    view = TelemetryView(now=make_load(12.0))
    plan = make_plan(make_planned_world(view=view, assumedProfile=profile))
    assert plan.status["plan"]["reason"] == "Growing"


def test_person_is_overruled_and_autoscaler_is_not() -> None:
    by_hand = make_plan(make_planned_world(prefill=make_pool("prefill", manager="kubectl")))
    assert (replicas(by_hand, "prefill") or 0) > 2
    scaled = make_pool("prefill", manager="kube-controller-manager")
    plan = make_plan(make_planned_world(prefill=scaled))
    assert replicas(plan, "prefill") is None
    pools = {pool["name"]: pool["target"] for pool in plan.status["plan"]["pools"]}
    assert pools["prefill"] == 2


def test_lent_workers_are_set_only_where_flips_are_allowed() -> None:
    def lent(**planner: Any) -> object:
        load = Load(make_load(9.0).prefill, make_load(1.0).decode)
        world = make_planned_world(
            view=TelemetryView(now=load, kept=None, speeds=SPEEDS),
            prefill=make_pool("prefill", replicas=3),
            **planner,
        )
        decode = child_of(make_plan(world), "DecodePool", "chat-decode")
        return decode["spec"].get("lentReplicas")

    assert lent(roleFlips=False) is None
    assert lent(roleFlips=True) == 1


def settled_status(world: World) -> World:
    """The world after its plan has been carried out and its status written."""
    plan = make_plan(world)
    live = dict(world.live)
    for child in plan.children:
        for ref, pool in world.live.items():
            if pool["kind"] == child["kind"] and "replicas" in child["spec"]:
                live[ref] = {**pool, "spec": {**pool["spec"], **child["spec"]}}
    return replace(world, obj={**world.obj, "status": plan.status}, live=live, fleet=None)


def test_same_load_writes_the_status_once() -> None:
    first = settled_status(make_planned_world())
    second = settled_status(with_fleet(replace(first, now_ms=NOW_MS + 15_000)))
    assert second.obj["status"]["plan"]["reason"] == "Steady"
    for seconds in (30, 45, 600):
        again = make_plan(with_fleet(replace(second, now_ms=NOW_MS + 1000 * seconds)))
        assert again.status == second.obj["status"]


def test_noise_in_figures_writes_at_most_once_a_minute() -> None:
    first = settled_status(settled_status_world())
    noisy = TelemetryView(now=make_load(12.2), kept=None, speeds=SPEEDS, observed=Observed(1.0))
    soon = with_fleet(replace(first, telemetry=noisy, now_ms=NOW_MS + 30_000))
    later = with_fleet(replace(first, telemetry=noisy, now_ms=NOW_MS + 61_000))
    assert make_plan(soon).status["plan"] == first.obj["status"]["plan"]
    assert make_plan(later).status["plan"]["inputs"]["now"]["requestsPerMinute"] == 730


def settled_status_world() -> World:
    """A service whose plan is steady."""
    grown = settled_status(make_planned_world(view=TelemetryView(make_load(12.0), speeds=SPEEDS)))
    return with_fleet(grown)


def test_service_without_a_planner_has_no_plan() -> None:
    world = with_fleet(make_world(make_service(), make_pool("prefill"), make_pool("decode")))
    plan = make_plan(world)
    assert "plan" not in plan.status
    assert replicas(plan, "prefill") == 2
    assert ModelServiceSpec.model_validate(make_service()["spec"]).planner is None


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (7, 7), (1234, 1200), (0.4, 0)])
def test_figures_are_rounded(value: float, expected: int) -> None:
    assert coarse(value) == expected


def test_budget_is_named_when_it_binds() -> None:
    plan = make_plan(make_planned_world(budget={"replicas": 4}))
    status = plan.status["plan"]
    assert status["reason"] == "Limited"
    assert "4 allowed" in status["rejected"][0]["why"]
    assert 2 <= sum(pool["target"] for pool in status["pools"]) <= 4


def test_accelerators_and_prices_come_from_the_template() -> None:
    speed = Speed(160.0, 20.0, 0.5, 500_000)
    view = TelemetryView(now=make_load(1.0), speeds=dict.fromkeys(Role, speed))
    template = {
        "price": {"hourlyCents": 250, "watts": 400},
        "resources": {"limits": {"nvidia.com/gpu": "2"}},
    }
    service = make_service(planner={"mode": "Recommend"}, prefill=template)
    world = make_world(service, make_pool("prefill"), make_pool("decode"))
    plan = make_plan(with_fleet(replace(world, telemetry=view)))
    present = plan.status["plan"]["present"]
    assert (present["hourlyCents"], present["watts"], present["accelerators"]) == (500, 800, 4)
    assert "price" not in child_of(plan, "PrefillPool", "chat-prefill")["spec"]
