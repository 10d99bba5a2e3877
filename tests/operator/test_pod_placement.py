"""Where pods go and who may talk to them."""

from kvasir_operator.core.manifests import Manifest, Ref
from operator_builders import (
    child_of,
    make_decode_pool,
    make_service,
    plan_for,
)
from test_plan_pool import NAME, pod_spec

ZONE = "topology.kubernetes.io/zone"


def policy_of(pool: Manifest) -> Manifest:
    """The spec of the pool's NetworkPolicy."""
    spec: Manifest = child_of(plan_for(pool), "NetworkPolicy", NAME)["spec"]
    return spec


def test_pods_are_spread_by_their_own_labels() -> None:
    spec = pod_spec(plan_for(make_decode_pool(topologySpread=[{"topologyKey": ZONE}])))
    [spread] = spec["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["maxSkew"]) == (ZONE, 1)
    assert spread["whenUnsatisfiable"] == "ScheduleAnyway"
    assert spread["labelSelector"]["matchLabels"]["kvasir.dev/pool"] == NAME


def test_workers_prefer_to_be_near_the_other_role() -> None:
    plan = plan_for(make_service(decode={"nearTopologyKey": ZONE}))
    decode = child_of(plan, "DecodePool", NAME)["spec"]
    assert decode["peerPool"] == "chat-prefill"
    pool = make_decode_pool(nearTopologyKey=ZONE, peerPool="chat-prefill")
    affinity = pod_spec(plan_for(pool))["affinity"]["podAffinity"]
    [term] = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
    assert term["podAffinityTerm"] == {
        "labelSelector": {"matchLabels": {"kvasir.dev/pool": "chat-prefill"}},
        "topologyKey": ZONE,
    }
    assert "affinity" not in pod_spec(plan_for(make_decode_pool(peerPool="chat-prefill")))


def test_model_image_can_be_mounted_instead_of_copied() -> None:
    image = {"reference": "models:1", "path": "/models/tiny/", "asVolume": True}
    pool = make_decode_pool(model={"name": "tiny", "source": {"image": image}})
    spec = pod_spec(plan_for(pool))
    assert "initContainers" not in spec
    volume = {"reference": "models:1", "pullPolicy": "IfNotPresent"}
    assert {"name": "model", "image": volume} in spec["volumes"]
    [mount] = [m for m in spec["containers"][0]["volumeMounts"] if m["name"] == "model"]
    assert (mount["subPath"], mount["readOnly"]) == ("models/tiny", True)


def test_gpus_are_a_resource_like_any_other() -> None:
    pool = make_decode_pool(resources={"limits": {"nvidia.com/gpu": 1}})
    assert pod_spec(plan_for(pool))["containers"][0]["resources"] == {
        "limits": {"nvidia.com/gpu": 1}
    }


def test_only_kvasir_reaches_grpc_and_kv_data() -> None:
    inner, everyone = policy_of(make_decode_pool(networkPolicy=True))["ingress"]
    assert {port["port"] for port in inner["ports"]} == {"grpc", "data"}
    sources = [set(peer["podSelector"]["matchLabels"].values()) for peer in inner["from"]]
    assert sources == [{"kvasir-operator"}, {"kvasir-operator"}]
    assert ["namespaceSelector" in peer for peer in inner["from"]] == [False, True]
    assert everyone == {"ports": [{"port": "http", "protocol": "TCP"}]}


def test_a_policy_that_is_no_longer_wanted_goes() -> None:
    live = child_of(plan_for(make_decode_pool(networkPolicy=True)), "NetworkPolicy", NAME)
    plan = plan_for(make_decode_pool(), live)
    assert plan.deletions == (Ref("NetworkPolicy", "default", NAME),)
    off = plan_for(make_service(networkPolicy=False))
    assert "NetworkPolicy" not in [child["kind"] for child in off.children]
    assert child_of(off, "DecodePool", NAME)["spec"]["networkPolicy"] is False
