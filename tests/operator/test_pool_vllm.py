"""Pools whose engine is vLLM: the pod of a server and a worker, and a service without prefill."""

import json
from typing import Any

from kvasir_cli.settings_options import options
from kvasir_engine.worker.settings import WorkerSettings
from kvasir_kvstore.core import block
from kvasir_operator.core.manifests import Manifest
from kvasir_operator.core.vllm import BLOCK_TOKENS, VLLM_URL
from operator_builders import (
    child_of,
    condition_of,
    make_decode_pool,
    make_object,
    make_pod,
    make_service,
    make_workers,
    plan_for,
)
from test_plan_pool import pod_spec
from test_plan_service import make_pool, make_router

VLLM: dict[str, Any] = {"engine": "vllm", "vllm": {"image": "vllm:1"}}
GPU = {"limits": {"nvidia.com/gpu": 2}}


def containers_of(**settings: Any) -> tuple[Manifest, Manifest, Manifest]:
    """The pod's spec, vLLM's container and the worker's."""
    spec = pod_spec(plan_for(make_decode_pool(**VLLM, **settings)))
    [worker], [engine] = spec["containers"], spec["initContainers"]
    return spec, engine, worker


def make_vllm_service(**spec: Any) -> Manifest:
    """A ModelService `chat` with vLLM."""
    service = make_service(**VLLM, **spec)
    del service["spec"]["kvCache"]
    return service


def test_vllm_serves_the_model_to_its_own_pod_alone() -> None:
    _, engine, _ = containers_of()
    assert engine["command"] == ["vllm", "serve"]
    assert engine["args"][0] == "/model"
    text = " ".join(engine["args"])
    assert "--served-model-name tiny" in text
    assert "--host 127.0.0.1 --port 8000" in text
    assert "ports" not in engine
    assert {"name": "model", "mountPath": "/model", "readOnly": True} in engine["volumeMounts"]


def test_the_worker_follows_vllms_events_through_their_common_folder() -> None:
    _, engine, worker = containers_of()
    config = json.loads(engine["args"][engine["args"].index("--kv-events-config") + 1])
    assert (config["enable_kv_cache_events"], config["publisher"]) == (True, "zmq")
    told = {"--vllm-events": config["endpoint"], "--vllm-replay": config["replay_endpoint"]}
    for flag, url in told.items():
        assert worker["args"][worker["args"].index(flag) + 1] == url
        assert url.startswith("ipc:///tmp/")
    shared = {"name": "tmp", "mountPath": "/tmp"}
    assert shared in engine["volumeMounts"]
    assert shared in worker["volumeMounts"]
    size = engine["args"][engine["args"].index("--block-size") + 1]
    assert int(size) == block.BLOCK_TOKENS == BLOCK_TOKENS


def test_it_starts_before_the_worker_and_ends_after_it() -> None:
    _, engine, worker = containers_of()
    assert engine["restartPolicy"] == "Always"
    assert engine["startupProbe"]["exec"] == engine["livenessProbe"]["exec"]
    assert f"{VLLM_URL}/health" in engine["livenessProbe"]["exec"]["command"][-1]
    assert worker["readinessProbe"]["httpGet"]["path"] == "/readyz"


def test_what_users_set_is_vllms() -> None:
    spec, engine, worker = containers_of(
        resources=GPU,
        args=["--max-model-len", "4096"],
        env=[{"name": "HOME", "value": "/scratch"}],
        volumes=[{"name": "shm", "emptyDir": {"medium": "Memory"}}],
        volumeMounts=[{"name": "shm", "mountPath": "/dev/shm"}],
        nodeSelector={"gpu": "yes"},
    )
    assert (engine["resources"], worker.get("resources")) == (GPU, None)
    assert engine["args"][-2:] == ["--max-model-len", "4096"]
    assert "--max-model-len" not in worker["args"]
    assert [e for e in engine["env"] if e["name"] == "HOME"] == [
        {"name": "HOME", "value": "/scratch"}
    ]
    assert {"name": "shm", "mountPath": "/dev/shm"} in engine["volumeMounts"]
    assert "shm" not in {mount["name"] for mount in worker["volumeMounts"]}
    assert spec["nodeSelector"] == {"gpu": "yes"}


