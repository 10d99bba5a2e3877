"""The objects of a scale run, as the operator and Kubernetes' controllers would have made them.

The children of a pool are those of the operator's own plan, so that an operator that finds them has
nothing to write but the status.
"""

import random
import time
from typing import Any

from kvasir_operator.api import GROUP, POOL_KINDS, VERSION
from kvasir_operator.core.plan import make_plan
from kvasir_operator.core.pool import WORKLOADS
from kvasir_operator.core.world import World

NAMESPACE = "kvasir-scale"
IMAGE = "kvasir:none"
PLURALS = {kind.kind: kind.plural for kind in POOL_KINDS}
SUFFIX_LETTERS = "bcdfghjklmnpqrstvwxz2456789"  # those that Kubernetes names pods with
SUFFIX_LENGTH = 5
READY = ("PodScheduled", "Initialized", "ContainersReady", "Ready")
Object = dict[str, Any]


def make_pool(number: int, *, pods: int) -> Object:
    """One pool, of the three kinds in turn."""
    kind = list(PLURALS)[number % len(PLURALS)]
    spec: Object = {"replicas": pods}
    if kind != "KVCachePool":
        spec["model"] = {"name": "none", "source": {"image": {"reference": "none"}}}
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": kind,
        "metadata": {"name": f"pool-{number}", "namespace": NAMESPACE},
        "spec": spec,
    }


def children_of(pool: Object) -> list[Object]:
    """What the operator makes for a pool that the API server has accepted."""
    world = World(
        obj=pool, live={}, pods=(), default_image=IMAGE, now_ms=time.time_ns() // 1_000_000
    )
    return list(make_plan(world).children)


def is_workload(child: Object) -> bool:
    """Whether it is what pods belong to."""
    return child["kind"] in WORKLOADS


def workload_status(workload: Object, *, unready: int = 0) -> Object:
    """The status that says: every pod is there, and ready but for a few."""
    num = workload["spec"]["replicas"]
    status: Object = {"observedGeneration": workload["metadata"]["generation"], "replicas": num}
    status |= {"readyReplicas": num - unready, "availableReplicas": num - unready}
    if workload["kind"] == "StatefulSet":
        status |= {"updatedReplicas": num, "currentReplicas": num}
    return status


def pods_of(workload: Object) -> list[Object]:
    """The pods that the workload's controller would make."""
    return [_pod(workload, n) for n in range(workload["spec"]["replicas"])]


def _pod(workload: Object, number: int) -> Object:
    metadata, template = workload["metadata"], workload["spec"]["template"]
    suffix, labels = str(number), dict(template["metadata"]["labels"])
    if workload["kind"] == "ReplicaSet":
        letters = random.Random(f"{metadata['uid']} {number}")
        suffix = "".join(letters.choices(SUFFIX_LETTERS, k=SUFFIX_LENGTH))
    name = f"{metadata['name']}-{suffix}"
    if workload["kind"] == "StatefulSet":
        labels["statefulset.kubernetes.io/pod-name"] = name
    owner = {
        "apiVersion": "apps/v1",
        "kind": workload["kind"],
        "name": metadata["name"],
        "uid": metadata["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            **{k: v for k, v in template["metadata"].items() if k == "annotations"},
            "name": name,
            "namespace": metadata["namespace"],
            "labels": labels,
            "ownerReferences": [owner],
        },
        "spec": template["spec"],
    }


def running_status(pod: Object) -> Object:
    """The status of a pod that runs and is ready."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    containers = [
        {
            "name": container["name"],
            "image": container["image"],
            "imageID": "none",
            "ready": True,
            "started": True,
            "restartCount": 0,
            "state": {"running": {"startedAt": now}},
        }
        for container in pod["spec"]["containers"]
    ]
    return {
        "phase": "Running",
        "podIP": "127.0.0.1",
        "podIPs": [{"ip": "127.0.0.1"}],
        "startTime": now,
        "conditions": [{"type": c, "status": "True", "lastTransitionTime": now} for c in READY],
        "containerStatuses": containers,
    }


def is_settled(pool: Object) -> bool:
    """Whether a pool serves and nothing is under way."""
    found = {c["type"]: c["status"] for c in pool.get("status", {}).get("conditions", [])}
    return found.get("Available") == "True" and found.get("Progressing") == "False"
