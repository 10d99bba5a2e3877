"""Events: what people ask about, once per change."""

import pytest
from kvasir_operator.core.events import EVENTS_MAX, events_between
from kvasir_operator.core.manifests import Manifest
from kvasir_operator.core.views import DrainView
from operator_builders import FakeCluster
from test_reconcile import (
    DECODE,
    REPLICA_SET,
    FakeDrainer,
    make_reconciler,
    make_settled_pool,
    settle,
)


def make_status(*, draining: tuple[str, ...] = (), **conditions: tuple[str, str]) -> Manifest:
    """A status with conditions Type=(status, reason)."""
    return {
        "conditions": [
            {"type": kind, "status": status, "reason": reason, "message": f"because of {reason}"}
            for kind, (status, reason) in conditions.items()
        ],
        "drainingPods": [{"name": name} for name in draining],
    }


NEW: Manifest = {}
FINE = make_status(Available=("True", "Ready"), Degraded=("False", "NoProblem"))
CHANGES = {
    "begins": (NEW, make_status(Available=("False", "WorkersNotReady")), []),
    "begins without a problem": (NEW, make_status(Degraded=("False", "NoProblem")), []),
    "becomes available": (
        make_status(Available=("False", "WorkersNotReady")),
        FINE,
        [("Normal", "Available")],
    ),
    "is lost": (
        FINE,
        make_status(Available=("False", "WorkersNotReady")),
        [("Warning", "WorkersNotReady")],
    ),
    "goes wrong": (
        FINE,
        make_status(Available=("True", "Ready"), Degraded=("True", "ContainerFailed")),
        [("Warning", "ContainerFailed")],
    ),
    "goes wrong at once": (
        NEW,
        make_status(Degraded=("True", "ModelUnavailable")),
        [("Warning", "ModelUnavailable")],
    ),
    "recovers": (
        make_status(Degraded=("True", "ContainerFailed")),
        make_status(Degraded=("False", "NoProblem")),
        [("Normal", "NoProblem")],
    ),
    "rolls": (
        make_status(Progressing=("False", "Stable")),
        make_status(Progressing=("True", "RollingOut")),
        [("Normal", "RolloutStarted")],
    ),
    "has rolled": (
        make_status(Progressing=("True", "RollingOut")),
        make_status(Progressing=("False", "Stable")),
        [("Normal", "RolloutFinished")],
    ),
    "drains": (
        FINE,
        FINE | make_status(draining=("a",)) | {"conditions": FINE["conditions"]},
        [("Normal", "WorkerDraining")],
    ),
    "has drained": (make_status(draining=("a",)), make_status(), [("Normal", "WorkerDrained")]),
    "contested": (
        FINE,
        make_status(ReplicasContested=("True", "SeveralOwners")),
        [("Warning", "SeveralOwners")],
    ),
    "nothing": (FINE, FINE, []),
}


@pytest.mark.parametrize(("before", "after", "told"), CHANGES.values(), ids=CHANGES)
def test_change_of_a_status_is_told(
    before: Manifest, after: Manifest, told: list[tuple[str, str]]
) -> None:
    found = events_between(before, after)
    assert [("Warning" if e.is_warning else "Normal", e.reason) for e in found] == told


def test_a_flood_is_bounded() -> None:
    many = make_status(draining=tuple(f"p{n}" for n in range(50)))
    assert len(events_between(NEW, many)) == EVENTS_MAX


async def test_a_scale_in_is_told_once() -> None:
    cluster, drainer = FakeCluster(), FakeDrainer()
    await make_settled_pool(cluster, replicas=2)
    cluster.told.clear()
    reconciler = make_reconciler(cluster, drainer)
    cluster.objects[DECODE]["spec"]["replicas"] = 1
    for _ in range(3):
        await reconciler.reconcile(DECODE)
    assert [event["reason"] for event in cluster.told] == ["WorkerDraining"]
    [event] = cluster.told
    assert event["involvedObject"]["kind"] == "DecodePool"
    assert "chat-decode-0" in event["message"]
    drainer.drains["uid-of-chat-decode-0"] = DrainView(0, 0, is_over=True)
    await reconciler.reconcile(DECODE)
    assert cluster.objects[REPLICA_SET]["spec"]["replicas"] == 1
    settle(cluster, pods=1)
    await reconciler.reconcile(DECODE)
    told = [event["reason"] for event in cluster.told]
    assert sorted(told) == ["Scaling", "WorkerDrained", "WorkerDraining"]
