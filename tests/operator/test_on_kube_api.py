"""Operator processes against a real API server: one leads, another takes over."""

import json
import time
from collections.abc import Iterator

import pytest
from kube_api import KubeApi, free_port, kube_api, needs_kube_api
from kube_operator import operator, wait_for
from operator_builders import make_object

pytestmark = [needs_kube_api, pytest.mark.slow, pytest.mark.timeout(300)]
MODEL = {"name": "tiny", "source": {"hostPath": {"path": "/models/tiny"}}}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeApi]:
    with kube_api(tmp_path_factory.mktemp("kube")) as found:
        yield found


def holder(api: KubeApi) -> str:
    """Who leads."""
    return str(api.json("lease", "kvasir-operator")["spec"].get("holderIdentity", ""))


def make_pool(api: KubeApi, name: str) -> None:
    """A DecodePool without nodes to run on."""
    pool = make_object("DecodePool", name, {"model": MODEL})
    pool["metadata"] = {"name": name, "namespace": "default"}
    api.apply(pool)


def has_children(api: KubeApi, name: str) -> bool:
    """Whether the operator has taken care of a pool."""
    return bool(api.json("dcp", name).get("status", {}).get("conditions"))


def test_another_operator_takes_over_within_fifteen_seconds(api: KubeApi) -> None:
    with operator(api, "a") as first:
        wait_for("a leader", lambda: holder(api) == "a")
        with operator(api, "b") as second:
            make_pool(api, "one")
            wait_for("the pool to be seen to", lambda: has_children(api, "one"))
            wait_for("the standby", lambda: second.metric("kvasir_operator_leading") == 0)
            assert (first.writes() > 0, second.writes()) == (True, 0)
            first.process.kill()
            killed_s = time.monotonic()
            make_pool(api, "two")
            wait_for("the next leader", lambda: has_children(api, "two"))
            took_s = time.monotonic() - killed_s
            assert took_s < 15
            assert holder(api) == "b"


def test_a_stop_hands_over_at_once(api: KubeApi) -> None:
    with operator(api, "c") as first, operator(api, "d") as second:
        wait_for("a leader", lambda: holder(api) in ("c", "d"))
        leader = first if holder(api) == "c" else second
        wait_for("the watches", lambda: leader.metric("kvasir_operator_leading") == 1)
        leader.process.terminate()
        stopped_s = time.monotonic()
        wait_for("the other", lambda: holder(api) in ({"c", "d"} - {leader.name}))
        took_s = time.monotonic() - stopped_s
        assert took_s < 5


def worker_pods(api: KubeApi, pool: str) -> list[dict[str, object]]:
    """The pods of a pool that are not on their way out."""
    pods = api.json("pods", "-l", f"kvasir.dev/pool={pool}")["items"]
    return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]


def run_pods(api: KubeApi) -> None:
    """Do the kubelet's part: every pod runs and is ready; those that go are gone."""
    for pod in api.json("pods")["items"]:
        name, status = pod["metadata"]["name"], pod["status"]
        if "deletionTimestamp" in pod["metadata"]:
            api("delete", "pod", name, "--force", "--grace-period=0", check=False)
        elif status.get("phase") != "Running":
            container = pod["spec"]["containers"][0]["name"]
            state = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
            entry = {
                "name": container,
                "ready": True,
                "state": state,
                "image": "x",
                "imageID": "x",
                "restartCount": 0,
            }
            ready = {"type": "Ready", "status": "True"}
            api.patch_status(
                f"pod/{name}",
                {"phase": "Running", "conditions": [ready], "containerStatuses": [entry]},
            )


def is_settled(api: KubeApi, pool: str) -> bool:
    """Whether the operator has nothing more to do for a pool."""
    run_pods(api)
    found = api.json("dcp", pool)
    status = found.get("status", {})
    states = {c["type"]: c["status"] for c in status.get("conditions", ())}
    return (
        status.get("observedGeneration") == found["metadata"]["generation"]
        and states["Progressing"] == "False"
        and states["Available"] == "True"
    )


