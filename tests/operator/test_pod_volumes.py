"""Volumes, environment and secrets that users give to pods."""

from collections.abc import Callable
from typing import Any

import pytest
from kvasir_cli.settings_options import options
from kvasir_engine.worker.settings import WorkerSettings
from kvasir_kvstore.node.settings import KvNodeSettings
from kvasir_operator.core.admission import references_of, review
from kvasir_operator.core.manifests import Manifest, Ref
from operator_builders import child_of, make_decode_pool, make_object, make_service, plan_for
from test_link_plans import kv_pod, worker_pod
from test_plan_pool import pod_spec

SOURCES: dict[str, Manifest] = {
    "hostPath": {"path": "/dev/shm", "type": "Directory"},
    "persistentVolumeClaim": {"claimName": "adapters"},
    "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"},
    "configMap": {"name": "settings"},
    "secret": {"secretName": "ca", "optional": True},
    "image": {"reference": "adapters:1", "pullPolicy": "Always"},
}
URL_KEY = {"name": "index", "key": "url"}


def volumes_of(*sources: str) -> dict[str, Any]:
    """Settings of a part with a mounted volume for each source."""
    names = {source: source.lower() for source in sources}
    return {
        "volumes": [{"name": names[s], s: SOURCES[s]} for s in sources],
        "volumeMounts": [{"name": names[s], "mountPath": f"/mnt/{names[s]}"} for s in sources],
    }


def container_of(spec: Manifest) -> Manifest:
    """The main container of a pod's spec."""
    [container] = spec["containers"]
    assert isinstance(container, dict)
    return container


@pytest.mark.parametrize("source", SOURCES)
def test_a_volume_reaches_the_pod_as_it_was_written(source: str) -> None:
    spec = pod_spec(plan_for(make_decode_pool(**volumes_of(source))))
    name = source.lower()
    assert {"name": name, source: SOURCES[source]} in spec["volumes"]
    mounts = container_of(spec)["volumeMounts"]
    assert {"name": name, "mountPath": f"/mnt/{name}"} in mounts
    assert {"tmp", "model"} < {mount["name"] for mount in mounts}


def test_a_mount_says_read_only_only_if_it_is() -> None:
    settings = volumes_of("configMap")
    [mount] = settings["volumeMounts"]
    mount |= {"readOnly": True, "subPath": "a.json"}
    spec = pod_spec(plan_for(make_decode_pool(**settings)))
    assert mount in container_of(spec)["volumeMounts"]
    mount["readOnly"] = False
    spec = pod_spec(plan_for(make_decode_pool(**settings)))
    assert all(m.get("readOnly", True) for m in container_of(spec)["volumeMounts"])


def test_every_part_of_a_service_may_have_volumes() -> None:
    settings = volumes_of("emptyDir")
    parts = ("router", "prefill", "decode", "kvCache")
    plan = plan_for(make_service(**dict.fromkeys(parts, settings)))
    router = child_of(plan, "Deployment", "chat-router")["spec"]["template"]["spec"]
    assert {"name": "emptydir", "emptyDir": SOURCES["emptyDir"]} in router["volumes"]
    for kind, name in (("PrefillPool", "prefill"), ("DecodePool", "decode"), ("KVCachePool", "kv")):
        pool = child_of(plan, kind, f"chat-{name}")["spec"]
        assert [volume["name"] for volume in pool["volumes"]] == ["emptydir"]
        again = plan_for(make_object(kind, f"chat-{name}", pool))
        [workload] = [c for c in again.children if c["kind"] in ("ReplicaSet", "StatefulSet")]
        mounts = container_of(workload["spec"]["template"]["spec"])["volumeMounts"]
        assert {"name": "emptydir", "mountPath": "/mnt/emptydir"} in mounts


def test_volumes_belong_to_the_template_that_a_rollout_replaces() -> None:
    before = plan_for(make_decode_pool()).status["revision"]
    after = plan_for(make_decode_pool(**volumes_of("secret"))).status["revision"]
    assert before != after


