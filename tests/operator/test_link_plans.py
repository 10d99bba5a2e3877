"""What mutual TLS changes of the pods, and the operator's own calls over it."""

import asyncio
import base64
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from kvasir_operator import metrics
from kvasir_operator import roles as roles_module
from kvasir_operator.api_security import ROUTER_PEER_PORT
from kvasir_operator.certificates import Bundle, make_bundle
from kvasir_operator.core.manifests import TLS_ANNOTATION, WORKER_STREAM_PORT, Manifest, Ref
from kvasir_operator.core.plan import LinkSecrets, secrets_of
from kvasir_operator.core.slots import with_links_kept
from kvasir_operator.core.views import Door, pod_view
from kvasir_operator.roles import RoleSetter
from kvasir_operator.routers import Routers, router_doors
from kvasir_proto.links import AUTHORITIES, CERTIFICATE, KEY, Links
from kvasir_proto.v1 import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from operator_builders import (
    child_of,
    make_channels,
    make_decode_pool,
    make_object,
    make_pod,
    make_pod_view,
    make_service,
    plan_for,
)

SERVICE = Ref("ModelService", "default", "chat")
ON, OFF = {"mtls": True}, {"mtls": False}


def pod_of(workload: Manifest) -> Manifest:
    template: Manifest = workload["spec"]["template"]
    return template


def flag(pod: Manifest, name: str) -> str | None:
    args = pod["spec"]["containers"][0]["args"]
    return args[args.index(name) + 1] if name in args else None


def volumes(pod: Manifest) -> dict[str, Manifest]:
    return {volume["name"]: volume for volume in pod["spec"]["volumes"]}


def port_names(pod: Manifest) -> set[str]:
    return {port["name"] for port in pod["spec"]["containers"][0]["ports"]}


def worker_pod(**spec: Any) -> Manifest:
    children = plan_for(make_decode_pool(**spec)).children
    return pod_of(next(c for c in children if c["kind"] == "ReplicaSet"))


def kv_pod(**spec: Any) -> Manifest:
    plan = plan_for(make_object("KVCachePool", "chat-kv", {"replicas": 1, **spec}))
    return pod_of(child_of(plan, "StatefulSet", "chat-kv"))


def test_service_gives_its_secret_to_router_and_pools() -> None:
    plan = plan_for(make_service(security=ON))
    router = pod_of(child_of(plan, "Deployment", "chat-router"))
    assert flag(router, "--tls-dir") == "/tls"
    assert flag(router, "--peer-port") == str(ROUTER_PEER_PORT)
    assert flag(router, "--peer") == f"dns:chat-router-peers.default.svc:{ROUTER_PEER_PORT}"
    assert port_names(router) == {"http", "grpc", "peer"}
    assert router["metadata"]["annotations"] == {TLS_ANNOTATION: "chat-kvasir-tls"}
    for kind, name in (("PrefillPool", "prefill"), ("DecodePool", "decode"), ("KVCachePool", "kv")):
        assert child_of(plan, kind, f"chat-{name}")["spec"]["tlsSecret"] == "chat-kvasir-tls"


def test_redis_of_a_secure_service_has_no_plain_port() -> None:
    plan = plan_for(make_service(security=ON))
    redis = pod_of(child_of(plan, "Deployment", "chat-redis"))
    assert (flag(redis, "--port"), flag(redis, "--tls-port")) == ("0", "6379")
    assert flag(redis, "--tls-auth-clients") == "yes"
    assert flag(redis, "--tls-cert-file") == "/tls/tls.crt"
    [container] = redis["spec"]["containers"]
    assert "--tls-dir" not in container["args"], "redis-server has no such"
    for probe in (container["readinessProbe"], container["livenessProbe"]):
        assert probe["exec"]["command"] == ["redis-cli", "-s", "/tmp/redis.sock", "ping"]
    assert volumes(redis)["kvasir-tls"]["secret"]["secretName"] == "chat-kvasir-tls"
    for kind, name in (("DecodePool", "decode"), ("KVCachePool", "kv")):
        url = child_of(plan, kind, f"chat-{name}")["spec"]["redisUrl"]
        assert url == "rediss+mtls://chat-redis.default.svc:6379/0"


def test_redis_of_a_plain_service_is_as_it_was() -> None:
    plan = plan_for(make_service(security={"mtls": False}))
    redis = pod_of(child_of(plan, "Deployment", "chat-redis"))
    assert redis["spec"]["containers"][0]["command"] == ["redis-server"]
    assert flag(redis, "--port") == "6379"
    assert redis["spec"]["containers"][0]["livenessProbe"]["tcpSocket"] == {"port": "redis"}
    assert "kvasir-tls" not in volumes(redis)
    url = child_of(plan, "KVCachePool", "chat-kv")["spec"]["redisUrl"]
    assert url == "redis://chat-redis.default.svc:6379/0"