def test_scaling_and_rollout_with_real_controllers(api: KubeApi) -> None:
    with operator(api, "e") as process:
        pool = make_object("DecodePool", "roll", {"model": MODEL, "replicas": 2})
        pool["spec"]["drainTimeoutSeconds"] = 1
        pool["metadata"] = {"name": "roll", "namespace": "default"}
        api.apply(pool)
        wait_for("two workers", lambda: is_settled(api, "roll"), limit_s=60)
        before = {pod["metadata"]["uid"] for pod in worker_pods(api, "roll")}
        first = api.json("dcp", "roll")["status"]["revision"]
        api("patch", "dcp", "roll", "--type=merge", "-p", '{"spec": {"image": "kvasir:next"}}')
        wait_for("the rollout", lambda: is_settled(api, "roll"), limit_s=90)
        after = worker_pods(api, "roll")
        assert len(after) == 2
        assert not before & {pod["metadata"]["uid"] for pod in after}
        assert {pod["spec"]["containers"][0]["image"] for pod in after} == {"kvasir:next"}
        assert api.json("dcp", "roll")["status"]["revision"] != first
        wait_for(
            "the old ReplicaSet to be gone",
            lambda: len(api.json("rs", "-l", "kvasir.dev/pool=roll")["items"]) == 1,
        )
        api("scale", "dcp", "roll", "--replicas=1")
        wait_for("one worker", lambda: is_settled(api, "roll"), limit_s=60)
        assert len(worker_pods(api, "roll")) == 1
        writes = process.writes()
        seen = process.metric("kvasir_operator_reconciles_total{.*}")
        api("annotate", "dcp", "roll", "touched=1")
        wait_for(
            "a reconcile",
            lambda: process.metric("kvasir_operator_reconciles_total{.*}") > seen,
        )
        assert process.writes() == writes


AUTOSCALER = {
    "apiVersion": "autoscaling/v2",
    "kind": "HorizontalPodAutoscaler",
    "spec": {
        "scaleTargetRef": {
            "apiVersion": "kvasir.dev/v1alpha1",
            "kind": "DecodePool",
            "name": "chat-decode",
        },
        "maxReplicas": 5,
    },
}


def test_replicas_of_others_are_left_alone_and_rivals_told_of(api: KubeApi) -> None:
    service = make_object("ModelService", "chat", {"model": MODEL})
    service["metadata"] = {"name": "chat", "namespace": "default"}
    with operator(api, "f"):
        api.apply(service)
        wait_for("the pool", lambda: "chat-decode" in api("get", "dcp", "-o", "name"))
        api("scale", "dcp", "chat-decode", "--replicas=3")
        wait_for(
            "the owner to be shown",
            lambda: api.json("dcp", "chat-decode")["status"].get("replicasOwner") == "kubectl",
        )
        service["spec"]["decode"] = {"threads": 2}
        api.apply(service)
        wait_for(
            "the change to arrive", lambda: api.json("dcp", "chat-decode")["spec"]["threads"] == 2
        )
        pool = api.json("dcp", "chat-decode", "--show-managed-fields")
        assert pool["spec"]["replicas"] == 3
        owners = {
            entry["manager"]
            for entry in pool["metadata"]["managedFields"]
            if "f:replicas" in entry["fieldsV1"].get("f:spec", {})
        }
        assert owners == {"kubectl"}
        for name in ("one", "two"):
            api.apply(AUTOSCALER | {"metadata": {"name": name, "namespace": "default"}})
        wait = ("wait", "--for=condition=ReplicasContested", "dcp/chat-decode", "--timeout=20s")
        api(*wait)
        assert "SeveralOwners" in api("describe", "dcp", "chat-decode")
        wait_for("the event", lambda: "SeveralOwners" in api("get", "events"))


def test_webhook_refuses_taken_names_with_certificates_of_the_operator(api: KubeApi) -> None:
    pytest.importorskip("cryptography", reason="the webhook's certificates need cryptography")
    port = free_port()
    hook = {
        "name": "references.kvasir.dev",
        "admissionReviewVersions": ["v1"],
        "sideEffects": "None",
        "failurePolicy": "Ignore",
        "clientConfig": {"url": f"https://localhost:{port}/validate"},
        "rules": [
            {
                "apiGroups": ["kvasir.dev"],
                "apiVersions": ["v1alpha1"],
                "operations": ["CREATE", "UPDATE"],
                "resources": ["modelservices"],
            }
        ],
    }
    api.apply(
        {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "ValidatingWebhookConfiguration",
            "metadata": {"name": "default-kvasir-operator-webhook"},
            "webhooks": [hook],
        }
    )
    api("create", "service", "clusterip", "taken-router", "--tcp=80:80")
    service = make_object("ModelService", "taken", {"model": MODEL})
    service["metadata"] = {"name": "taken", "namespace": "default"}
    with operator(api, "w", f"--webhook-port={port}"):
        wait_for(
            "a refusal",
            lambda: (
                "Service taken-router exists and does not belong to ModelService taken"
                in api(
                    "create", "--dry-run=server", "-f", "-", stdin=json.dumps(service), check=False
                )
            ),
            limit_s=40,
        )
