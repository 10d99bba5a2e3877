"""A change of the pods is rolled out under load, and no request fails."""

import json
from typing import Any

import pytest
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
from e2e_shell import Kubectl, say, wait_for


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
