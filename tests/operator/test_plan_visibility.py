"""What one sees of plans: events, since when the fleet differs, metrics, the live loop in Apply."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from kvasir_operator import metrics
from kvasir_operator.core.events import events_between
from kvasir_operator.core.manifests import Manifest, Ref
from kvasir_operator.core.plan import make_plan, with_fleet
from kvasir_operator.core.planner.facts import Load, Role
from kvasir_operator.core.planning import TelemetryView, time_text
from kvasir_operator.core.world import World
from kvasir_operator.plan_metrics import PlanMetrics
from kvasir_operator.reconcile import Reconciler
from kvasir_operator.roles import RoleSetter
from kvasir_operator.routers import Routers
from kvasir_operator.secrets import SecretKeeper
from operator_builders import NOW_MS, FakeCluster, make_channels, make_service
from planner_builders import SPEED, make_load
from test_planning import make_planned_world
from test_reconcile import FakeDrainer

CHAT = Ref("ModelService", "default", "chat")
POOLS = (Ref("PrefillPool", "default", "chat-prefill"), Ref("DecodePool", "default", "chat-decode"))


def later(world: World, *, seconds: int, pools: dict[str, Manifest] | None = None) -> World:
    """The same service with the status of its last plan, some time after it."""
    obj = {**world.obj, "status": make_plan(world).status}
    live = {**world.live}
    for ref, obj_ in list(live.items()):
        if pools and ref.name in pools:
            live[ref] = {**obj_, **pools[ref.name]}
    moved = replace(world, obj=obj, live=live, now_ms=world.now_ms + 1000 * seconds, fleet=None)
    return with_fleet(moved)


def grown(world: World, *, ready: bool) -> dict[str, Manifest]:
    """The pools as the plan wants them."""
    assert world.fleet is not None
    found = {}
    for key, target in world.fleet.targets.items():
        spec = {"replicas": target.replicas}
        found[f"chat-{key}"] = {
            "spec": spec,
            "status": {"readyReplicas": target.replicas if ready else 1},
        }
    return found


def plan_of(world: World) -> Manifest:
    plan: Manifest = make_plan(world).status["plan"]
    return plan


def test_a_fleet_differs_until_its_workers_are_ready() -> None:
    first = make_planned_world()
    assert plan_of(first)["differsSince"] == time_text(NOW_MS)
    starting = later(first, seconds=60, pools=grown(first, ready=False))
    assert plan_of(starting)["differsSince"] == time_text(NOW_MS)
    done = later(starting, seconds=60, pools=grown(first, ready=True))
    assert "differsSince" not in plan_of(done)


def test_a_recommendation_differs_until_somebody_carries_it_out() -> None:
    world = make_planned_world("Recommend")
    still = later(world, seconds=3600)
    assert plan_of(still)["differsSince"] == time_text(NOW_MS)
    targets = {p["name"]: p["target"] for p in plan_of(world)["pools"]}
    scaled = {f"chat-{k}": {"spec": {"replicas": n}} for k, n in targets.items()}
    assert "differsSince" not in plan_of(later(still, seconds=60, pools=scaled))


def test_observing_promises_nothing() -> None:
    assert "differsSince" not in plan_of(make_planned_world("Observe"))


def make_plan_status(mode: str = "Apply", *, target: int = 5, **fields: object) -> Manifest:
    pool = {"name": "prefill", "replicas": 2, "lent": 0, "target": target, "targetLent": 1}
    return {"plan": {"mode": mode, "message": "more load", "pools": [pool], **fields}}


def told(before: Manifest, after: Manifest) -> list[tuple[str, str, bool]]:
    return [(e.reason, e.message, e.is_warning) for e in events_between(before, after)]


def test_plans_are_told_once_for_each_change() -> None:
    text = "prefill 2 -> 5, lent by prefill 0 -> 1: more load"
    applied = make_plan_status(scaledAt="2026-01-01T00:00:00Z")
    assert told({}, applied) == [("PlanApplied", text, False)]
    assert told(applied, applied) == []
    recommended = make_plan_status("Recommend")
    assert told({}, recommended) == [("PlanRecommended", text, False)]
    assert told(recommended, recommended) == []
    assert told(recommended, make_plan_status("Recommend", target=6))[0][0] == "PlanRecommended"


def test_what_a_plan_was_denied_is_a_warning_once() -> None:
    denied = {"rejected": [{"what": "more workers", "why": "the budget has 4"}]}
    before, after = make_plan_status("Observe"), make_plan_status("Observe", **denied)
    before["plan"]["pools"] = after["plan"]["pools"] = []
    assert told(before, after) == [("PlanRejected", "more workers: the budget has 4", True)]
    denied["rejected"][0]["why"] = "the budget has 5"
    again = make_plan_status("Observe", **denied)
    again["plan"]["pools"] = []
    assert told(after, again) == []


@pytest.fixture
def plan_metrics() -> Iterator[PlanMetrics]:
    made = PlanMetrics()
    yield made
    made.forget(CHAT)


def sample(name: str, **labels: str) -> float | None:
    every = {"service_namespace": "default", "service_name": "chat", **labels}
    return metrics.REGISTRY.get_sample_value(f"kvasir_operator_plan_{name}", every)


def test_metrics_follow_the_plan_and_go_with_it(plan_metrics: PlanMetrics) -> None:
    plan = make_plan_status(differsSince="2026-01-01T00:00:00Z", scaledAt="a", flippedAt="b")
    flips = sample("changes_total", change="flips") or 0.0
    plan_metrics.note(CHAT, {}, plan["plan"])
    plan_metrics.note(CHAT, plan["plan"], plan["plan"])
    assert sample("differs_since_seconds", mode="Apply") == 1_767_225_600
    assert sample("changes_total", change="flips") == flips + 1
    plan_metrics.note(CHAT, {}, make_plan_status("Recommend")["plan"])
    assert sample("differs_since_seconds", mode="Apply") is None
    assert sample("differs_since_seconds", mode="Recommend") == 0
    plan_metrics.note(CHAT, {}, {})
    assert sample("differs_since_seconds", mode="Recommend") is None


class FakeCollector:
    """A load that the test sets."""

    def __init__(self) -> None:
        self.load: Load = make_load(2.0)

    async def view(self, service: Ref, pods: object, **settings: object) -> TelemetryView:
        """See Collector."""
        assert service == CHAT
        return TelemetryView(now=self.load, kept=self.load, speeds=dict.fromkeys(Role, SPEED))


async def test_the_live_planner_follows_a_step_of_the_load_and_writes_nothing_after() -> None:
    cluster, collector = FakeCluster(), FakeCollector()
    planner = {"mode": "Apply", "roleFlips": False}
    cluster.add(make_service(planner=planner, kvCache=None, slo={"ttftMs": 2000, "tpotMs": 50}))
    setter = RoleSetter(make_channels(), on_progress=lambda _: None)
    reconciler = Reconciler(
        cluster,
        FakeDrainer(),
        setter,
        Routers(make_channels()),
        collector,  # type: ignore[arg-type]
        SecretKeeper(cluster),
        default_image="kvasir:test",
    )

    async def settled() -> list[int]:
        for _ in range(3):
            await reconciler.reconcile(CHAT)
        for ref in POOLS:
            pool = cluster.objects[ref]
            pool["status"] = {"readyReplicas": pool["spec"]["replicas"]}
        await reconciler.reconcile(CHAT)
        return [cluster.objects[ref]["spec"]["replicas"] for ref in POOLS]

    small = await settled()
    collector.load = make_load(24.0)
    large = await settled()
    assert all(b > a for a, b in zip(small, large, strict=True))
    plan = cluster.objects[CHAT]["status"]["plan"]
    assert [pool["target"] for pool in plan["pools"]] == large
    assert "differsSince" not in plan
    reasons = [
        event["reason"] for event in cluster.told if event["involvedObject"]["name"] == "chat"
    ]
    assert reasons.count("PlanApplied") >= 1
    cluster.writes.clear()
    await reconciler.reconcile(CHAT)
    assert cluster.writes == []
