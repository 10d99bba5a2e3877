"""The client of the Kubernetes API, against a server that answers what a test says."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp import web
from kvasir_operator.cluster import APPLY_PATCH, MERGE_PATCH, KubeCluster
from kvasir_operator.core.manifests import Ref
from kvasir_operator.errors import ClusterError
from kvasir_operator.main import Operator
from kvasir_operator.settings import OperatorSettings

SERVICE = Ref("Service", "ns", "x")


@dataclass
class FakeApi:
    """Records requests and answers them from a list; afterwards always 404."""

    answers: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    requests: list[tuple[str, str, str, dict[str, str], str]] = field(default_factory=list)
    is_asked: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: web.Request) -> web.Response:
        self.requests.append(
            (
                request.method,
                request.path,
                request.headers.get("Content-Type", ""),
                dict(request.query),
                await request.text(),
            )
        )
        self.is_asked.set()
        status, body = self.answers.pop(0) if self.answers else (404, {"reason": "NotFound"})
        return web.json_response(body, status=status)


@pytest.fixture
async def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeApi]:
    fake = FakeApi()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", fake.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    config = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [
            {"name": "c", "cluster": {"server": f"http://127.0.0.1:{runner.addresses[0][1]}"}}
        ],
        "users": [{"name": "u", "user": {"token": "secret"}}],
    }
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(path))
    yield fake
    await runner.cleanup()


@pytest.fixture
async def cluster(api: FakeApi) -> AsyncIterator[KubeCluster]:
    client = KubeCluster(timeout_s=5)
    yield client
    await client.close()


async def test_apply_is_a_forced_strict_server_side_apply(
    api: FakeApi, cluster: KubeCluster
) -> None:
    api.answers = [(200, {"kind": "Service"})]
    await cluster.apply({"kind": "Service", "metadata": {"name": "x", "namespace": "ns"}})
    [(method, path, content_type, params, _)] = api.requests
    assert (method, path) == ("PATCH", "/api/v1/namespaces/ns/services/x")
    assert content_type == APPLY_PATCH
    assert params == {
        "fieldManager": "kvasir-operator",
        "force": "true",
        "fieldValidation": "Strict",
    }


async def test_status_goes_to_the_subresource(api: FakeApi, cluster: KubeCluster) -> None:
    api.answers = [(200, {})]
    await cluster.apply_status(Ref("DecodePool", "ns", "x"), {"replicas": 1})
    path = api.requests[0][1]
    assert path == "/apis/kvasir.dev/v1alpha1/namespaces/ns/decodepools/x/status"


async def test_annotations_are_for_one_uid_only(api: FakeApi, cluster: KubeCluster) -> None:
    api.answers = [(200, {})]
    await cluster.annotate(Ref("Pod", "ns", "x"), "u1", {"a": "b"})
    assert api.requests[0][2] == MERGE_PATCH
    assert '"uid": "u1"' in api.requests[0][4]


async def test_missing_object_is_none_and_a_delete_of_it_no_error(
    api: FakeApi, cluster: KubeCluster
) -> None:
    assert await cluster.get(SERVICE) is None
    await cluster.delete(SERVICE, uid="u1")
    assert '"uid": "u1"' in api.requests[-1][4]


async def test_list_follows_pages(api: FakeApi, cluster: KubeCluster) -> None:
    api.answers = [
        (200, {"apiVersion": "v1", "items": [{"n": 1}], "metadata": {"continue": "more"}}),
        (200, {"apiVersion": "v1", "items": [{"n": 2}], "metadata": {}}),
    ]
    found = await cluster.list("Pod", "ns", labels={"a": "b"})
    assert [(pod["n"], pod["kind"], pod["apiVersion"]) for pod in found] == [
        (1, "Pod", "v1"),
        (2, "Pod", "v1"),
    ]
    assert api.requests[0][3]["labelSelector"] == "a=b"
    assert api.requests[1][3]["continue"] == "more"


async def test_list_of_nothing_may_say_null(api: FakeApi, cluster: KubeCluster) -> None:
    api.answers = [(200, {"apiVersion": "v1", "items": None, "metadata": {}})]
    assert await cluster.list("Pod", "ns") == []


async def test_expired_credentials_are_read_again_once(api: FakeApi, cluster: KubeCluster) -> None:
    api.answers = [(401, {}), (200, {"kind": "Service"})]
    assert await cluster.get(SERVICE) == {"kind": "Service"}
    api.answers = [(401, {}), (401, {})]
    with pytest.raises(ClusterError, match="401"):
        await cluster.get(SERVICE)


@pytest.mark.parametrize(
    ("status", "is_refusal", "is_conflict"),
    [(422, True, False), (403, True, False), (409, False, True), (500, False, False)],
)
async def test_errors_carry_what_the_server_said(
    api: FakeApi, cluster: KubeCluster, status: int, is_refusal: bool, is_conflict: bool
) -> None:
    api.answers = [(status, {"reason": "Why", "message": "because"})]
    with pytest.raises(ClusterError, match="because") as caught:
        await cluster.get(SERVICE)
    error = caught.value
    assert (error.is_refusal, error.is_conflict) == (is_refusal, is_conflict)
    assert error.reason == "Why"


async def test_server_that_is_away_is_an_error_with_status_0(
    api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = yaml.safe_load((tmp_path / "kubeconfig").read_text())
    config["clusters"][0]["cluster"]["server"] = "http://127.0.0.1:1"
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    client = KubeCluster(timeout_s=5)
    with pytest.raises(ClusterError) as caught:
        await client.get(SERVICE)
    assert caught.value.status == 0
    await client.close()


async def test_operator_is_alive_but_not_ready_without_crds(
    api: FakeApi, unused_tcp_port: int
) -> None:
    operator = Operator(OperatorSettings(image="kvasir", http_port=unused_tcp_port))
    running = asyncio.create_task(operator.run())
    url = f"http://127.0.0.1:{unused_tcp_port}"
    async with aiohttp.ClientSession() as session, asyncio.timeout(20):
        await api.is_asked.wait()
        async with session.get(f"{url}/healthz") as response:
            assert response.status == 200
        problems: list[str] = []
        while not problems or "CRDs" not in problems[0]:
            async with session.get(f"{url}/readyz") as response:
                assert response.status == 503
                problems = (await response.json())["problems"]
        assert "ModelService" in problems[0]
        async with session.get(f"{url}/metrics") as response:
            assert "kvasir_operator_api_requests_total" in await response.text()
        operator.stop()
        await running