def test_peers_are_not_offered_to_clients() -> None:
    plan = plan_for(make_service(security=ON))
    ports = {
        name: {port["name"] for port in child_of(plan, "Service", name)["spec"]["ports"]}
        for name in ("chat-router", "chat-router-peers")
    }
    assert ports == {"chat-router": {"http", "grpc"}, "chat-router-peers": {"http", "grpc", "peer"}}


def test_pods_see_what_they_need_of_the_secret_and_no_more() -> None:
    for pod in (worker_pod(tlsSecret="chat-kvasir-tls"), kv_pod(tlsSecret="chat-kvasir-tls")):
        secret = volumes(pod)["kvasir-tls"]["secret"]
        assert secret["secretName"] == "chat-kvasir-tls"
        assert [item["key"] for item in secret["items"]] == ["tls.crt", "tls.key", "ca.crt"]
        assert secret["defaultMode"] == 0o440
        [mount] = [
            m for m in pod["spec"]["containers"][0]["volumeMounts"] if m["name"] == "kvasir-tls"
        ]
        assert mount == {"name": "kvasir-tls", "mountPath": "/tls", "readOnly": True}


def test_streams_of_workers_have_a_port_of_their_own() -> None:
    pod = worker_pod(tlsSecret="chat-kvasir-tls")
    assert flag(pod, "--stream-port") == str(WORKER_STREAM_PORT)
    assert port_names(pod) == {"grpc", "http", "data", "stream"}
    assert "stream" not in port_names(kv_pod(tlsSecret="chat-kvasir-tls"))
    plan = plan_for(make_decode_pool(tlsSecret="chat-kvasir-tls", networkPolicy=True))
    policy = child_of(plan, "NetworkPolicy", "chat-decode")["spec"]["ingress"]
    assert [port["port"] for port in policy[0]["ports"]] == ["grpc", "data", "stream"]
    assert [port["port"] for port in policy[1]["ports"]] == ["http"]


def test_plain_pods_know_nothing_of_it() -> None:
    plan = plan_for(make_service(security=OFF))
    router = pod_of(child_of(plan, "Deployment", "chat-router"))
    for pod in (router, worker_pod(), kv_pod()):
        assert flag(pod, "--tls-dir") is None
        assert "kvasir-tls" not in volumes(pod)
        assert "annotations" not in pod["metadata"]
    assert "tlsSecret" not in child_of(plan, "DecodePool", "chat-decode")["spec"]


@pytest.mark.parametrize(
    ("security", "secrets"),
    {
        "off": (OFF, None),
        "made": (ON, LinkSecrets("chat-kvasir-tls", True, "chat-kvasir-kv-key")),
        "of somebody else": (
            {**ON, "secretName": "own"},
            LinkSecrets("own", False, "chat-kvasir-kv-key"),
        ),
        "without a key": ({**ON, "encryptKv": False}, LinkSecrets("chat-kvasir-tls", True, "")),
    }.values(),
    ids=["off", "made", "of somebody else", "without a key"],
)
def test_secrets_of_a_service(security: Manifest, secrets: object) -> None:
    assert secrets_of(make_service(security=security)) == secrets


def test_workers_and_kv_nodes_get_the_key_of_kv_and_routers_do_not() -> None:
    plan = plan_for(make_service(security=ON))
    router = pod_of(child_of(plan, "Deployment", "chat-router"))
    assert flag(router, "--kv-key-file") is None
    for kind, name in (("PrefillPool", "prefill"), ("DecodePool", "decode"), ("KVCachePool", "kv")):
        assert child_of(plan, kind, f"chat-{name}")["spec"]["kvKeySecret"] == "chat-kvasir-kv-key"
    keyed = {"tlsSecret": "chat-kvasir-tls", "kvKeySecret": "chat-kvasir-kv-key"}
    for pod in (worker_pod(**keyed), kv_pod(**keyed)):
        assert flag(pod, "--kv-key-file") == "/kv-key/kv.key"
        secret = volumes(pod)["kvasir-kv-key"]["secret"]
        assert secret["secretName"] == "chat-kvasir-kv-key"
        assert [item["key"] for item in secret["items"]] == ["kv.key"]


