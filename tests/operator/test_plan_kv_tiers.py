"""Object stores of KV nodes, codecs and weights of workers: what reaches pods, what is refused."""

from pathlib import Path
from typing import Any, get_args

import pytest
from kvasir_cli.settings_options import options
from kvasir_engine.worker.settings import WorkerSettings
from kvasir_kvstore.node.settings import KvNodeSettings
from kvasir_operator.api import (
    DecodePoolSpec,
    KVCachePoolSpec,
    ModelServiceSpec,
)
from kvasir_operator.api_types import KvCodec, Weights
from kvasir_operator.core.manifests import Manifest
from kvasir_operator.core.slots import AGREED
from kvasir_operator.offline import plan_offline, read_resources
from operator_builders import (
    child_of,
    condition_of,
    make_decode_pool,
    make_object,
    make_pod,
    make_service,
    plan_for,
)
from pydantic import ValidationError
from pydantic.alias_generators import to_camel
from test_plan_pool import NAME, pod_spec
from test_pod_volumes import container_of
from test_selected_pools import make_pool, make_selecting, problems_of

STORE = {"url": "s3://blocks/chat", "endpoint": "http://minio:9000", "secretRef": {"name": "s3"}}
SAMPLE = Path(__file__).parents[2] / "docs/samples/kv-tiers.yaml"
PARTS = {"prefill": "PrefillPool", "decode": "DecodePool"}


def kv_node(**spec: Any) -> Manifest:
    """The container of a KVCachePool's nodes."""
    plan = plan_for(make_object("KVCachePool", "kv", spec))
    return container_of(child_of(plan, "StatefulSet", "kv")["spec"]["template"]["spec"])


def test_an_object_store_reaches_the_nodes_and_its_keys_only_their_environment() -> None:
    pool = child_of(
        plan_for(make_service(kvCache={"objectStore": STORE})), "KVCachePool", "chat-kv"
    )
    assert pool["spec"]["objectStore"] == STORE
    node = kv_node(objectStore=STORE)
    args = " ".join(node["args"])
    assert "--store-url s3://blocks/chat --store-endpoint http://minio:9000" in args
    assert "AWS" not in args
    known = {option for o in options(KvNodeSettings) for option in o.opts}
    assert {arg for arg in node["args"] if arg.startswith("--")} <= known
    found = {v["name"]: v["valueFrom"]["secretKeyRef"] for v in node["env"] if "AWS" in v["name"]}
    assert found == {
        "AWS_ACCESS_KEY_ID": {"name": "s3", "key": "AWS_ACCESS_KEY_ID"},
        "AWS_SECRET_ACCESS_KEY": {"name": "s3", "key": "AWS_SECRET_ACCESS_KEY"},
        "AWS_SESSION_TOKEN": {"name": "s3", "key": "AWS_SESSION_TOKEN", "optional": True},
        "AWS_REGION": {"name": "s3", "key": "AWS_REGION", "optional": True},
    }


def test_an_object_store_needs_neither_endpoint_nor_secret() -> None:
    env = [{"name": "AWS_REGION", "value": "eu-west-1"}]
    node = kv_node(objectStore={"url": "s3://blocks"}, env=env)
    assert "--store-endpoint" not in node["args"]
    assert [v for v in node["env"] if "AWS" in v["name"]] == env


def test_what_users_set_goes_before_the_keys_of_the_secret() -> None:
    env = [{"name": "AWS_REGION", "value": "eu-west-1"}]
    found = kv_node(objectStore=STORE, env=env)["env"]
    assert [v for v in found if v["name"] == "AWS_REGION"] == env


