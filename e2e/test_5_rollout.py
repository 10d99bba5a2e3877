"""A change of the pods is rolled out under load, and no request fails."""

import json
from typing import Any

import pytest
from conftest import NAMESPACE
from e2e_chat import QUESTION, chat, system, tell, user
from e2e_clients import Clients
from e2e_cluster import (
    SERVICE,
    find_pods,
    is_ready,
    patch,
    pod_uids,
    ready_pods,
    wait_for_ready,
    wait_until_settled,
)
from e2e_shell import Kubectl, metric, port_forward, say, wait_for
from kvasir_cli.demo import SYSTEM

MOVED = {
    "prefill": ("kvasir_worker_handoff_bytes_total", "kvasir_kvtier_fetched_bytes_total"),
    "decode": ("kvasir_worker_handoff_bytes_total", "kvasir_kvtier_fetched_bytes_total"),
    "kv": ("kvasir_kvnode_transport_bytes_total",),
}
"""What parts have received of KV, by transport."""


@pytest.mark.timeout(600)
def test_rollout_under_load(kubectl: Kubectl) -> None:
    before = pod_uids(kubectl, "router", "prefill", "decode")
    env = {"env": [{"name": "E2E_ROLLOUT", "value": "1"}]}
    with Clients(kubectl, num_clients=3, max_tokens=48, ignore_eos=True) as load:
        wait_for("answers before the rollout", load.has_done(3), limit_s=300)
        patch(kubectl, SERVICE, {"spec": {"prefill": env, "decode": env, "router": env}})

        def is_over() -> bool:
            now = ready_pods(kubectl, "router", "prefill", "decode")
            return len(now) == 5 and not set(now.values()) & set(before.values())

        wait_for("every pod to be replaced", is_over, limit_s=420)
        wait_for("answers after the rollout", load.has_done(6), limit_s=180)
    assert load.failures == []
    wait_until_settled(kubectl)


@pytest.mark.timeout(600)
def test_failing_rollout_is_taken_back(kubectl: Kubectl) -> None:
    """What cannot start takes no worker's place, and is gone when the change is taken back."""
    before = pod_uids(kubectl, "prefill", "decode")
    with Clients(kubectl, num_clients=3, max_tokens=48, ignore_eos=True) as load:
        wait_for("answers before the rollout", load.has_done(3), limit_s=300)
        patch(kubectl, SERVICE, {"spec": {"decode": {"args": ["--nowhere"]}}})

        def told() -> str:
            condition = kubectl.condition(SERVICE, "Degraded")
            return condition["message"] if condition.get("reason") == "ContainerFailed" else ""

        message = wait_for("condition Degraded, ContainerFailed", told, limit_s=240)
        wait_for("answers while it fails", load.has_done(4), limit_s=300)
        patch(kubectl, SERVICE, {"spec": {"decode": {"args": None}}})
        wait_for_ready(kubectl, "decode", 2)
        wait_until_settled(kubectl)
    say(message)
    assert "--nowhere" in message
    assert load.failures == []
    assert pod_uids(kubectl, "prefill", "decode") == before


@pytest.mark.timeout(600)
def test_rollout_turns_back_midway(kubectl: Kubectl) -> None:
    """The change is taken back when the first worker is a new one."""
    before = pod_uids(kubectl, "prefill", "decode")
    env = {"env": [{"name": "E2E_ROLLOUT", "value": "2"}]}
    back = {"env": [{"name": "E2E_ROLLOUT", "value": "1"}]}
    with Clients(kubectl, num_clients=3, max_tokens=48, ignore_eos=True) as load:
        wait_for("answers before the rollout", load.has_done(3), limit_s=300)
        patch(kubectl, SERVICE, {"spec": {"prefill": env, "decode": env}})
        wait_for(
            "the first new worker",
            lambda: set(ready_pods(kubectl, "prefill", "decode")) - set(before),
            limit_s=300,
        )
        patch(kubectl, SERVICE, {"spec": {"prefill": back, "decode": back}})

        def is_back() -> bool:
            pods = find_pods(kubectl, "prefill", "decode")
            values = [e["value"] for p in pods for e in _env(p) if e["name"] == "E2E_ROLLOUT"]
            return values == ["1"] * 4 and all(is_ready(pod) for pod in pods)

        wait_for("all workers to be of the old template", is_back, limit_s=420)
        wait_until_settled(kubectl)
    assert load.failures == []


