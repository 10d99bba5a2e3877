"""A change of the pods is rolled out under load, and no request fails."""

from typing import Any

import pytest
from e2e_clients import Clients
from e2e_cluster import (
    SERVICE,
    find_pods,
    is_ready,
    patch,
    ready_pods,
    wait_for_ready,
    wait_until_settled,
)
from e2e_shell import Kubectl, say, wait_for


@pytest.mark.timeout(420)
def test_rollout_under_load(kubectl: Kubectl) -> None:
    before = ready_pods(kubectl, "router", "prefill", "decode")
    env = {"env": [{"name": "E2E_ROLLOUT", "value": "1"}]}
    with Clients(kubectl, num_clients=3, max_tokens=48, ignore_eos=True) as load:
        wait_for("answers before the rollout", load.has_done(3), limit_s=90)
        patch(kubectl, SERVICE, {"spec": {"prefill": env, "decode": env, "router": env}})

        def is_over() -> bool:
            now = ready_pods(kubectl, "router", "prefill", "decode")
            return len(now) == 5 and not set(now.values()) & set(before.values())

        wait_for("every pod to be replaced", is_over, limit_s=300)
        wait_for("answers after the rollout", load.has_done(6), limit_s=90)
    assert load.failures == []
    wait_until_settled(kubectl, limit_s=60)


@pytest.mark.timeout(300)
def test_failing_rollout_is_taken_back(kubectl: Kubectl) -> None:
    """What cannot start takes no worker's place, and is gone when the change is taken back."""
    before = ready_pods(kubectl, "prefill", "decode")
    with Clients(kubectl, num_clients=3, max_tokens=48, ignore_eos=True) as load:
        wait_for("answers before the rollout", load.has_done(3), limit_s=90)
        patch(kubectl, SERVICE, {"spec": {"decode": {"args": ["--nowhere"]}}})

        def told() -> str:
            condition = kubectl.condition(SERVICE, "Degraded")
            return condition["message"] if condition.get("reason") == "ContainerFailed" else ""

        message = wait_for("condition Degraded, ContainerFailed", told, limit_s=120)
        wait_for("answers while it fails", load.has_done(4), limit_s=90)
        patch(kubectl, SERVICE, {"spec": {"decode": {"args": None}}})
        wait_for_ready(kubectl, "decode", 2)
        wait_until_settled(kubectl, limit_s=90)
    say(message)
    assert "--nowhere" in message
    assert load.failures == []
    assert ready_pods(kubectl, "prefill", "decode") == before


@pytest.mark.timeout(420)
def test_rollout_turns_back_midway(kubectl: Kubectl) -> None:
    """The change is taken back when the first worker is a new one."""
    before = ready_pods(kubectl, "prefill", "decode")
    env = {"env": [{"name": "E2E_ROLLOUT", "value": "2"}]}
    back = {"env": [{"name": "E2E_ROLLOUT", "value": "1"}]}
    with Clients(kubectl, num_clients=3, max_tokens=48, ignore_eos=True) as load:
        wait_for("answers before the rollout", load.has_done(3), limit_s=90)
        patch(kubectl, SERVICE, {"spec": {"prefill": env, "decode": env}})
        wait_for(
            "the first new worker",
            lambda: set(ready_pods(kubectl, "prefill", "decode")) - set(before),
            limit_s=180,
        )
        patch(kubectl, SERVICE, {"spec": {"prefill": back, "decode": back}})

        def is_back() -> bool:
            pods = find_pods(kubectl, "prefill", "decode")
            values = [e["value"] for p in pods for e in _env(p) if e["name"] == "E2E_ROLLOUT"]
            return values == ["1"] * 4 and all(is_ready(pod) for pod in pods)

        wait_for("all workers to be of the old template", is_back, limit_s=300)
        wait_until_settled(kubectl, limit_s=90)
    assert load.failures == []


def _env(pod: dict[str, Any]) -> list[dict[str, Any]]:
    env: list[dict[str, Any]] = pod["spec"]["containers"][0]["env"]
    return env
