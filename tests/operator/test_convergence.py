"""Whatever the spec: a second plan after the first writes nothing, and planning is repeatable."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st
from kvasir_operator.core.manifests import Manifest, Ref
from kvasir_operator.core.plan import make_plan
from operator_builders import FakeCluster, make_decode_pool, make_service, make_world
from test_reconcile import DECODE, SERVICE, make_reconciler

SOURCES = st.sampled_from(
    [
        {"hostPath": {"path": "/m"}},
        {"pvc": {"claimName": "c"}},
        {"pvc": {"claimName": "c", "path": "sub"}},
        {"image": {"reference": "i:1"}},
        {"image": {"reference": "i:1", "path": "/x", "pullPolicy": "Never"}},
    ]
)
SETTINGS: Manifest = {
    "args": st.lists(st.sampled_from(["--a", "b", ""]), max_size=3),
    "env": st.lists(
        st.fixed_dictionaries(
            {"name": st.sampled_from(["A", "B", "KVASIR_POD_IP"]), "value": st.text(max_size=3)}
        ),
        unique_by=lambda variable: variable["name"],
        max_size=3,
    ),
    "nodeSelector": st.dictionaries(st.sampled_from(["zone", "disk"]), st.text(max_size=3)),
    "tolerations": st.lists(
        st.fixed_dictionaries({}, optional={"key": st.just("k"), "effect": st.just("NoExecute")}),
        max_size=2,
    ),
    "resources": st.fixed_dictionaries(
        {},
        optional={
            "limits": st.dictionaries(
                st.sampled_from(["cpu", "memory"]), st.sampled_from([1, "500m", "1Gi"])
            )
        },
    ),
}
WORKERS = st.fixed_dictionaries(
    {},
    optional={
        **SETTINGS,
        "replicas": st.integers(1, 5),
        "threads": st.integers(1, 4),
        "drainTimeoutSeconds": st.integers(1, 100),
    },
)


async def num_writes_of_second(obj: Manifest, ref: Ref) -> int:
    """Writes of the second of two reconciles."""
    cluster = FakeCluster()
    cluster.add(obj)
    reconciler = make_reconciler(cluster)
    assert (await reconciler.reconcile(ref)).num_writes > 0
    return (await reconciler.reconcile(ref)).num_writes


@settings(deadline=None, max_examples=50)
@given(
    source=SOURCES,
    prefill=WORKERS,
    decode=WORKERS,
    kv=st.none() | st.fixed_dictionaries({}, optional=SETTINGS),
    redis=st.sampled_from([{}, {"url": "redis://r:6379"}]),
)
def test_second_plan_of_a_service_is_empty(
    source: Manifest, prefill: Manifest, decode: Manifest, kv: Manifest | None, redis: Manifest
) -> None:
    model = {"name": "m", "source": source}
    service = make_service(model=model, prefill=prefill, decode=decode, redis=redis)
    service["spec"].pop("kvCache")
    if kv is not None:
        service["spec"]["kvCache"] = kv
    assert asyncio.run(num_writes_of_second(service, SERVICE)) == 0


@settings(deadline=None, max_examples=50)
@given(source=SOURCES, spec=WORKERS)
def test_second_plan_of_a_pool_is_empty(source: Manifest, spec: Manifest) -> None:
    pool = make_decode_pool(**{**spec, "model": {"name": "m", "source": source}})
    assert asyncio.run(num_writes_of_second(pool, DECODE)) == 0
    assert make_plan(make_world(pool)) == make_plan(make_world(pool))