@pytest.mark.timeout(600)
def test_stateful_set_of_an_early_release_makes_room(kubectl: Kubectl) -> None:
    """Workers were once in StatefulSets: their pods drain, and the pool is as large as before."""
    before = pod_uids(kubectl, "decode")
    early = _early_release(kubectl)
    with Clients(kubectl, num_clients=2, max_tokens=48, ignore_eos=True) as load:
        wait_for("answers before", load.has_done(2), limit_s=180)
        kubectl("apply", "-f", "-", stdin=json.dumps(early))
        kubectl("wait", "--for=delete", "statefulset/smollm2-decode", "--timeout=240s", limit_s=250)
        wait_for_ready(kubectl, "decode", 2)
        wait_for("answers afterwards", load.has_done(4), limit_s=180)
    assert load.failures == []
    assert pod_uids(kubectl, "decode") == before
    wait_until_settled(kubectl)


def _early_release(kubectl: Kubectl) -> dict[str, Any]:
    """A StatefulSet of one worker, as the operator made it before there were ReplicaSets."""
    own = ("-l", "kvasir.dev/pool=smollm2-decode,kvasir.dev/role=decode")
    [current] = [rs for rs in kubectl.json("rs", *own)["items"] if rs["spec"]["replicas"]]
    revision = "kvasir.dev/revision"
    template = current["spec"]["template"]
    template["metadata"]["labels"].pop(revision)
    match = {k: v for k, v in current["spec"]["selector"]["matchLabels"].items() if k != revision}
    kept = {key: current["metadata"][key] for key in ("namespace", "ownerReferences")}
    labels = {k: v for k, v in current["metadata"]["labels"].items() if k != revision}
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {**kept, "name": "smollm2-decode", "labels": labels},
        "spec": {
            "replicas": 1,
            "serviceName": "smollm2-decode",
            "selector": {"matchLabels": match},
            "template": template,
        },
    }


def _env(pod: dict[str, Any]) -> list[dict[str, Any]]:
    env: list[dict[str, Any]] = pod["spec"]["containers"][0]["env"]
    return env


@pytest.mark.timeout(900)
def test_pods_of_one_node_share_memory_by_choice(kubectl: Kubectl, router: str) -> None:
    """Pod Security "restricted" forbids a folder of the node: KV is encrypted over TCP, until..."""
    answers = _chat_until_moved(kubectl, router, "tcp-encrypted")
    assert _moved_bytes(kubectl, "shm") == 0
    before = pod_uids(kubectl, *MOVED)
    _enforce(kubectl, "privileged")
    patch(kubectl, SERVICE, {"spec": {"kvSocketHostPath": "/run/kvasir-e2e"}})

    def is_over() -> bool:
        now = ready_pods(kubectl, *MOVED)
        return len(now) == len(before) and not set(now.values()) & set(before.values())

    wait_for("every worker and KV node to be replaced", is_over, limit_s=420)
    wait_until_settled(kubectl)
    again = _chat_until_moved(kubectl, router, "shm")
    common = answers.keys() & again.keys()
    assert {manner: again[manner] for manner in common} == {m: answers[m] for m in common}


def _enforce(kubectl: Kubectl, level: str) -> None:
    label = f"pod-security.kubernetes.io/enforce={level}"
    kubectl("label", "--overwrite", f"namespace/{NAMESPACE}", label)


def _chat_until_moved(kubectl: Kubectl, router: str, transport: str) -> dict[str, str]:
    """Answers by manner. Which worker serves a prompt, on which node, is the router's choice."""
    answers: dict[str, str] = {}
    for manner in ("swift", "sober", "warm", "plain", "curious", "formal", "modest", "precise"):
        answer = chat(router, system(f"Be {manner}. {SYSTEM}"), user(QUESTION))
        tell(answer)
        answers[manner] = answer.text
        assert answer.text
        if _moved_bytes(kubectl, transport) > 0:
            return answers
    raise AssertionError(f"no KV moved by {transport}")


def _moved_bytes(kubectl: Kubectl, transport: str) -> float:
    total = 0.0
    for role, names in MOVED.items():
        for pod in find_pods(kubectl, role):
            with port_forward(kubectl, f"pod/{pod['metadata']['name']}", 8080) as url:
                total += sum(metric(url, name, transport=transport) for name in names)
    say(f"KV moved by {transport}: {total:.0f} bytes")
    return total
