"""What a ModelService has for gateways: an InferencePool of its routers, and perhaps an HTTPRoute.

The routers' pods are the pool's endpoints, and the routers' Service is its endpoint picker. Their
kinds are not Kubernetes' own: where the API server does not serve them, the status says so.
"""

from kvasir_operator.api import MODEL_SERVICE, ModelServiceSpec
from kvasir_operator.api_gateway import GatewayRoute, GatewaySettings
from kvasir_operator.core.conditions import Problem, Reason
from kvasir_operator.core.manifests import (
    API_OF_GATEWAY_KIND,
    Manifest,
    Owner,
    Ref,
    child,
    is_owned_by,
    ref_of,
    role_labels,
    without_empty,
)
from kvasir_operator.core.slots import link_secret
from kvasir_operator.core.world import World

PICKER = "grpc-picker"  # a name that service meshes take for gRPC
PATH = "/v1"
STATUS_FIELDS = {"InferencePool": "inferencePool", "HTTPRoute": "httpRoute"}


def gateway_refs(obj: Manifest) -> tuple[Ref, ...]:
    """What a ModelService asks for, or has asked for until now, that gateways are to see."""
    if obj["kind"] != MODEL_SERVICE.kind:
        return ()
    if not obj.get("spec", {}).get("gateway") and not obj.get("status", {}).get("gateway"):
        return ()
    metadata = obj["metadata"]
    return tuple(Ref(kind, metadata["namespace"], metadata["name"]) for kind in API_OF_GATEWAY_KIND)


def gateway_children(world: World, spec: ModelServiceSpec) -> list[Manifest]:
    """The objects that gateways see, as far as the API server knows their kinds."""
    if spec.gateway is None:
        return []
    made = [_pool(world.owner, spec, spec.gateway)]
    if spec.gateway.route is not None:
        made.append(_route(world.owner, spec.gateway.route))
    return [manifest for manifest in made if manifest["kind"] not in world.unserved]


def gateway_problems(world: World, spec: ModelServiceSpec) -> list[Problem]:
    """Why gateways will not find the service."""
    if spec.gateway is None:
        return []
    wanted = ["InferencePool", *(["HTTPRoute"] if spec.gateway.route else [])]
    found = [
        Problem(
            Reason.GATEWAY_API_MISSING,
            f"the cluster has no {kind} ({API_OF_GATEWAY_KIND[kind]}), which spec.gateway needs: "
            "install the CRDs of the Gateway API and its Inference Extension, or remove it",
        )
        for kind in wanted
        if kind in world.unserved
    ]
    if spec.gateway.picker_tls and not link_secret(world.owner.name, spec):
        text = "gateway.pickerTls needs security.mtls: set mtls, or pickerTls to false"
        found.append(Problem(Reason.LINK_MISMATCH, text))
    return found


def picker_args(world: World, spec: ModelServiceSpec) -> tuple[str, ...]:
    """How a router is told to answer gateways."""
    if spec.gateway is None:
        return ()
    has_tls = spec.gateway.picker_tls and link_secret(world.owner.name, spec)
    return (
        *("--picker-port", str(spec.gateway.picker_port)),
        *("--advertise-host", "$(KVASIR_POD_IP)"),
        *(("--picker-tls",) if has_tls else ()),
    )


def picker_ports(spec: ModelServiceSpec) -> dict[str, int]:
    """The routers' port for gateways."""
    return {PICKER: spec.gateway.picker_port} if spec.gateway else {}


def gateway_status(world: World, spec: ModelServiceSpec) -> Manifest:
    """What is there for gateways, of what is asked for."""
    made = {}
    for manifest in gateway_children(world, spec):
        live = world.live.get(ref_of(manifest))
        if live is not None and is_owned_by(live, world.owner.uid):
            made[STATUS_FIELDS[manifest["kind"]]] = manifest["metadata"]["name"]
    return {"gateway": made} if made else {}


def _pool(owner: Owner, spec: ModelServiceSpec, gateway: GatewaySettings) -> Manifest:
    labels = role_labels(owner, "router")
    return child(
        owner,
        API_OF_GATEWAY_KIND["InferencePool"],
        "InferencePool",
        name=owner.name,
        labels=labels,
        spec={
            "selector": {"matchLabels": labels},
            "targetPorts": [{"number": spec.router.http_port}],
            "endpointPickerRef": {
                "kind": "Service",
                "name": f"{owner.name}-router",
                "port": {"number": gateway.picker_port},
                "failureMode": gateway.failure_mode,
            },
        },
    )


def _route(owner: Owner, route: GatewayRoute) -> Manifest:
    group, _, _ = API_OF_GATEWAY_KIND["InferencePool"].partition("/")
    rule = {
        "matches": [{"path": {"type": "PathPrefix", "value": PATH}}],
        "backendRefs": [{"group": group, "kind": "InferencePool", "name": owner.name}],
        "timeouts": {"request": f"{route.timeout_seconds}s"},
    }
    parents = [parent.model_dump(by_alias=True, exclude_none=True) for parent in route.parents]
    return child(
        owner,
        API_OF_GATEWAY_KIND["HTTPRoute"],
        "HTTPRoute",
        name=owner.name,
        labels=role_labels(owner, "router"),
        spec=without_empty(
            {"parentRefs": parents, "hostnames": list(route.hostnames), "rules": [rule]}
        ),
    )
