"""Parts are killed, a node is lost: requests go on, and what was lost comes back."""

import base64
import time
from functools import partial

import pytest
from conftest import NAMESPACE, Cluster
from e2e_chat import QUESTION, chat, system, tell, user
from e2e_clients import UNCACHED, Clients
from e2e_cluster import (
    DECODE,
    SERVICE,
    apply_taken_name,
    container_ids,
    find_pods,
    patch,
    pod_uids,
    wait_for_ready,
    wait_until_settled,
)
from e2e_shell import Kubectl, run, say, wait_for
from kvasir_cli.demo import SYSTEM
from kvasir_operator.certificates import LIFETIME, ROTATE_BEFORE, make_bundle, utc_now

WEBHOOK = "kvasir-operator-webhook"
WORKING = ("prefill", "decode", "kv")
KILL = ("--force", "--grace-period=0", "--wait=false")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_killed_worker_is_not_missed(kubectl: Kubectl, role: str) -> None:
    before = pod_uids(kubectl, role)
    victim = next(iter(before))
    with Clients(kubectl, num_clients=3, system=UNCACHED) as load:
        wait_for("answers under load", load.has_done(3), limit_s=180)
        kubectl("delete", "pod", victim, *KILL)
        wait_for("answers after the kill", load.has_done(6), limit_s=180)
        wait_for_ready(kubectl, role, len(before), without={victim: before[victim]})
    assert load.failures == []
    wait_until_settled(kubectl)


@pytest.mark.timeout(600)
def test_kv_outlives_the_workers(kubectl: Kubectl, router: str) -> None:
    """Several prompts: a worker that has just started may compute rather than fetch."""
    manners = ("kind", "calm", "exact", "patient", "honest")
    prompts = [system(f"Be {manner}. {SYSTEM}") for manner in manners]
    for prompt in prompts:
        chat(router, prompt, user(QUESTION))
    before = {role: pod_uids(kubectl, role) for role in ("prefill", "decode")}
    kubectl("delete", "pods", *before["prefill"], *before["decode"], "--wait=false")
    for role, pods in before.items():
        wait_for_ready(kubectl, role, len(pods), without=pods)
    wait_until_settled(kubectl)
    for prompt in prompts:
        answer = chat(router, prompt, user(QUESTION))
        tell(answer)
        if answer.stats["tokens_cached_fetched"] > 0:
            break
    assert answer.stats["tokens_cached_fetched"] > 0, "nothing came from the KV node"
    assert "Paris" in answer.text


@pytest.mark.timeout(600)
def test_requests_pass_without_the_kv_node(kubectl: Kubectl, router: str) -> None:
    before = pod_uids(kubectl, "kv")
    kubectl("delete", "pod", *before, "--wait=false")
    answer = chat(router, system("Be polite. " + SYSTEM), user(QUESTION))
    tell(answer)
    assert "Paris" in answer.text
    wait_for_ready(kubectl, "kv", len(before), without=before)
    wait_until_settled(kubectl)


@pytest.mark.timeout(600)
def test_router_replica_goes_and_is_killed(kubectl: Kubectl) -> None:
    """One that is told to go finishes its streams; one that is killed takes only its own along."""
    patch(kubectl, SERVICE, {"spec": {"router": {"replicas": 2}}})
    before = wait_for_ready(kubectl, "router", 2)
    first, second = before
    with Clients(kubectl, num_clients=4) as load:
        wait_for("answers of two routers", load.has_done(8), limit_s=180)
        kubectl("delete", "pod", first, "--wait=false")
        wait_for_ready(kubectl, "router", 2, without={first: before[first]})
        wait_for("answers after it went", load.has_done(8), limit_s=180)
    assert load.failures == []
    with Clients(kubectl, num_clients=4) as load:
        wait_for("answers of two routers", load.has_done(8), limit_s=180)
        kubectl("delete", "pod", second, *KILL)
        wait_for_ready(kubectl, "router", 2, without=before)
    say(f"{len(load.failures)} connections were lost with their router")
    refusals = [failure for failure in load.failures if "CommandError status" in failure]
    assert refusals == []
    with Clients(kubectl, num_clients=4) as load:
        wait_for("answers after the kill", load.has_done(8), limit_s=180)
    assert load.failures == []
    patch(kubectl, SERVICE, {"spec": {"router": {"replicas": 1}}})
    wait_for_ready(kubectl, "router", 1)
    wait_until_settled(kubectl)


