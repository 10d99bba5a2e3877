"""The operator goes and comes back unnoticed, and leaves nothing when it is told."""

import pytest
from conftest import NAMESPACE, SYSTEM_NAMESPACE
from e2e_clients import POD, Clients
from e2e_cluster import CRDS, OPERATOR, OURS, PARTS, ROLES, SERVICE, pod_uids, wait_until_settled
from e2e_shell import Helm, Kubectl, say, wait_for

PASSING = ("the lease", "Request attempt")  # a busy API server answers late, and is asked again


@pytest.mark.timeout(300)
def test_operator_had_no_trouble(operator: Kubectl) -> None:
    rollout = ("rollout", "status", "deployment/kvasir-operator", "--timeout=180s")
    operator(*rollout, limit_s=190)  # one of its pods was on the node that was lost
    for pod in operator.json("pods", "-l", OPERATOR)["items"]:
        name = pod["metadata"]["name"]
        log = operator("logs", name, "--tail=-1", quiet=True)
        trouble = [line for line in log.splitlines() if " ERROR " in line or "Traceback" in line]
        assert [line for line in trouble if not any(w in line for w in PASSING)] == []
        assert "forbidden" not in log.lower()
        say(f"{name}: {len(log.splitlines())} lines of log, no error")


@pytest.mark.timeout(600)
def test_service_outlives_the_operator(helm: Helm, kubectl: Kubectl) -> None:
    """The CRDs stay, and with them every resource and all that serves."""
    wait_until_settled(kubectl)  # the node that was lost starts its pods again
    before = pod_uids(kubectl, *ROLES)
    with Clients(kubectl, num_clients=2) as load:
        helm("uninstall", "kvasir", "--wait", limit_s=240)
        wait_for("answers without an operator", load.has_done(4), limit_s=180)
        helm("install", "kvasir", "helm/kvasir", *helm.values, "--wait", limit_s=320)
        wait_for("answers with a new operator", load.has_done(4), limit_s=180)
    assert load.failures == []
    wait_until_settled(kubectl)
    assert pod_uids(kubectl, *ROLES) == before


@pytest.mark.timeout(600)
def test_uninstall_leaves_nothing(helm: Helm, kubectl: Kubectl, operator: Kubectl) -> None:
    kubectl.delete(SERVICE)
    wait_for(
        "pools and children to be gone",
        lambda: not kubectl.names(f"pfp,dcp,kvp,{PARTS}", "-l", OURS),
        limit_s=300,
    )
    helm("uninstall", "kvasir", "--wait", limit_s=240)
    wait_for("the operator to be gone", lambda: not _left(operator), limit_s=240)
    wait_for("nothing of the service", lambda: not _left(kubectl), limit_s=90)
    operator.delete(*CRDS)
    left = [
        name
        for name in operator.names(
            "crd,clusterroles,clusterrolebindings,validatingwebhookconfigurations"
        )
        if "kvasir" in name.rsplit("/", 1)[1]
    ]
    assert left == []
    operator.delete("namespace", NAMESPACE, SYSTEM_NAMESPACE)


def _left(kubectl: Kubectl) -> list[str]:
    """What is in a namespace, but for what the cluster and the suite itself put there."""
    kinds = (
        "all,leases,secrets,configmaps,serviceaccounts,roles,rolebindings,pvc,pdb,networkpolicies"
    )
    theirs = (
        "configmap/kube-root-ca.crt",
        "serviceaccount/default",
        f"pod/{POD}",
        f"configmap/{POD}",
    )
    return [name for name in kubectl.names(kinds) if name not in theirs]
