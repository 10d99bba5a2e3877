"""The objects around the pods: workloads, Services, ServiceAccounts and disruption budgets."""

import hashlib
import json
from collections.abc import Sequence

from kvasir_operator.core.manifests import MANAGED_BY, REVISION_LABEL, Manifest, Owner, child
from kvasir_operator.core.pods import Part, pod_template

OPERATOR_LABELS = {"app.kubernetes.io/name": "kvasir-operator"}  # as the chart sets them
REVISION_CHARS = 8  # a pod's name, POOL-REVISION-xxxxx, must fit into a label


def service_account(owner: Owner, name: str, labels: dict[str, str]) -> Manifest:
    """An account without rights: the parts do not talk to the Kubernetes API."""
    return child(
        owner,
        "v1",
        "ServiceAccount",
        name=name,
        labels=labels,
        automountServiceAccountToken=False,
    )


def disruption_budget(owner: Owner, name: str, labels: dict[str, str]) -> Manifest:
    """Nodes are emptied one pod of a part at a time; a single pod never blocks it."""
    return child(
        owner,
        "policy/v1",
        "PodDisruptionBudget",
        name=name,
        labels=labels,
        spec={"maxUnavailable": 1, "selector": {"matchLabels": labels}},
    )


def network_policy(
    owner: Owner,
    name: str,
    labels: dict[str, str],
    *,
    inner_ports: Sequence[str],
    open_ports: Sequence[str] = (),
) -> Manifest:
    """Inner ports are for Kvasir's pods of the namespace and the operator; others for everyone."""
    rules = [
        {
            "from": [
                {"podSelector": {"matchLabels": MANAGED_BY}},
                {"namespaceSelector": {}, "podSelector": {"matchLabels": OPERATOR_LABELS}},
            ],
            "ports": _policy_ports(inner_ports),
        },
        {"ports": _policy_ports(open_ports)},
    ]
    return child(
        owner,
        "networking.k8s.io/v1",
        "NetworkPolicy",
        name=name,
        labels=labels,
        spec={
            "podSelector": {"matchLabels": labels},
            "policyTypes": ["Ingress"],
            "ingress": rules if open_ports else rules[:1],
        },
    )


def _policy_ports(names: Sequence[str]) -> list[Manifest]:
    return [{"port": name, "protocol": "TCP"} for name in names]


def headless_service(
    owner: Owner, name: str, labels: dict[str, str], ports: dict[str, int]
) -> Manifest:
    """The pods' addresses under one name, from the moment that they have one."""
    return _service(owner, name, labels, ports, clusterIP="None", publishNotReadyAddresses=True)


def cluster_service(
    owner: Owner, name: str, labels: dict[str, str], ports: dict[str, int]
) -> Manifest:
    """One address in front of the pods that are ready."""
    return _service(owner, name, labels, ports, type="ClusterIP")


def _service(
    owner: Owner,
    name: str,
    labels: dict[str, str],
    ports: dict[str, int],
    **extra: object,
) -> Manifest:
    entries = [
        {"name": port_name, "port": port, "targetPort": port_name, "protocol": "TCP"}
        for port_name, port in ports.items()
    ]
    return child(
        owner,
        "v1",
        "Service",
        name=name,
        labels=labels,
        spec={"selector": labels, "ports": entries, **extra},
    )


def stateful_set(
    owner: Owner,
    name: str,
    labels: dict[str, str],
    part: Part,
    *,
    replicas: int,
    claims: Sequence[Manifest] = (),
) -> Manifest:
    """Pods with names that last; all start at once, the highest ordinal leaves first.

    Volumes that are claimed for a pod go with it.
    """
    kept = {
        "volumeClaimTemplates": list(claims),
        "persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Delete", "whenScaled": "Delete"},
    }
    return child(
        owner,
        "apps/v1",
        "StatefulSet",
        name=name,
        labels=labels,
        spec={
            "replicas": replicas,
            "serviceName": name,
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": labels},
            "template": pod_template(part, labels),
            **(kept if claims else {}),
        },
    )


def revision_of(part: Part, labels: dict[str, str]) -> str:
    """A name of the pods' template: equal templates, equal names."""
    text = json.dumps(pod_template(part, labels), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:REVISION_CHARS]


def replica_set(
    owner: Owner, revision: str, labels: dict[str, str], part: Part, *, replicas: int
) -> Manifest:
    """Workers of one revision."""
    own = {**labels, REVISION_LABEL: revision}
    return child(
        owner,
        "apps/v1",
        "ReplicaSet",
        name=f"{owner.name}-{revision}",
        labels=own,
        spec={
            "replicas": replicas,
            "selector": {"matchLabels": own},
            "template": pod_template(part, own),
        },
    )


def deployment(
    owner: Owner, name: str, labels: dict[str, str], part: Part, *, replicas: int
) -> Manifest:
    """Interchangeable pods; a new one is ready before an old one leaves."""
    return child(
        owner,
        "apps/v1",
        "Deployment",
        name=name,
        labels=labels,
        spec={
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1},
            },
            "template": pod_template(part, labels),
        },
    )