def test_environment_may_come_from_secrets_and_config_maps() -> None:
    env = [
        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}},
        {"name": "LEVEL", "valueFrom": {"configMapKeyRef": {"name": "log", "key": "level"}}},
        {"name": "KVASIR_POD_NAME", "value": "mine"},
    ]
    found = container_of(pod_spec(plan_for(make_decode_pool(env=env))))["env"]
    assert [entry for entry in found if entry in env] == [env[2], *env[:2]]
    assert len({entry["name"] for entry in found}) == len(found)


def test_a_redis_url_from_a_secret_is_never_in_args() -> None:
    plan = plan_for(make_service(redis={"urlSecretRef": URL_KEY}))
    assert "chat-redis" not in {child["metadata"]["name"] for child in plan.children}
    for kind, name in (("DecodePool", "chat-decode"), ("KVCachePool", "chat-kv")):
        pool = child_of(plan, kind, name)["spec"]
        assert "redisUrl" not in pool
        again = plan_for(make_object(kind, name, pool))
        [workload] = [c for c in again.children if c["kind"] in ("ReplicaSet", "StatefulSet")]
        container = container_of(workload["spec"]["template"]["spec"])
        assert "--redis" not in container["args"]
        wanted = {"name": "KVASIR_REDIS", "valueFrom": {"secretKeyRef": URL_KEY}}
        assert wanted in container["env"]


@pytest.mark.parametrize("settings", [WorkerSettings, KvNodeSettings])
def test_the_processes_read_the_url_of_redis_from_their_environment(settings: type) -> None:
    [option] = [o for o in options(settings) if o.name == "redis"]
    assert option.envvar == "KVASIR_REDIS"


def test_missing_claims_of_volumes_are_told_of_once() -> None:
    claim = Ref("PersistentVolumeClaim", "default", "adapters")
    settings = volumes_of("persistentVolumeClaim")
    for obj in (
        make_decode_pool(**settings),
        make_service(router=settings, decode=settings),
    ):
        assert references_of(obj).count(claim) == 1
        [warning] = review(obj, {}).warnings
        assert "PersistentVolumeClaim adapters does not exist" in warning


CHOSEN, FOLDER = "/run/kvasir", "/run/kvasir/default.kvasir-kv"


@pytest.mark.parametrize("part", ["prefill", "decode", "kv"])
def test_parts_of_a_service_share_a_folder_of_the_node_by_choice(part: str) -> None:
    kind = {"prefill": "PrefillPool", "decode": "DecodePool", "kv": "KVCachePool"}[part]
    chosen = plan_for(make_service(kvCache={}, kvSocketHostPath=CHOSEN))
    assert child_of(chosen, kind, f"chat-{part}")["spec"]["kvSocketHostPath"] == CHOSEN
    usual = plan_for(make_service(kvCache={}))
    assert "kvSocketHostPath" not in child_of(usual, kind, f"chat-{part}")["spec"]


@pytest.mark.parametrize("pod_of", [worker_pod, kv_pod])
def test_a_pod_finds_the_sockets_of_its_node_and_nobody_else_may(
    pod_of: Callable[..., Manifest],
) -> None:
    spec = pod_of(kvSocketHostPath=CHOSEN)["spec"]
    arguments = container_of(spec)["args"]
    assert arguments[arguments.index("--kv-socket-dir") + 1] == "/kv-sockets"
    folder = {"path": FOLDER, "type": "DirectoryOrCreate"}
    assert {"name": "kvasir-kv-sockets", "hostPath": folder} in spec["volumes"]
    mount = {"name": "kvasir-kv-sockets", "mountPath": "/kv-sockets"}
    assert mount in container_of(spec)["volumeMounts"]
    [maker] = [c for c in spec["initContainers"] if c["name"] == "kv-sockets"]
    assert maker["volumeMounts"] == [mount]
    assert "0700" in maker["command"], "others could connect and read the pool"
    assert maker["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN", "FOWNER"]}


@pytest.mark.parametrize("pod_of", [worker_pod, kv_pod])
def test_without_that_choice_a_pod_is_restricted(pod_of: Callable[..., Manifest]) -> None:
    spec = pod_of()["spec"]
    assert "--kv-socket-dir" not in container_of(spec)["args"]
    assert not any(v["name"] == "kvasir-kv-sockets" for v in spec["volumes"])
    assert all("runAsUser" not in c["securityContext"] for c in spec.get("initContainers", []))
