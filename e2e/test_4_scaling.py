"""Pools grow and shrink under load, by hand and by an autoscaler, and no request fails."""

import json
import re
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from e2e_clients import UNCACHED, Clients
from e2e_cluster import (
    DECODE,
    DRAINS,
    KINDS,
    PREFILL,
    SERVICE,
    apply_taken_name,
    operator_metric,
    patch,
    pod_uids,
    wait_for_ready,
    wait_until_observed,
    wait_until_settled,
)
from e2e_shell import Kubectl, followed_log, metric, port_forward, say, wait_for

DRAINED = "drained: 0 requests"
AUTOSCALER = """
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {name: %s}
spec:
  scaleTargetRef: {apiVersion: kvasir.dev/v1alpha1, kind: DecodePool, name: smollm2-decode}
  minReplicas: 3
  maxReplicas: 3
  metrics:
  - type: Resource
    resource: {name: cpu, target: {type: Utilization, averageUtilization: 80}}
"""


@pytest.mark.timeout(300)
def test_bad_change_is_refused(kubectl: Kubectl) -> None:
    other = {"spec": {"model": {"name": "other"}}}
    answer = patch(kubectl, SERVICE, other, expect_failure=True)
    assert "model cannot be changed" in answer
    answer = kubectl("scale", DECODE, "--replicas=9", expect_failure=True)
    assert "replicas must not be greater than maxReplicas" in answer


@pytest.mark.timeout(300)
def test_webhook_judges_what_a_resource_refers_to(kubectl: Kubectl) -> None:
    answer = wait_for("a refusal", partial(apply_taken_name, kubectl), limit_s=60)
    assert "Service smollm2-prefill" in answer
    assert "does not belong to DecodePool smollm2-prefill: choose another name" in answer
    service = {
        "apiVersion": "kvasir.dev/v1alpha1",
        "kind": "ModelService",
        "metadata": {"name": "other"},
        "spec": {"model": {"name": "other", "source": {"pvc": {"claimName": "nowhere"}}}},
    }
    command = ("apply", "--dry-run=server", "--warnings-as-errors", "-f", "-")
    warning = "PersistentVolumeClaim nowhere does not exist: no pod starts before it does"
    wait_for(
        "a warning",
        lambda: warning in kubectl(*command, stdin=json.dumps(service), expect_failure=True),
        limit_s=60,
    )


@pytest.mark.timeout(600)
def test_scale_in_drains_under_load(kubectl: Kubectl, operator: Kubectl, tmp_path: Path) -> None:
    """What is asserted lasts: a drain may be over before anybody sees the condition Draining."""
    drained = operator_metric(operator, DRAINS, outcome="drained")
    clients = Clients(kubectl, num_clients=6, max_tokens=160, ignore_eos=True)
    with clients as load, ExitStack() as stack:
        pods = wait_for_ready(kubectl, "decode", 2)
        logs = {pod: stack.enter_context(followed_log(kubectl, pod, tmp_path)) for pod in pods}
        urls = [stack.enter_context(port_forward(kubectl, f"pod/{pod}", 8080)) for pod in pods]
        wait_for(
            "requests on both decode workers",
            lambda: all(metric(url, "kvasir_worker_running") >= 1 for url in urls),
            limit_s=90,
        )
        kubectl("scale", DECODE, "--replicas=1")
        left = wait_for_ready(kubectl, "decode", 1)
        wait_for("answers after the removal", load.has_done(2), limit_s=180)
        [gone] = set(pods) - set(left)
        said = logs[gone].read_text
        wait_for(f"{gone} to say that it drained", lambda: DRAINED in said(), limit_s=60)
    assert load.failures == []
    words = said()
    begun = re.search(r"draining: (\d+) requests in flight", words)
    assert begun, f"{gone} did not drain: {words[-2000:]}"
    assert int(begun[1]) >= 1, f"{gone} had nothing to drain: {words[-2000:]}"
    say(f"{gone} finished {begun[1]} requests before it went")
    wait_for(
        "the drain in the operator's metrics",
        lambda: operator_metric(operator, DRAINS, outcome="drained") == drained + 1,
        limit_s=60,
    )
    assert kubectl.json(DECODE)["spec"]["replicas"] == 1
    described = partial(kubectl, "describe", DECODE, quiet=True)
    wait_for("the event WorkerDrained", lambda: "WorkerDrained" in described(), limit_s=60)


@pytest.mark.timeout(600)
def test_scale_out_under_load(kubectl: Kubectl) -> None:
    with Clients(kubectl, num_clients=2) as load:
        kubectl("scale", DECODE, "--replicas=2")
        wait_for_ready(kubectl, "decode", 2)
        wait_until_settled(kubectl)
        wait_for("answers of more workers", load.has_done(4), limit_s=180)
    assert load.failures == []
    kubectl("get", KINDS)


