"""Operator processes against a real API server: one leads, another takes over."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
from kube_api import KubeApi, free_port, kube_api, needs_kube_api
from operator_builders import make_object

pytestmark = [needs_kube_api, pytest.mark.slow]
MODEL = {"name": "tiny", "source": {"hostPath": {"path": "/models/tiny"}}}
T = TypeVar("T")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeApi]:
    with kube_api(tmp_path_factory.mktemp("kube")) as found:
        yield found


@dataclass
class OperatorProcess:
    """One operator of a test."""

    process: subprocess.Popen[bytes]
    port: int
    name: str
    log: Path

    def metric(self, pattern: str) -> float:
        """The sum of the samples that match."""
        url = f"http://127.0.0.1:{self.port}/metrics"
        text = urllib.request.urlopen(url, timeout=5).read().decode()
        return sum(float(value) for value in re.findall(rf"^{pattern} (.+)$", text, re.MULTILINE))

    def writes(self) -> float:
        """What it wrote, the lease aside."""
        every = self.metric("kvasir_operator_api_writes_total{.*}")
        return every - self.metric('kvasir_operator_api_writes_total{kind="Lease",.*}')


@contextmanager
def operator(api: KubeApi, name: str, *more: str) -> Iterator[OperatorProcess]:
    port, log = free_port(), api.folder / f"operator-{name}.log"
    args = ("operator", "--image=kvasir:test", f"--http-port={port}", f"--identity={name}")
    command = [f"{Path(sys.executable).parent}/kvasir", *args, "--lease-namespace=default", *more]
    env = {**os.environ, "KUBECONFIG": str(api.kubeconfig), "KVASIR_LOG_FORMAT": "json"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file)
        try:
            yield OperatorProcess(process, port, name, log)
        finally:
            process.terminate()
            process.wait(30)


def wait_for(what: str, found: Callable[[], T], *, limit_s: float = 30) -> T:
    """Ask until the answer is true."""
    deadline_s, problem = time.monotonic() + limit_s, "not so"
    while time.monotonic() < deadline_s:
        try:
            if answer := found():
                return answer
        except (OSError, AssertionError) as error:
            problem = str(error)
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {limit_s} s: {problem}")


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
        api("annotate", "dcp", "roll", "touched=1")
        seen = process.metric("kvasir_operator_reconciles_total{.*}")
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


KEY = {"name": "a", "key": "b"}
DATA = {"volumes": [{"name": "data", "emptyDir": {}}]}
REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "requests above limits": (
        {"resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "1500m"}}},
        "requests must not be greater than limits",
    ),
    "memory limit below the KV memory": (
        {"kvCacheMb": 2048, "resources": {"limits": {"memory": "2Gi"}}},
        "the memory limit must be greater than kvCacheMb",
    ),
    "toleration of a value by Exists": (
        {"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]},
        "value must not be set where operator is Exists",
    ),
    "toleration of every key by Equal": (
        {"tolerations": [{"effect": "NoSchedule"}]},
        "operator must be Exists where key is absent",
    ),
    "seconds of a toleration that is not NoExecute": (
        {"tolerations": [{"key": "a", "effect": "NoSchedule", "tolerationSeconds": 3}]},
        "tolerationSeconds needs effect NoExecute",
    ),
    "rollout that cannot move": (
        {"rollout": {"maxSurge": 0, "maxUnavailable": 0}},
        "maxSurge and maxUnavailable must not both be 0",
    ),
    "mount of a volume that is not listed": (
        {"volumeMounts": [{"name": "data", "mountPath": "/data"}]},
        "every one of volumeMounts must have the name of one of volumes",
    ),
    "volume with two sources": (
        {"volumes": [{"name": "data", "emptyDir": {}, "secret": {"secretName": "a"}}]},
        "exactly one of hostPath, persistentVolumeClaim, emptyDir",
    ),
    "volume with a name of Kvasir's": (
        {"volumes": [{"name": "kvasir-tls", "emptyDir": {}}]},
        "name must not be tmp or model, or begin with kvasir-",
    ),
    "mount over the model": (
        {**DATA, "volumeMounts": [{"name": "data", "mountPath": "/model/lora"}]},
        "mountPath must be a plain absolute path other than",
    ),
    "mount that climbs": (
        {**DATA, "volumeMounts": [{"name": "data", "mountPath": "/mnt/../model"}]},
        "mountPath must be a plain absolute path other than",
    ),
    "mount of a folder outside of the volume": (
        {**DATA, "volumeMounts": [{"name": "data", "mountPath": "/a", "subPath": "b/.."}]},
        "subPath must not have .. in it",
    ),
    "variable with two values": (
        {"env": [{"name": "A", "value": "b", "valueFrom": {"secretKeyRef": KEY}}]},
        "exactly one of value and valueFrom must be set",
    ),
    "variable from two sources": (
        {"env": [{"name": "A", "valueFrom": {"secretKeyRef": KEY, "configMapKeyRef": KEY}}]},
        "exactly one of secretKeyRef and configMapKeyRef must be set",
    ),
    "replicas below their bound": (
        {"replicas": 1, "minReplicas": 2},
        "replicas must not be less than minReplicas",
    ),
}


@pytest.mark.parametrize(("spec", "message"), REFUSED.values(), ids=REFUSED)
def test_contradictions_are_refused(api: KubeApi, spec: dict[str, object], message: str) -> None:
    pool = make_object("DecodePool", "bad", {"model": MODEL, **spec})
    pool["metadata"] = {"name": "bad", "namespace": "default"}
    assert message in api.apply(pool, check=False)
    service = make_object("ModelService", "bad", {"model": MODEL, "decode": spec})
    service["metadata"] = {"name": "bad", "namespace": "default"}
    assert message in api.apply(service, check=False)


REFUSED_REDIS = {
    "password in the open": (
        {"url": "redis://:secret@index:6379/0"},
        "url must not hold a user or password",
    ),
    "two places": (
        {"url": "redis://index:6379/0", "urlSecretRef": KEY},
        "only one of url and urlSecretRef may be set",
    ),
}


@pytest.mark.parametrize(("redis", "message"), REFUSED_REDIS.values(), ids=REFUSED_REDIS)
def test_contradictions_of_redis_are_refused(
    api: KubeApi, redis: dict[str, object], message: str
) -> None:
    service = make_object("ModelService", "bad", {"model": MODEL, "kvCache": {}, "redis": redis})
    service["metadata"] = {"name": "bad", "namespace": "default"}
    assert message in api.apply(service, check=False)
    pool = {f"redisU{name[1:]}": value for name, value in redis.items()}
    nodes = make_object("KVCachePool", "bad", pool)
    nodes["metadata"] = {"name": "bad", "namespace": "default"}
    assert message.replace("url", "redisUrl") in api.apply(nodes, check=False)


def is_quiet(api: KubeApi, process: OperatorProcess) -> bool:
    """Whether four reconciles of everything write nothing."""
    reconciles = "kvasir_operator_reconciles_total{.*}"
    seen, writes = process.metric(reconciles), process.writes()
    api("annotate", "msvc,dcp,pfp,kvp", "--all", "--overwrite", f"seen={time.time_ns()}")
    wait_for("four more reconciles", lambda: process.metric(reconciles) >= seen + 4)
    return process.writes() == writes


SAMPLES = sorted((Path(__file__).parents[2] / "docs/samples").glob("*.yaml"))


@pytest.mark.parametrize("sample", SAMPLES, ids=[sample.stem for sample in SAMPLES])
def test_the_samples_are_accepted(api: KubeApi, sample: Path) -> None:
    assert "created" in api("create", "--dry-run=server", "-f", str(sample))


def test_every_setting_is_accepted_and_stays(api: KubeApi) -> None:
    decode = {
        "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "3Gi"}},
        "tolerations": [{"operator": "Exists"}, {"key": "a", "value": "b"}],
        "topologySpread": [{"topologyKey": "topology.kubernetes.io/zone"}],
        "nearTopologyKey": "topology.kubernetes.io/zone",
        "nodeSelector": {"gpu": "yes"},
        "kvCacheMb": 2048,
    }
    image = {"reference": "models:1", "path": "/m", "asVolume": True}
    model = {"name": "tiny", "source": {"image": image}}
    service = make_object("ModelService", "full", {"model": model, "decode": decode, "kvCache": {}})
    service["metadata"] = {"name": "full", "namespace": "default"}
    with operator(api, "g") as process:
        api.apply(service)
        pods = ("pods", "-l", "kvasir.dev/pool=full-decode")
        [pod] = wait_for("a worker", lambda: api.json(*pods)["items"])
        assert pod["spec"]["topologySpreadConstraints"]
        assert pod["spec"]["affinity"]["podAffinity"]
        assert any("image" in volume for volume in pod["spec"]["volumes"])
        wait_for("policies", lambda: "full-redis" in api("get", "networkpolicies"))
        wait_for("reconciles that write nothing", lambda: is_quiet(api, process), limit_s=60)


VOLUMES = {
    "env": [{"name": "TOKEN", "valueFrom": {"secretKeyRef": KEY}}],
    "volumes": [
        {"name": "shared", "persistentVolumeClaim": {"claimName": "adapters"}},
        {"name": "node", "hostPath": {"path": "/dev/shm", "type": "Directory"}},
        {"name": "scratch", "emptyDir": {"medium": "Memory", "sizeLimit": "64Mi"}},
        {"name": "settings", "configMap": {"name": "settings"}},
        {"name": "ca", "secret": {"secretName": "ca", "optional": True}},
        {"name": "files", "image": {"reference": "files:1"}},
    ],
    "volumeMounts": [
        {"name": "shared", "mountPath": "/adapters", "subPath": "one", "readOnly": True},
        {"name": "scratch", "mountPath": "/scratch"},
        {"name": "ca", "mountPath": "/etc/redis"},
    ],
}


def test_volumes_and_secrets_of_every_part_are_accepted_and_stay(api: KubeApi) -> None:
    spec: dict[str, object] = dict.fromkeys(("router", "prefill", "decode", "kvCache"), VOLUMES)
    spec |= {"model": MODEL, "redis": {"urlSecretRef": KEY}}
    service = make_object("ModelService", "vol", spec)
    service["metadata"] = {"name": "vol", "namespace": "default"}
    with operator(api, "v") as process:
        api.apply(service)
        for selector in ("pool=vol-decode", "pool=vol-kv", "model-service=vol"):
            pods = ("pods", "-l", f"kvasir.dev/{selector}")
            pod = wait_for("a pod", lambda pods=pods: api.json(*pods)["items"])[0]
            names = {volume["name"] for volume in pod["spec"]["volumes"]}
            assert {volume["name"] for volume in VOLUMES["volumes"]} < names
            [container] = pod["spec"]["containers"]
            mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert {"/adapters", "/scratch", "/etc/redis", "/tmp"} <= mounts
            index = {"name": "KVASIR_REDIS", "valueFrom": {"secretKeyRef": KEY}}
            assert (index in container["env"]) == selector.startswith("pool")
        assert "vol-redis" not in api("get", "deployments", "-o", "name")
        wait_for("reconciles that write nothing", lambda: is_quiet(api, process), limit_s=60)


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
