"""InferencePools and HTTPRoutes on a real API server: refused, missed, made, mended, removed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from kube_api import KubeApi, kube_api, needs_kube_api
from kube_operator import is_quiet, operator, wait_for
from operator_builders import condition_of, make_object

pytestmark = [needs_kube_api, pytest.mark.slow, pytest.mark.timeout(300)]

MODEL = {"name": "tiny", "source": {"hostPath": {"path": "/models/tiny"}}}
CRDS = Path(__file__).parents[1] / "fixtures/gateway-api/crds.yaml"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeApi]:
    with kube_api(tmp_path_factory.mktemp("gateway")) as found:
        yield found


def apply(api: KubeApi, name: str = "chat", *, check: bool = True, **spec: object) -> str:
    made = make_object("ModelService", name, {"model": MODEL, **spec})
    made["metadata"] = {"name": name, "namespace": "default"}
    return str(api.apply(made, check=check))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"gateway": {"pickerPort": 8000}, "router": {}}, "must differ from the router's"),
        ({"gateway": {"pickerPort": 50054}}, "must not be 50054"),
        ({"gateway": {}, "security": {"mtls": False}}, "pickerTls needs security.mtls"),
        ({"gateway": {"route": {"parents": []}}}, "should have at least 1 items"),
    ],
    ids=["router's port", "peers' port", "no certificate", "no parent"],
)
def test_what_cannot_work_is_refused(api: KubeApi, spec: dict[str, object], message: str) -> None:
    assert message in apply(api, "bad", check=False, **spec)


def test_pool_and_route_come_with_their_kinds_and_go_with_the_field(api: KubeApi) -> None:
    def degraded() -> str:
        status = api.json("msvc", "chat").get("status", {})
        return str(condition_of(status, "Degraded")["reason"]) if status else ""

    def found(kind: str) -> bool:
        return bool(api.json(kind)["items"])

    with operator(api, "a") as process:
        route = {"parents": [{"name": "edge"}], "hostnames": ["chat.example.com"]}
        apply(api, gateway={"route": route})
        wait_for("the missing kinds to be told", lambda: degraded() == "GatewayApiMissing")
        assert "gateway" not in api.json("msvc", "chat")["status"], "nothing is there yet"
        events = api("get", "events", "--field-selector=reason=GatewayApiMissing")
        assert "InferencePool" in events
        api("apply", "--server-side", "-f", str(CRDS))
        api("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
        wait_for("pool and route", lambda: found("inferencepools") and found("httproutes"))
        pool = api.json("inferencepool", "chat")
        service = api.json("service", "chat-router")["spec"]["ports"]
        picker = pool["spec"]["endpointPickerRef"]
        assert (picker["name"], picker["port"]["number"]) == ("chat-router", 9002)
        assert {"grpc-picker": 9002}.items() <= {p["name"]: p["port"] for p in service}.items()
        wait_for("no problem", lambda: degraded() == "NoProblem")
        made = {"inferencePool": "chat", "httpRoute": "chat"}
        assert api.json("msvc", "chat")["status"]["gateway"] == made
        wait_for("nothing left to write", lambda: is_quiet(api, process))
        patch = '{"spec":{"targetPorts":[{"number":1}]}}'
        api("patch", "inferencepool", "chat", "--type=merge", "-p", patch)

        def port() -> int:
            return int(api.json("inferencepool", "chat")["spec"]["targetPorts"][0]["number"])

        wait_for("the drift to be mended, by the watch alone", lambda: port() == 8000)
        api("delete", "httproute", "chat")
        wait_for("the route to be made again", lambda: found("httproutes"))
        apply(api)
        wait_for("both to go", lambda: not found("inferencepools") and not found("httproutes"))
        wait_for("the status", lambda: "gateway" not in api.json("msvc", "chat")["status"])
        api("delete", "msvc", "chat")
