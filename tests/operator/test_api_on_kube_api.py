"""What the API server accepts and refuses of the custom resources, and what is made of them."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from kube_api import KubeApi, kube_api, needs_kube_api
from kube_operator import is_quiet, operator, wait_for
from operator_builders import MODEL, make_object

pytestmark = [needs_kube_api, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeApi]:
    with kube_api(tmp_path_factory.mktemp("kube")) as found:
        yield found


KEY = {"name": "a", "key": "b"}
STORE = {"url": "s3://blocks", "endpoint": "http://minio:9000", "secretRef": {"name": "s3"}}
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
        "mountPath must not hide /tmp, /tls, /kv-key, /kv-disk, /kv-sockets or /model",
    ),
    "mount that climbs": (
        {**DATA, "volumeMounts": [{"name": "data", "mountPath": "/mnt/../model"}]},
        "mountPath must not hide /tmp, /tls, /kv-key, /kv-disk, /kv-sockets or /model",
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


VLLM = {"engine": "vllm", "vllm": {"image": "vllm/vllm-openai:v0.11.0"}}
REFUSED_SERVICES = {
    "vllm without its image": ({"engine": "vllm"}, "vllm must be set if and only if engine is"),
    "vllm with KV nodes": ({**VLLM, "kvCache": {}}, "kvCache needs engine kvasir"),
    "vllm with a codec": ({**VLLM, "kvCodec": "auto"}, "kvCodec needs engine kvasir"),
    "vllm with our weights": ({**VLLM, "weights": "int8"}, "weights needs engine kvasir"),
    "codec of no worker": ({"kvCodec": "zip"}, "Unsupported value"),
    "weights of no worker": ({"weights": "fp8"}, "Unsupported value"),
    "object store without a bucket": (
        {"kvCache": {"objectStore": {"url": "https://a/b"}}},
        "spec.kvCache.objectStore.url",
    ),
    "object store with a password": (
        {"kvCache": {"objectStore": {"url": "s3://abc", "endpoint": "http://a:b@minio"}}},
        "endpoint must not hold a user or password",
    ),
    "vllm with a planner": ({**VLLM, "planner": {}}, "planner needs engine kvasir"),
    "port of the routers' peers": ({"router": {"grpcPort": 50054}}, "choose another port"),
}


@pytest.mark.parametrize(("spec", "message"), REFUSED_SERVICES.values(), ids=list(REFUSED_SERVICES))
def test_contradictions_of_a_service_are_refused(
    api: KubeApi, spec: dict[str, object], message: str
) -> None:
    service = make_object("ModelService", "bad", {"model": MODEL, **spec})
    service["metadata"] = {"name": "bad", "namespace": "default"}
    assert message in api.apply(service, check=False)


def test_nodes_with_a_disk_are_made_and_stay(api: KubeApi) -> None:
    disk = {"sizeMb": 100, "volumeClaim": {"storageClassName": "fast"}}
    for name, spec in {"kept": disk, "lost": {"sizeMb": 100}}.items():
        more = {"copies": 2, "moveMbPerSecond": 9, "objectStore": STORE}
        pool = make_object("KVCachePool", name, {"disk": spec, **more})
        pool["metadata"] = {"name": name, "namespace": "default"}
        api.apply(pool)
    with operator(api, "d") as process:
        claims = ("pvc", "-l", "kvasir.dev/pool=kept")
        [claim] = wait_for("a claim", lambda: api.json(*claims)["items"])
        assert claim["spec"]["storageClassName"] == "fast"
        assert claim["spec"]["resources"]["requests"] == {"storage": "110Mi"}
        wait_for("an emptyDir", lambda: "lost" in api("get", "statefulsets", "-o", "name"))
        [node] = api.json("statefulset", "lost")["spec"]["template"]["spec"]["containers"]
        assert {"AWS_ACCESS_KEY_ID", "AWS_REGION"} < {variable["name"] for variable in node["env"]}
        wait_for("reconciles that write nothing", lambda: is_quiet(api, process), limit_s=60)
    refusal = api(
        "patch", "kvp", "kept", "--type=merge", "-p", '{"spec":{"disk":null}}', check=False
    )
    assert "disk with volumeClaim cannot be set, changed or removed later" in refusal
    api("delete", "kvp", "kept", "lost")


def test_port_of_peers_is_free_where_links_are_plain(api: KubeApi) -> None:
    spec = {"model": MODEL, "router": {"grpcPort": 50054}, "security": {"mtls": False}}
    service = make_object("ModelService", "plain", spec)
    service["metadata"] = {"name": "plain", "namespace": "default"}
    assert "created" in api.apply(service)
    refusal = api.apply(service | {"spec": spec | {"security": {"mtls": True}}}, check=False)
    assert "choose another port" in refusal
    api("delete", "msvc", "plain")


def test_workers_with_vllm_are_made_and_stay(api: KubeApi) -> None:
    decode = {**VOLUMES, "resources": {"limits": {"nvidia.com/gpu": 1}}, "args": ["--seed", "1"]}
    service = make_object("ModelService", "gpu", {"model": MODEL, **VLLM, "decode": decode})
    service["metadata"] = {"name": "gpu", "namespace": "default"}
    with operator(api, "l") as process:
        api.apply(service)
        pods = ("pods", "-l", "kvasir.dev/pool=gpu-decode")
        [pod] = wait_for("a worker", lambda: api.json(*pods)["items"])
        [engine], [worker] = pod["spec"]["initContainers"], pod["spec"]["containers"]
        assert engine["restartPolicy"] == "Always"
        assert engine["resources"]["limits"] == {"nvidia.com/gpu": "1"}
        assert engine["args"][-2:] == ["--seed", "1"]
        assert "resources" not in worker or not worker["resources"]
        assert "gpu-prefill" not in api("get", "pfp", "-o", "name")
        wait_for("reconciles that write nothing", lambda: is_quiet(api, process), limit_s=60)
    changed = {"engine": "kvasir", "vllm": None}
    refusal = api.apply(service | {"spec": service["spec"] | changed}, check=False)
    assert "engine cannot be changed" in refusal
    pool = make_object("PrefillPool", "bad", {"model": MODEL, **VLLM})
    pool["metadata"] = {"name": "bad", "namespace": "default"}
    assert "engine must be kvasir, for vLLM hands no KV off" in api.apply(pool, check=False)
    pool |= {"kind": "DecodePool", "spec": pool["spec"] | {"kvNodes": ["a:1"]}}
    assert "kvNodes and lentReplicas need engine kvasir" in api.apply(pool, check=False)
    pool["spec"] = {"model": MODEL, **VLLM, "kvCodec": "int8"}
    assert "kvCodec needs engine kvasir" in api.apply(pool, check=False)


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
    cache = {"objectStore": STORE}
    image = {"reference": "models:1", "path": "/m", "asVolume": True}
    model = {"name": "tiny", "source": {"image": image}}
    service = make_object(
        "ModelService",
        "full",
        {
            "model": model,
            "decode": decode,
            "kvCache": cache,
            "weights": "int8",
            "kvCodec": "auto",
        },
    )
    service["metadata"] = {"name": "full", "namespace": "default"}
    with operator(api, "g") as process:
        api.apply(service)
        pods = ("pods", "-l", "kvasir.dev/pool=full-decode")
        [pod] = wait_for("a worker", lambda: api.json(*pods)["items"])
        assert pod["spec"]["topologySpreadConstraints"]
        assert pod["spec"]["affinity"]["podAffinity"]
        assert any("image" in volume for volume in pod["spec"]["volumes"])
        assert {"--kv-codec", "--weights"} <= set(pod["spec"]["containers"][0]["args"])
        wait_for("policies", lambda: "full-redis" in api("get", "networkpolicies"))
        patch = ("patch", "msvc", "full", "--type=merge", "-p")
        api(*patch, '{"spec": {"model": {"memoryMb": 700}}}')
        refusal = api(*patch, '{"spec": {"model": {"name": "other"}}}', check=False)
        assert "model cannot be changed" in refusal
        model = partial(api.json, "dcp", "full-decode")
        wait_for("the pool's", lambda: model()["spec"]["model"].get("memoryMb") == 700)
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