@pytest.mark.timeout(600)
def test_standby_operator_takes_over(kubectl: Kubectl, operator: Kubectl) -> None:
    """It leads, and renews the webhook's certificate, whose time has come in between."""
    before = _leader(operator)
    aged = _age_certificate(operator)
    kubectl("delete", "-n", operator.namespace, "pod", before, *KILL)
    started_s = time.monotonic()
    wait_for("another operator to lead", lambda: _leader(operator) not in ("", before), limit_s=120)
    say(f"{_leader(operator)} leads {time.monotonic() - started_s:.1f} s after {before} was killed")
    kubectl("scale", DECODE, "--replicas=3")
    wait_for_ready(kubectl, "decode", 3)
    kubectl("scale", DECODE, "--replicas=2")
    wait_for_ready(kubectl, "decode", 2)
    wait_until_settled(kubectl)
    wait_for("a renewed certificate", lambda: _certificate(operator) != aged, limit_s=90)
    wait_for("a refusal of the webhook", partial(apply_taken_name, kubectl), limit_s=60)
    rollout = ("rollout", "status", "deployment/kvasir-operator", "--timeout=180s")
    operator(*rollout, limit_s=190)


def _age_certificate(operator: Kubectl) -> str:
    """Put a certificate in the webhook's Secret that is to be renewed; what it is."""
    name = f"{WEBHOOK}.{operator.namespace}.svc"
    made = make_bundle(name, now=utc_now() - LIFETIME + ROTATE_BEFORE / 2)
    parts = {"tls.crt": made.certificate, "tls.key": made.key, "ca.crt": made.ca}
    data = {key: base64.b64encode(pem).decode() for key, pem in parts.items()}
    patch(operator, f"secret/{WEBHOOK}", {"data": data}, quiet=True)
    return data["tls.crt"]


def _certificate(operator: Kubectl) -> str:
    certificate: str = operator.json(f"secret/{WEBHOOK}")["data"]["tls.crt"]
    return certificate


def _leader(operator: Kubectl) -> str:
    """The operator pod that holds the Lease; empty: it is free."""
    lease = operator.json("lease/kvasir-operator")
    return str(lease["spec"].get("holderIdentity", ""))


@pytest.mark.timeout(600)
def test_lost_node_is_not_missed(cluster: Cluster, kubectl: Kubectl) -> None:
    """A worker node without a router stops under load, and comes back."""
    if not cluster.kind_name:
        pytest.skip("only a node of kind can be stopped from here")
    routers = {pod["spec"]["nodeName"] for pod in find_pods(kubectl, "router")}
    pods = find_pods(kubectl, *WORKING)
    nodes = {pod["spec"]["nodeName"] for pod in pods} - routers
    assert nodes, "all pods are on one node"
    node = nodes.pop()
    lost = [pod for pod in pods if pod["spec"]["nodeName"] == node]
    say(f"node {node} is lost with {', '.join(pod['metadata']['name'] for pod in lost)}")
    with Clients(kubectl, num_clients=3, system=UNCACHED) as load:
        wait_for("answers under load", load.has_done(3), limit_s=180)
        run("docker", "stop", "--time", "1", node, limit_s=120)
        wait_for("answers without the node", load.has_done(6), limit_s=180)
        kubectl(
            "wait", "--for=condition=Ready=Unknown", f"node/{node}", "--timeout=240s", limit_s=250
        )
        wait_for("answers when it is missed", load.has_done(6), limit_s=180)
        run("docker", "start", node, limit_s=120)
        kubectl("wait", "--for=condition=Ready", f"node/{node}", "--timeout=240s", limit_s=250)

        def are_started_again() -> bool:
            """Until then the conditions of pods may be those from before the node went."""
            found = {pod["metadata"]["uid"]: pod for pod in find_pods(kubectl, *WORKING)}
            kept = [(pod, found.get(pod["metadata"]["uid"])) for pod in lost]
            return not any(now and container_ids(now) & container_ids(pod) for pod, now in kept)

        wait_for("its pods to start again or elsewhere", are_started_again, limit_s=240)
        wait_until_settled(kubectl)
    assert load.failures == []
    kubectl("get", "pods", "-n", NAMESPACE, "-o", "wide")