@pytest.mark.timeout(600)
def test_autoscaler_owns_the_replicas(kubectl: Kubectl) -> None:
    """An autoscaler keeps to its bounds without metrics; the template's replicas stay at 2."""
    kubectl("apply", "-f", "-", stdin=AUTOSCALER % "one")
    wait_for_ready(kubectl, "decode", 3)
    patch(kubectl, SERVICE, {"spec": {"slo": {"tpotMs": 110}}})  # the service is reconciled again
    wait_until_settled(kubectl)
    owner = "HorizontalPodAutoscaler one"
    wait_for("its owner in the status", lambda: _replicas_owner(kubectl) == owner, limit_s=90)
    assert kubectl.json(DECODE)["spec"]["replicas"] == 3
    kubectl("apply", "-f", "-", stdin=AUTOSCALER % "two")
    kubectl("wait", "--for=condition=ReplicasContested", DECODE, "--timeout=180s", limit_s=190)
    kubectl("get", "hpa,dcp")
    kubectl.delete("hpa", "one", "two")
    wait_for("nobody to raise it again", partial(_keeps_two, kubectl), limit_s=240)
    wait_for_ready(kubectl, "decode", 2)
    wait_until_settled(kubectl)


def _replicas_owner(kubectl: Kubectl) -> str:
    return str(kubectl.json(DECODE)["status"].get("replicasOwner", ""))


def _keeps_two(kubectl: Kubectl) -> bool:
    """Ask for 2 until no autoscaler owns them: its controller hears late that it is deleted."""
    if kubectl.json(DECODE)["spec"]["replicas"] != 2:
        kubectl("scale", DECODE, "--replicas=2")
        return False
    return "Autoscaler" not in _replicas_owner(kubectl)


@pytest.mark.timeout(600)
def test_worker_changes_its_role_and_back(kubectl: Kubectl) -> None:
    """Under load, without a restart, and no request fails."""
    before = pod_uids(kubectl, "prefill", "decode")
    with Clients(kubectl, num_clients=3, system=UNCACHED) as load:
        wait_for("answers before", load.has_done(3), limit_s=180)
        for num_lent in (1, 0):
            patch(kubectl, DECODE, {"spec": {"lentReplicas": num_lent}})
            what = f"{num_lent} decode workers to serve as prefill workers"
            wait_for(what, partial(_has_lent, kubectl, num_lent), limit_s=180)
            wait_for("answers afterwards", load.has_done(4), limit_s=180)
    assert load.failures == []
    assert pod_uids(kubectl, "prefill", "decode") == before
    wait_until_settled(kubectl)


def _has_lent(kubectl: Kubectl, number: int) -> bool:
    """Whether exactly so many workers of the decode pool are in the other role, and serve."""
    status = kubectl.json(DECODE)["status"]
    flips = len(status.get("roleFlips", ()))
    return bool(status.get("lentReplicas", 0) == flips == number)


@pytest.mark.timeout(600)
def test_planner_recommends_then_applies(kubectl: Kubectl) -> None:
    """How many workers it wants depends on the machine; what is promised is that they come."""
    planner = {"intervalSeconds": 2, "keepWindowSeconds": 20, "shrinkDwellSeconds": 10}
    with Clients(kubectl, num_clients=2, system=UNCACHED) as load:
        patch(kubectl, SERVICE, {"spec": {"planner": {"mode": "Recommend", **planner}}})
        wait_for("a plan from measurements", partial(_has_plan, kubectl), limit_s=240)
        kubectl("get", SERVICE, "-o", "jsonpath={.status.plan}")
        assert _replicas(kubectl) == {"prefill": 2, "decode": 2}
        with Clients(kubectl, num_clients=4, system=UNCACHED) as step:
            patch(kubectl, SERVICE, {"spec": {"planner": {"mode": "Apply"}}})
            wait_for("the plan to be applied", partial(_is_planned, kubectl), limit_s=240)
            wait_for("answers under the load step", step.has_done(4), limit_s=180)
        kubectl("get", SERVICE, "-o", "jsonpath={.status.plan}")
        patch(kubectl, SERVICE, {"spec": {"planner": None}})
        wait_until_observed(kubectl, SERVICE)  # a plan on its way would undo what follows
        for pool in (PREFILL, DECODE):
            patch(kubectl, pool, {"spec": {"lentReplicas": 0}})
            kubectl("scale", pool, "--replicas=2")
        for role in ("prefill", "decode"):
            wait_for_ready(kubectl, role, 2)
    assert load.failures == []
    assert step.failures == []
    wait_until_settled(kubectl)


def _has_plan(kubectl: Kubectl) -> bool:
    plan = kubectl.json(SERVICE)["status"].get("plan", {})
    return plan.get("reason", "NoMeasurements") != "NoMeasurements" and bool(plan.get("pools"))


def _is_planned(kubectl: Kubectl) -> bool:
    """Whether a plan of mode Apply is in the pools."""
    plan = kubectl.json(SERVICE)["status"].get("plan", {})
    wanted = {pool["name"]: pool["target"] for pool in plan.get("pools", ())}
    return plan.get("mode") == "Apply" and wanted == _replicas(kubectl)


def _replicas(kubectl: Kubectl) -> dict[str, int]:
    pools = {"prefill": PREFILL, "decode": DECODE}
    return {name: kubectl.json(pool)["spec"]["replicas"] for name, pool in pools.items()}
