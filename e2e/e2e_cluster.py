"""What the steps ask of the cluster: metrics of the operator, pods of a role, a settled state."""

import json
from collections.abc import Mapping
from typing import Any

from e2e_shell import Kubectl, metric, port_forward, wait_for

SERVICE = "msvc/smollm2"
DECODE = "dcp/smollm2-decode"
PREFILL = "pfp/smollm2-prefill"
KINDS = "msvc,pfp,dcp,kvp"
PARTS = "deployments,statefulsets,replicasets,services,pods,poddisruptionbudgets,serviceaccounts"
CRDS = tuple(
    f"crd/{plural}.kvasir.dev"
    for plural in ("modelservices", "prefillpools", "decodepools", "kvcachepools")
)
OPERATOR = "app.kubernetes.io/name=kvasir-operator"
OURS = "app.kubernetes.io/managed-by=kvasir-operator"
DRAINS = "kvasir_operator_drains_total"
SETTLE_LIMIT_S = 300  # a busy machine misses a probe now and then
ROLES = ("router", "prefill", "decode", "kv")


def operator_metric(operator: Kubectl, name: str, **labels: str) -> float:
    """One counter of the operator, summed over its pods and the labels that are not given."""

    def read() -> tuple[float]:
        total = 0.0
        for pod in operator.json("pods", "-l", OPERATOR)["items"]:
            if "deletionTimestamp" not in pod["metadata"]:
                with port_forward(operator, f"pod/{pod['metadata']['name']}", 8080) as url:
                    total += metric(url, name, **labels)
        return (total,)

    [total] = wait_for(f"{name} of the operator", read, limit_s=120, quiet=True)
    return float(total)


def find_pods(kubectl: Kubectl, *roles: str) -> list[dict[str, Any]]:
    """The pods of these roles that are not on their way out."""
    pods = kubectl.json("pods", "-l", f"kvasir.dev/role in ({','.join(roles)})")["items"]
    return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]


def pod_uids(kubectl: Kubectl, *roles: str) -> dict[str, str]:
    """The UIDs of the pods of these roles, by name, ready or not.

    Who compares what there was before with what there is later asks this: a busy machine misses a
    probe now and then, and the pod is the same.
    """
    return {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in find_pods(kubectl, *roles)}


def ready_pods(kubectl: Kubectl, *roles: str) -> dict[str, str]:
    """The UIDs of the ready pods of these roles, by name."""
    return {
        pod["metadata"]["name"]: pod["metadata"]["uid"]
        for pod in find_pods(kubectl, *roles)
        if is_ready(pod)
    }


def is_ready(pod: Mapping[str, Any]) -> bool:
    """Whether the pod's condition Ready is true."""
    conditions = pod.get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def container_ids(pod: Mapping[str, Any]) -> set[str]:
    """Of the pod's containers: one that is started again has another."""
    containers = pod.get("status", {}).get("containerStatuses", [])
    return {container["containerID"] for container in containers if "containerID" in container}


def wait_for_ready(
    kubectl: Kubectl, role: str, number: int, *, without: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Wait until a role has exactly this many pods, all ready and none of those in `without`."""

    def found() -> dict[str, str]:
        pods = find_pods(kubectl, role)
        uids = {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in pods}
        is_all = len(pods) == number and all(is_ready(pod) for pod in pods)
        return uids if is_all and not set(uids.values()) & set((without or {}).values()) else {}

    what = f"{number} {role} pods" + (" in place of those before" if without else "")
    pods: dict[str, str] = wait_for(what, found, limit_s=300)
    return pods


def wait_until_settled(kubectl: Kubectl, *, limit_s: float = SETTLE_LIMIT_S) -> None:
    """Wait until the service is available, every pod of it ready and nothing under way.

    A change that the operator has not seen yet leaves the conditions as they were: callers first
    wait for what the change brings.
    """
    wanted = {"Available": "True", "Progressing": "False", "Degraded": "False"}

    def is_settled() -> bool:
        for item in kubectl.json(KINDS)["items"]:
            status = item.get("status", {})
            found = {c["type"]: c["status"] for c in status.get("conditions", [])}
            if any(found.get(kind) != state for kind, state in wanted.items()):
                return False
            if status["observedGeneration"] != item["metadata"]["generation"]:
                return False
        return all(is_ready(pod) for pod in find_pods(kubectl, *ROLES))

    wait_for("everything to be settled", is_settled, limit_s=limit_s)


def wait_until_observed(kubectl: Kubectl, what: str) -> None:
    """Wait until the operator has acted by the latest change of an object."""

    def is_observed() -> bool:
        item = kubectl.json(what)
        return bool(item["status"]["observedGeneration"] == item["metadata"]["generation"])

    wait_for(f"the change of {what} to be seen", is_observed, limit_s=90)


def apply_taken_name(kubectl: Kubectl) -> str:
    """What the webhook says to a pool whose children have the names of another one's; a dry run.

    Fails when the pool is not refused: the API server goes on without the webhook.
    """
    pool = {
        "apiVersion": "kvasir.dev/v1alpha1",
        "kind": "DecodePool",
        "metadata": {"name": "smollm2-prefill"},
        "spec": kubectl.json(DECODE)["spec"],
    }
    command = ("apply", "--dry-run=server", "-f", "-")
    return kubectl(*command, stdin=json.dumps(pool), expect_failure=True)


def patch(kubectl: Kubectl, what: str, change: object, **options: Any) -> str:
    """Change fields of an object by a merge patch."""
    return kubectl("patch", what, "--type=merge", "-p", json.dumps(change), **options)