def test_door_of_a_pod_is_as_the_pod_was_made() -> None:
    """While pods are replaced, some are plain and some are not."""
    ports = [{"name": "grpc", "containerPort": 1}, {"name": "peer", "containerPort": 2}]
    body = {"spec": {"containers": [{"ports": ports}]}}
    plain, secure = make_pod("a"), make_pod("b", podIP="10.0.0.2")
    secure["metadata"]["annotations"] = {TLS_ANNOTATION: "chat-kvasir-tls"}
    assert router_doors([plain | body, secure | body]) == [
        Door("10.0.0.1:1", "default", ""),
        Door("10.0.0.2:2", "default", "chat-kvasir-tls"),
    ]
    assert [pod_view(pod, "").tls_secret for pod in (plain, secure)] == ["", "chat-kvasir-tls"]


class FakeRouter(inference_pb2_grpc.InferenceServicer):
    async def Fleet(self, request: Any, context: Any) -> inference_pb2.FleetView:
        return inference_pb2.FleetView()


class FakeWorker(worker_pb2_grpc.WorkerServicer):
    async def SetRole(self, request: Any, context: Any) -> worker_pb2.WorkerDescription:
        return worker_pb2.WorkerDescription(role=request.role)


BUNDLE = make_bundle("chat.default.kvasir.internal", now=datetime.now(UTC))
FOREIGN = make_bundle("chat.default.kvasir.internal", now=datetime.now(UTC))


def made_secret(bundle: Bundle, *, trust: bytes) -> Manifest:
    files = {CERTIFICATE: bundle.certificate, KEY: bundle.key, AUTHORITIES: trust}
    data = {name: base64.b64encode(value).decode() for name, value in files.items()}
    metadata = {"name": "chat-kvasir-tls", "namespace": "default", "uid": "s"}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data}


@pytest.fixture
async def port(tmp_path: Path) -> AsyncIterator[int]:
    """A router and a worker behind mutual TLS."""
    files = {CERTIFICATE: BUNDLE.certificate, KEY: BUNDLE.key, AUTHORITIES: BUNDLE.ca}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(FakeRouter(), server)
    worker_pb2_grpc.add_WorkerServicer_to_server(FakeWorker(), server)
    bound = Links(tmp_path).listen(server, "127.0.0.1:0")
    await server.start()
    yield bound
    await server.stop(None)


def router_pod(port: int) -> Manifest:
    pod = make_pod("chat-router-x", podIP="127.0.0.1")
    pod["metadata"]["annotations"] = {TLS_ANNOTATION: "chat-kvasir-tls"}
    return pod | {"spec": {"containers": [{"ports": [{"name": "peer", "containerPort": port}]}]}}


@pytest.mark.parametrize(
    ("secret", "is_answered"),
    {
        "its own": (made_secret(BUNDLE, trust=BUNDLE.ca), True),
        "foreign": (made_secret(FOREIGN, trust=BUNDLE.ca), False),
        "no secret": (None, False),
        "no data": ({**made_secret(BUNDLE, trust=b""), "data": {}}, False),
    }.values(),
    ids=["its own", "foreign", "no secret", "no data"],
)
async def test_operator_is_answered_with_the_service_s_certificate_alone(
    port: int, secret: Manifest | None, is_answered: bool
) -> None:
    routers = Routers(make_channels(*([secret] if secret else [])))
    known = await routers.facts(SERVICE, [router_pod(port)])
    assert (known is not None) is is_answered


@pytest.mark.parametrize("has_secret", [True, False], ids=["with", "without"])
async def test_role_is_told_over_tls(
    port: int, has_secret: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roles_module, "WORKER_GRPC_PORT", port)
    channels = make_channels(*([made_secret(BUNDLE, trust=BUNDLE.ca)] if has_secret else []))
    setter = RoleSetter(channels, on_progress=lambda _: None)
    counted = metrics.ROLE_FLIPS.labels("flipped" if has_secret else "failed")
    before = counted._value.get()
    pod = make_pod_view("w", ip="127.0.0.1", tls_secret="chat-kvasir-tls")
    assert setter.start(Ref("DecodePool", "default", "chat-decode"), pod, "prefill")
    await asyncio.gather(*setter._calls.values())
    assert counted._value.get() == before + 1
    assert setter.told() == ({"uid-of-w": "prefill"} if has_secret else {})


def test_a_service_of_an_earlier_release_stays_plain_until_told() -> None:
    """Its old and new pods would not talk to one another."""
    spec = make_service()["spec"]
    open_service = {**make_service(), "spec": {k: v for k, v in spec.items() if k != "security"}}
    plain = child_of(plan_for(make_service(security=OFF)), "Deployment", "chat-router")
    secure = child_of(plan_for(make_service(security=ON)), "Deployment", "chat-router")
    assert secrets_of(with_links_kept(open_service, plain)) is None
    assert secrets_of(with_links_kept(open_service, secure)) == secrets_of(open_service) is not None
    assert secrets_of(with_links_kept(open_service, None)) is not None
    chosen = make_service(security=ON)
    assert with_links_kept(chosen, plain) is chosen
