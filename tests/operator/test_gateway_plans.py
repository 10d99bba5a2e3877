"""What a ModelService has for gateways: InferencePool, HTTPRoute, the routers' port, problems."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kvasir_cli.settings_options import options
from kvasir_operator.api import ModelServiceSpec
from kvasir_operator.core.gateway import gateway_refs
from kvasir_operator.core.manifests import Manifest, Ref, ref_of
from kvasir_operator.core.plan import make_plan
from kvasir_operator.offline import plan_offline, read_resources
from kvasir_router.settings import RouterSettings
from operator_builders import child_of, condition_of, make_service, make_world, plan_for

ROUTE = {"parents": [{"name": "edge", "namespace": "infra"}], "hostnames": ["chat.example.com"]}
SAMPLE = Path(__file__).parents[2] / "docs/samples/gateway.yaml"


def kinds(**spec: Any) -> set[str]:
    return {child["kind"] for child in plan_for(make_service(**spec)).children}


def router_of(**spec: Any) -> tuple[list[str], Manifest]:
    """The routers' arguments and their Service's ports."""
    plan = plan_for(make_service(**spec))
    pod = child_of(plan, "Deployment", "chat-router")["spec"]["template"]["spec"]
    service = child_of(plan, "Service", "chat-router")["spec"]["ports"]
    return pod["containers"][0]["args"], {port["name"]: port["port"] for port in service}


def test_nothing_is_made_that_nobody_asks_for() -> None:
    assert not kinds() & {"InferencePool", "HTTPRoute"}
    args, ports = router_of()
    assert "--picker-port" not in args
    assert set(ports) == {"http", "grpc"}
    assert gateway_refs(make_service()) == ()


def test_pool_names_the_routers_and_their_picker() -> None:
    service = make_service(gateway={"pickerPort": 9100}, router={"httpPort": 8100})
    pool = child_of(plan_for(service), "InferencePool", "chat")
    router = child_of(plan_for(service), "Deployment", "chat-router")
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
    assert pool["spec"]["selector"] == router["spec"]["selector"]
    assert pool["spec"]["targetPorts"] == [{"number": 8100}]
    assert pool["spec"]["endpointPickerRef"] == {
        "kind": "Service",
        "name": "chat-router",
        "port": {"number": 9100},
        "failureMode": "FailClose",
    }
    assert "HTTPRoute" not in kinds(gateway={})


def test_route_leads_from_its_parents_to_the_pool() -> None:
    plan = plan_for(make_service(gateway={"route": ROUTE}))
    route = child_of(plan, "HTTPRoute", "chat")["spec"]
    assert route["parentRefs"] == [{"name": "edge", "namespace": "infra"}]
    assert route["hostnames"] == ["chat.example.com"]
    [rule] = route["rules"]
    assert rule["backendRefs"] == [
        {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": "chat"}
    ]
    assert rule["timeouts"] == {"request": "600s"}


def test_status_names_what_is_there_and_ours() -> None:
    world = make_world(make_service(gateway={"route": ROUTE}))
    plan = make_plan(world)
    assert "gateway" not in plan.status, "nothing was made yet"
    pool = child_of(plan, "InferencePool", "chat")
    route = child_of(plan, "HTTPRoute", "chat")
    foreign = {**route, "metadata": {**route["metadata"], "ownerReferences": []}}
    live = {ref_of(pool): pool, ref_of(route): foreign}
    assert make_plan(replace(world, live=live)).status["gateway"] == {"inferencePool": "chat"}
    live = {ref_of(route): route}
    assert make_plan(replace(world, live=live)).status["gateway"] == {"httpRoute": "chat"}


@pytest.mark.parametrize(
    ("gateway", "security", "has_tls"),
    [({}, {}, True), ({"pickerTls": False}, {}, False), ({}, {"mtls": False}, False)],
    ids=["default", "plain picker", "plain links"],
)
def test_routers_answer_gateways_on_a_port_of_its_own(
    gateway: Manifest, security: Manifest, has_tls: bool
) -> None:
    args, ports = router_of(gateway=gateway, security=security)
    assert args[args.index("--picker-port") + 1] == "9002"
    assert args[args.index("--advertise-host") + 1] == "$(KVASIR_POD_IP)"
    assert ports["grpc-picker"] == 9002
    assert ("--picker-tls" in args) == has_tls
    known = {flag for option in options(RouterSettings) for flag in option.opts}
    assert {arg for arg in args if arg.startswith("--")} <= known


def test_picker_that_was_to_show_a_certificate_and_has_none_is_told() -> None:
    status = plan_for(make_service(gateway={}, security={"mtls": False})).status
    degraded = condition_of(status, "Degraded")
    assert (degraded["status"], degraded["reason"]) == ("True", "LinkMismatch")


def test_kinds_that_the_cluster_lacks_are_told_and_not_made() -> None:
    service = make_service(gateway={"route": ROUTE})
    plan = plan_for(service, unserved=frozenset({"InferencePool"}))
    assert "InferencePool" not in {child["kind"] for child in plan.children}
    assert "HTTPRoute" in {child["kind"] for child in plan.children}
    degraded = condition_of(plan.status, "Degraded")
    assert degraded["reason"] == "GatewayApiMissing"
    assert "inference.networking.k8s.io/v1" in degraded["message"]
    assert plan.requeue_after_ms, "they may be installed later"


def test_what_was_made_is_removed_when_nobody_asks_for_it_any_more() -> None:
    asked = make_world(make_service(gateway={"route": ROUTE}))
    kinds_made = ("InferencePool", "HTTPRoute")
    made = [child for child in make_plan(asked).children if child["kind"] in kinds_made]
    live = {ref_of(child): child for child in made}
    obj = {**make_service(), "status": make_plan(replace(asked, live=live)).status}
    plan = make_plan(replace(asked, obj=obj, live=live))
    assert set(plan.deletions) == {
        Ref("InferencePool", "default", "chat"),
        Ref("HTTPRoute", "default", "chat"),
    }
    assert "gateway" not in plan.status
    assert gateway_refs({**obj, "status": plan.status}) == (), "nobody looks for them afterwards"


def test_sample_is_planned_offline() -> None:
    [plan] = plan_offline(read_resources(SAMPLE), image="kvasir:test")
    assert {"InferencePool", "HTTPRoute"} <= {child["kind"] for child in plan.children}
    assert not plan.problems
    ModelServiceSpec.model_validate(plan.resource["spec"])