def test_the_worker_has_its_own_resources_and_known_flags() -> None:
    resources = {"requests": {"cpu": "500m"}}
    pool = make_decode_pool(engine="vllm", vllm={"image": "v:1", "workerResources": resources})
    [worker] = pod_spec(plan_for(pool))["containers"]
    assert worker["resources"] == resources
    assert worker["args"][worker["args"].index("--vllm-url") :][:2] == ["--vllm-url", VLLM_URL]
    assert worker["args"][worker["args"].index("--role") :][:2] == ["--role", "both"]
    known = {flag for option in options(WorkerSettings) for flag in option.opts}
    assert {arg for arg in worker["args"] if arg.startswith("--")} <= known


def test_both_containers_are_locked_down() -> None:
    _, engine, worker = containers_of()
    assert engine["securityContext"] == worker["securityContext"]
    written = {e["value"] for e in engine["env"] if e["name"].endswith(("HOME", "DIR"))}
    assert all(path.startswith("/tmp") for path in written)


def test_certificates_are_the_workers_and_its_streams_have_their_port() -> None:
    _, engine, worker = containers_of(tlsSecret="chat-kvasir-tls")
    assert "/tls" in {mount["mountPath"] for mount in worker["volumeMounts"]}
    assert "/tls" not in {mount["mountPath"] for mount in engine["volumeMounts"]}
    ports = {port["name"]: port["containerPort"] for port in worker["ports"]}
    at = worker["args"].index("--stream-port")
    assert worker["args"][at + 1] == str(ports["stream"])


def test_a_model_image_is_copied_before_vllm_starts() -> None:
    source = {"image": {"reference": "models:1"}}
    spec = pod_spec(plan_for(make_decode_pool(**VLLM, model={"name": "tiny", "source": source})))
    assert [c["name"] for c in spec["initContainers"]] == ["model", "vllm"]


def test_a_service_with_vllm_has_decode_workers_alone() -> None:
    plan = plan_for(make_vllm_service())
    kinds = [child["kind"] for child in plan.children]
    assert "PrefillPool" not in kinds
    decode = child_of(plan, "DecodePool", "chat-decode")["spec"]
    assert (decode["engine"], decode["vllm"]["image"]) == ("vllm", "vllm:1")
    router = child_of(plan, "Deployment", "chat-router")["spec"]["template"]["spec"]
    workers = [arg for arg in router["containers"][0]["args"] if arg.startswith("dns:chat-")]
    assert workers == [
        "dns:chat-decode.default.svc:50051",
        "dns:chat-router-peers.default.svc:50054",
    ]
    again = plan_for(make_object("DecodePool", "chat-decode", decode))
    [replica_set] = [c for c in again.children if c["kind"] == "ReplicaSet"]
    pod = replica_set["spec"]["template"]["spec"]
    assert [c["name"] for c in pod["initContainers"]] == ["vllm"]


def test_such_a_service_is_available_without_a_prefill_pool() -> None:
    pool = make_pool("DecodePool", "chat-decode")
    status = plan_for(make_vllm_service(), make_router(), pool).status
    assert condition_of(status, "Available")["status"] == "True"
    assert condition_of(status, "Progressing")["status"] == "False"
    assert "prefill" not in status


def test_the_last_words_of_vllm_are_told() -> None:
    pool = make_decode_pool(**VLLM)
    ended = {"exitCode": 1, "message": "CUDA error: out of memory"}
    entry = {"name": "vllm", "state": {"terminated": ended}, "ready": False}
    [pod] = make_workers(
        pool, make_pod("chat-decode-1", ready=False, initContainerStatuses=[entry])
    )
    message = condition_of(plan_for(pool, pods=(pod,)).status, "Degraded")["message"]
    assert "container vllm ended with exit code 1: CUDA error: out of memory" in message
