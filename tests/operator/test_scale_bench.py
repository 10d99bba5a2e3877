"""The scale run: its objects are what an operator would have made; a small run keeps its word."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kube_api import needs_kube_api
from kvasir_operator.core.manifests import Ref, ref_of
from operator_builders import FakeCluster, make_object
from test_reconcile import make_reconciler

SCALE = Path(__file__).parents[2] / "e2e/scale"
sys.path.insert(0, str(SCALE))
import scale_objects  # noqa: E402


@pytest.mark.parametrize("number", range(3), ids=list(scale_objects.PLURALS))
async def test_operator_finds_nothing_to_do_but_the_status(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale_objects, "IMAGE", "kvasir:test")  # as the reconciler's
    cluster = FakeCluster()
    body = scale_objects.make_pool(number, pods=3)
    cluster.add(make_object(body["kind"], body["metadata"]["name"], body["spec"]))
    pool = Ref(body["kind"], "default", body["metadata"]["name"])
    for manifest in scale_objects.children_of(cluster.objects[pool]):
        child = await cluster.apply(manifest)
        if scale_objects.is_workload(child):
            cluster.objects[ref_of(child)]["status"] = scale_objects.workload_status(child)
            for pod in scale_objects.pods_of(child):
                pod["metadata"]["uid"] = f"uid-of-{pod['metadata']['name']}"
                pod["status"] = scale_objects.running_status(pod)
                cluster.pods.append(pod)
    assert len({pod["metadata"]["name"] for pod in cluster.pods}) == 3
    cluster.writes.clear()
    await make_reconciler(cluster).reconcile(pool)
    assert cluster.writes == [("status", pool)]
    assert scale_objects.is_settled(cluster.objects[pool])
    assert cluster.objects[pool]["status"]["readyReplicas"] == 3


@needs_kube_api
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_small_run_keeps_what_is_promised_at_rest(tmp_path: Path) -> None:
    """Latencies are bars of the full run: here a busy machine may spoil them."""
    result = tmp_path / "scale.json"
    size = ("--pools", "7", "--pods", "20", "--touched", "5", "--idle-s", "2")
    done = subprocess.run(
        [sys.executable, str(SCALE / "scale.py"), *size, "--json", str(result)],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "NO_COLOR": "1"},
        check=False,
    )
    assert result.exists(), done.stdout + done.stderr
    figures = json.loads(result.read_text())
    assert figures["first_start"]["writes"] == 14, "of each pool, the status and an event"
    assert figures["start_again"]["writes"] == 0
    idle = figures["idle"]
    assert (idle["writes"], idle["writes_that_the_api_server_counts"]) == (0, {})
    changes = ("spec_to_status_s", "pod_to_status_s", "drift_to_repair_s")
    assert [figures[what]["changes"] for what in changes] == [5, 5, 5]
