"""Reconciles against a cluster in memory: convergence, no idle writes, refusals, drains."""

import pytest
from kvasir_operator.core.manifests import (
    DELETION_COST_ANNOTATION,
    DRAIN_ANNOTATION,
    Manifest,
    Ref,
)
from kvasir_operator.core.views import DrainView, PodView
from kvasir_operator.errors import ClusterError
from kvasir_operator.reconcile import Reconciler
from kvasir_operator.roles import RoleSetter
from kvasir_operator.routers import Routers
from kvasir_operator.secrets import SecretKeeper
from kvasir_operator.telemetry import Collector
from operator_builders import (
    FakeCluster,
    condition_of,
    make_channels,
    make_decode_pool,
    make_object,
    make_pod,
    make_service,
    make_workers,
    revision_of,
)

SERVICE = Ref("ModelService", "default", "chat")
DECODE = Ref("DecodePool", "default", "chat-decode")
SET_NAME = f"chat-decode-{revision_of(make_decode_pool())}"
REPLICA_SET = Ref("ReplicaSet", "default", SET_NAME)


class FakeDrainer:
    """Records which workers were asked to drain."""

    def __init__(self) -> None:
        self.drains: dict[str, DrainView] = {}
        self.timeouts_s: list[int] = []

    def views(self) -> dict[str, DrainView]:
        """See Drainer."""
        return self.drains

    def start(self, pool: Ref, pod: PodView, *, timeout_s: int) -> bool:
        """See Drainer."""
        assert pool == DECODE
        self.drains[pod.uid] = DrainView()
        self.timeouts_s.append(timeout_s)
        return True


def make_reconciler(cluster: FakeCluster, drainer: FakeDrainer | None = None) -> Reconciler:
    """A reconciler of this cluster."""
    setter = RoleSetter(make_channels(), on_progress=lambda _: None)
    return Reconciler(
        cluster,
        drainer or FakeDrainer(),
        setter,
        Routers(make_channels()),
        Collector(make_channels()),
        SecretKeeper(cluster),
        default_image="kvasir:test",
    )


def settle(cluster: FakeCluster, *, pods: int) -> None:
    """Do what the ReplicaSet controller and the kubelet do."""
    live = cluster.objects[REPLICA_SET]
    live["status"] = {"observedGeneration": live["metadata"]["generation"], "replicas": pods}
    pool = cluster.objects[DECODE]
    cluster.pods = make_workers(pool, *(make_pod(f"chat-decode-{n}") for n in range(pods)))


async def make_settled_pool(cluster: FakeCluster, *, replicas: int) -> Reconciler:
    """A pool with all its pods ready; no writes recorded yet."""
    cluster.add(make_decode_pool(replicas=replicas))
    reconciler = make_reconciler(cluster)
    await reconciler.reconcile(DECODE)
    settle(cluster, pods=replicas)
    await reconciler.reconcile(DECODE)
    cluster.writes.clear()
    return reconciler


async def test_second_reconcile_of_a_service_writes_nothing() -> None:
    cluster = FakeCluster()
    cluster.add(make_service())
    reconciler = make_reconciler(cluster)
    assert (await reconciler.reconcile(SERVICE)).num_writes == 14
    cluster.writes.clear()
    assert (await reconciler.reconcile(SERVICE)).num_writes == 0
    assert cluster.writes == []


async def test_second_reconcile_of_kv_nodes_writes_nothing() -> None:
    cluster = FakeCluster()
    cluster.add(make_object("KVCachePool", "chat-kv", {"replicas": 1}))
    reconciler = make_reconciler(cluster)
    nodes = Ref("KVCachePool", "default", "chat-kv")
    await reconciler.reconcile(nodes)
    cluster.writes.clear()
    await reconciler.reconcile(nodes)
    assert cluster.writes == []


async def test_settled_pool_writes_nothing() -> None:
    cluster = FakeCluster()
    reconciler = await make_settled_pool(cluster, replicas=2)
    outcome = await reconciler.reconcile(DECODE)
    assert cluster.writes == []
    assert outcome.requeue_after_ms is None


async def test_drift_is_repaired_and_foreign_fields_stay() -> None:
    cluster = FakeCluster()
    reconciler = await make_settled_pool(cluster, replicas=1)
    live = cluster.objects[REPLICA_SET]
    live["spec"]["template"]["spec"]["enableServiceLinks"] = True
    live["metadata"]["labels"]["team"] = "serving"
    await reconciler.reconcile(DECODE)
    assert cluster.writes[0] == ("apply", REPLICA_SET)
    template = cluster.objects[REPLICA_SET]["spec"]["template"]
    assert template["spec"]["enableServiceLinks"] is False
    assert cluster.objects[REPLICA_SET]["metadata"]["labels"]["team"] == "serving"


class StaleCluster(FakeCluster):
    """Reads show an object as it was before somebody made it anew."""

    def __init__(self) -> None:
        super().__init__()
        self.stale: dict[Ref, Manifest] = {}

    async def get(self, ref: Ref) -> Manifest | None:
        """See Cluster."""
        return self.stale[ref] if ref in self.stale else await super().get(ref)