@pytest.mark.parametrize(
    "store",
    [
        {},
        {"url": "https://blocks"},
        {"url": "s3://key:secret@blocks"},
        {"url": "s3://B"},
        {"url": "s3://blocks/a b"},
        {"url": "s3://blocks", "endpoint": "minio:9000"},
        {"url": "s3://blocks", "secretRef": {"name": ""}},
    ],
)
def test_stores_that_no_node_could_open_are_refused(store: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        KVCachePoolSpec.model_validate({"objectStore": store})


def test_a_missing_secret_of_a_store_is_a_condition() -> None:
    waiting = {"reason": "CreateContainerConfigError", "message": 'secret "s3" not found'}
    status = {"name": "kv", "state": {"waiting": waiting}}
    pod = make_pod("kv-0", ready=False, running=False, containerStatuses=[status])
    plan = plan_for(make_object("KVCachePool", "kv", {"objectStore": STORE}), pods=(pod,))
    degraded = condition_of(plan.status, "Degraded")
    assert degraded["reason"] == "PodNotStarting"
    assert 'secret "s3" not found' in degraded["message"]


@pytest.mark.parametrize(("field", "kinds"), [("kv_codec", KvCodec), ("weights", Weights)])
def test_choices_of_the_api_are_those_of_workers(field: str, kinds: object) -> None:
    setting = WorkerSettings.model_fields[field]
    assert get_args(kinds) == get_args(setting.annotation)
    flag = f"--{field.replace('_', '-')}"
    assert flag in {option for o in options(WorkerSettings) for option in o.opts}
    for spec in (ModelServiceSpec, DecodePoolSpec):
        assert spec.model_fields[field].default == setting.default
    assert AGREED[to_camel(field)] == setting.default


AGREED_BY_ALL = [
    *(("kvCodec", "--kv-codec", codec) for codec in get_args(KvCodec) if codec != "raw"),
    *(("weights", "--weights", weights) for weights in get_args(Weights) if weights != "bf16"),
]


@pytest.mark.parametrize(("field", "flag", "value"), AGREED_BY_ALL)
@pytest.mark.parametrize("cache", [None, {}])
def test_what_all_workers_agree_on_reaches_both_roles(
    field: str, flag: str, value: str, cache: dict[str, str] | None
) -> None:
    plan = plan_for(make_service(kvCache=cache, **{field: value}))
    for part, kind in (("prefill", "PrefillPool"), ("decode", "DecodePool")):
        pool = child_of(plan, kind, f"chat-{part}")["spec"]
        assert pool[field] == value
        args = container_of(pod_spec(plan_for(make_object(kind, NAME, pool))))["args"]
        assert f"{flag} {value}" in " ".join(args)
    if cache is not None:
        nodes = child_of(plan, "KVCachePool", "chat-kv")["spec"]
        assert field not in nodes, "nodes serve any"


@pytest.mark.parametrize("cache", [None, {}])
def test_without_them_pods_are_as_they_were(cache: dict[str, str] | None) -> None:
    plan = plan_for(make_service(kvCache=cache))
    for part, kind in PARTS.items():
        spec = child_of(plan, kind, f"chat-{part}")["spec"]
        said = (spec["kvCodec"], spec["weights"], spec["kvCopies"])
        assert said == ("raw", "bf16", 1), "a return to them is a change"
    for pool in (make_decode_pool(), make_decode_pool(kvCodec="raw", weights="bf16")):
        args = container_of(pod_spec(plan_for(pool)))["args"]
        assert not {"--kv-codec", "--weights"} & set(args)
    assert not {"--store-url", "--store-endpoint"} & set(kv_node()["args"])


@pytest.mark.parametrize(
    ("service", "pool", "wanted"),
    [
        ({"kvCodec": "auto"}, {"kvCodec": "auto"}, ""),
        ({"kvCodec": "auto"}, {}, "kvCodec must be auto"),
        ({}, {"kvCodec": "int8"}, "kvCodec must be raw"),
        ({"weights": "int8"}, {"weights": "int8"}, ""),
        ({"weights": "int8"}, {}, "weights must be int8"),
        ({}, {"weights": "int4"}, "weights must be bf16"),
        ({}, {}, ""),
    ],
)
@pytest.mark.parametrize("is_all_selected", [False, True])
def test_selected_pools_agree_with_their_service(
    service: dict[str, str], pool: dict[str, str], wanted: str, *, is_all_selected: bool
) -> None:
    decode = make_pool("d", kind="DecodePool", **service)
    pools = {"decodePools": [{"name": "d"}]} if is_all_selected else {}
    selecting = make_selecting("gpu", **pools, **service)
    found = problems_of(plan_for(selecting, make_pool("gpu", **pool), decode))
    assert [reason for reason, _ in found] == (["LinkMismatch"] if wanted else [])
    assert not wanted or f"PrefillPool gpu: {wanted}" in found[0][1]


def test_the_sample_with_all_tiers_has_no_problems() -> None:
    [made] = plan_offline(read_resources(SAMPLE), image="kvasir:test")
    assert made.problems == ()
    workloads = [c for c in made.children if c["kind"] in ("ReplicaSet", "StatefulSet")]
    args = [" ".join(container_of(w["spec"]["template"]["spec"])["args"]) for w in workloads]
    assert sum("--kv-codec auto" in a for a in args) == 2
    assert sum("--store-url s3://kvasir-blocks/chat" in a for a in args) == 1
