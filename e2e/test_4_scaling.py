"""Pools grow and shrink under load, by hand and by an autoscaler, and no request fails."""

import re
from contextlib import ExitStack
from pathlib import Path

import pytest
from e2e_chat import chat, tell
from e2e_clients import Clients
from e2e_cluster import (
    DECODE,
    DRAINS,
    KINDS,
    SERVICE,
    operator_metric,
    patch,
    ready_pods,
    wait_for_ready,
    wait_until_settled,
)
from e2e_shell import Kubectl, followed_log, metric, port_forward, say, wait_for

AUTOSCALER = """
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {name: decode}
spec:
  scaleTargetRef: {apiVersion: kvasir.dev/v1alpha1, kind: DecodePool, name: smollm2-decode}
  minReplicas: 3
  maxReplicas: 3
  metrics:
  - type: Resource
    resource: {name: cpu, target: {type: Utilization, averageUtilization: 80}}
"""


@pytest.mark.timeout(60)
def test_bad_change_is_refused(kubectl: Kubectl) -> None:
    other = {"spec": {"model": {"name": "other"}}}
    answer = patch(kubectl, SERVICE, other, expect_failure=True)
    assert "model cannot be changed" in answer
    answer = kubectl("scale", DECODE, "--replicas=9", expect_failure=True)
    assert "replicas must not be greater than maxReplicas" in answer


@pytest.mark.timeout(400)
def test_scale_in_drains_under_load(kubectl: Kubectl, operator: Kubectl, tmp_path: Path) -> None:
    """What is asserted lasts: a drain may be over before anybody sees the condition Draining."""
    drained = operator_metric(operator, DRAINS, outcome="drained")
    clients = Clients(kubectl, num_clients=6, max_tokens=160, ignore_eos=True)
    with clients as load, ExitStack() as stack:
        pods = ready_pods(kubectl, "decode")
        logs = {pod: stack.enter_context(followed_log(kubectl, pod, tmp_path)) for pod in pods}
        urls = [stack.enter_context(port_forward(kubectl, f"pod/{pod}", 8080)) for pod in pods]
        wait_for(
            "requests on both decode workers",
            lambda: all(metric(url, "kvasir_worker_running") >= 1 for url in urls),
            limit_s=90,
        )
        kubectl("scale", DECODE, "--replicas=1")
        left = wait_for_ready(kubectl, "decode", 1)
        wait_for("answers after the removal", load.has_done(2), limit_s=90)
    assert load.failures == []
    [gone] = set(pods) - set(left)
    words = logs[gone].read_text()
    begun = re.search(r"draining: (\d+) requests in flight", words)
    assert begun, f"{gone} did not drain: {words[-2000:]}"
    assert int(begun[1]) >= 1, f"{gone} had nothing to drain: {words[-2000:]}"
    assert "drained: 0 requests" in words, f"{gone} did not finish: {words[-2000:]}"
    say(f"{gone} finished {begun[1]} requests before it went")
    assert operator_metric(operator, DRAINS, outcome="drained") == drained + 1
    assert kubectl.json(DECODE)["spec"]["replicas"] == 1


@pytest.mark.timeout(240)
def test_scale_out(kubectl: Kubectl, router: str) -> None:
    kubectl("scale", DECODE, "--replicas=2")
    wait_for_ready(kubectl, "decode", 2)
    wait_until_settled(kubectl, limit_s=60)
    kubectl("get", KINDS)
    answer = chat(router)
    tell(answer)
    assert "Paris" in answer.text


@pytest.mark.timeout(400)
def test_autoscaler_owns_the_replicas(kubectl: Kubectl) -> None:
    """An autoscaler keeps to its bounds without metrics; the template's replicas stay at 2."""
    kubectl("apply", "-f", "-", stdin=AUTOSCALER)
    wait_for_ready(kubectl, "decode", 3)
    patch(kubectl, SERVICE, {"spec": {"slo": {"tpotMs": 110}}})  # the service is reconciled again
    wait_until_settled(kubectl, limit_s=60)
    assert kubectl.json(DECODE)["spec"]["replicas"] == 3
    kubectl("get", "hpa,dcp")
    kubectl("delete", "hpa", "decode")
    kubectl("scale", DECODE, "--replicas=2")
    wait_for_ready(kubectl, "decode", 2)
    wait_until_settled(kubectl, limit_s=60)