async def test_object_made_anew_by_others_is_not_taken_over() -> None:
    cluster = StaleCluster()
    reconciler = await make_settled_pool(cluster, replicas=1)
    budget = Ref("PodDisruptionBudget", "default", "chat-decode")
    seen = await cluster.get(budget)
    assert seen is not None
    seen["spec"]["maxUnavailable"] = 7  # drift, which is to be repaired
    cluster.stale[budget] = seen
    theirs: Manifest = {
        "kind": "PodDisruptionBudget",
        "metadata": {"name": budget.name, "namespace": "default", "uid": "theirs"},
        "spec": {"maxUnavailable": 7},
    }
    cluster.add(theirs)
    with pytest.raises(ClusterError, match="409"):
        await reconciler.reconcile(DECODE)
    assert cluster.objects[budget] is theirs
    cluster.stale.clear()
    await reconciler.reconcile(DECODE)
    status = cluster.objects[DECODE]["status"]
    assert condition_of(status, "Degraded")["reason"] == "NameConflict"


async def test_status_after_a_change_tells_of_the_change() -> None:
    cluster = FakeCluster()
    reconciler = await make_settled_pool(cluster, replicas=1)
    pool = cluster.objects[DECODE]
    pool["spec"]["image"] = "kvasir:next"
    pool["metadata"]["generation"] = 2
    await reconciler.reconcile(DECODE)
    status: Manifest = cluster.objects[DECODE]["status"]
    assert status["observedGeneration"] == 2
    assert condition_of(status, "Progressing")["reason"] == "RollingOut"


async def test_scale_in_marks_drains_then_removes() -> None:
    cluster, drainer = FakeCluster(), FakeDrainer()
    await make_settled_pool(cluster, replicas=2)
    reconciler = make_reconciler(cluster, drainer)
    cluster.objects[DECODE]["spec"]["replicas"] = 1
    await reconciler.reconcile(DECODE)
    annotations = cluster.pods[0]["metadata"]["annotations"]
    assert DRAIN_ANNOTATION in annotations
    assert int(annotations[DELETION_COST_ANNOTATION]) < 0
    assert drainer.timeouts_s == [60]
    assert cluster.objects[REPLICA_SET]["spec"]["replicas"] == 2
    drainer.drains["uid-of-chat-decode-0"] = DrainView(0, 0, is_over=True)
    await reconciler.reconcile(DECODE)
    assert cluster.objects[REPLICA_SET]["spec"]["replicas"] == 1
    assert drainer.timeouts_s == [60]


async def test_drain_of_an_earlier_operator_is_taken_up_without_a_new_mark() -> None:
    cluster, drainer = FakeCluster(), FakeDrainer()
    await make_settled_pool(cluster, replicas=2)
    cluster.objects[DECODE]["spec"]["replicas"] = 1
    now = "2999-01-01T00:00:00+00:00"
    pool = cluster.objects[DECODE]
    cluster.pods[1:] = make_workers(pool, make_pod("chat-decode-1", drain_started=now))
    await make_reconciler(cluster, drainer).reconcile(DECODE)
    assert list(drainer.drains) == ["uid-of-chat-decode-1"]
    assert "annotate" not in [verb for verb, _ in cluster.writes]


async def test_refused_child_becomes_a_condition_and_the_rest_is_applied() -> None:
    cluster = FakeCluster()
    cluster.add(make_decode_pool())
    cluster.refused[REPLICA_SET] = ClusterError(422, "Invalid", "spec.x: wrong")
    await make_reconciler(cluster).reconcile(DECODE)
    degraded = condition_of(cluster.objects[DECODE]["status"], "Degraded")
    assert degraded["reason"] == "ApplyFailed"
    assert "spec.x: wrong" in degraded["message"]
    assert Ref("Service", "default", "chat-decode") in cluster.objects


async def test_warning_event_of_a_waiting_pod_reaches_the_condition() -> None:
    cluster = FakeCluster()
    await make_settled_pool(cluster, replicas=1)
    pool = cluster.objects[DECODE]
    cluster.pods = make_workers(pool, make_pod("chat-decode-0", running=False, ready=False))
    text = 'FailedMount: volume "model" : /nope is not a directory'
    cluster.warnings = {"uid-of-chat-decode-0": text}
    await make_reconciler(cluster).reconcile(DECODE)
    degraded = condition_of(cluster.objects[DECODE]["status"], "Degraded")
    assert degraded["reason"] == "ModelUnavailable"
    assert "/nope is not a directory" in degraded["message"]


async def test_deleted_object_is_left_to_the_garbage_collector() -> None:
    cluster = FakeCluster()
    assert (await make_reconciler(cluster).reconcile(SERVICE)).is_gone
    service = make_service()
    service["metadata"]["deletionTimestamp"] = "2025-06-15T00:00:00Z"
    cluster.add(service)
    assert (await make_reconciler(cluster).reconcile(SERVICE)).is_gone
    assert cluster.writes == []
