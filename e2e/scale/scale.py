"""The operator with 1,000 pools and 10,000 pods on a real API server; figures as JSON.

Everything is written before the operator starts, as its plans and Kubernetes' controllers would
have made it; neither controllers nor a scheduler run, so that the API server has the machine. The
operator runs here, with the cluster's kubeconfig, so that its memory can be read. The cluster is
that of --kubeconfig, else etcd and API server alone, if KUBEBUILDER_ASSETS names a folder with
them, else a kind cluster without controllers and scheduler.

    python e2e/scale/scale.py --json bench/results/operator-scale.json
"""

import argparse
import asyncio
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "tests/operator")]
from e2e_shell import ROOT, run, say  # noqa: E402
from kube_api import ASSETS, kube_api  # noqa: E402
from scale_run import Size, measure  # noqa: E402

CLUSTER = "kvasir-scale"
STATIC_PODS = ("kube-scheduler", "kube-controller-manager")


@contextmanager
def kind_cluster(folder: Path) -> Iterator[str]:
    """A kind cluster without controllers and scheduler; its kubeconfig."""
    kubeconfig = str(folder / "kubeconfig")
    run("kind", "delete", "cluster", "--name", CLUSTER, limit_s=300)
    node_image = os.environ.get("KIND_NODE_IMAGE", "")
    command = ["kind", "create", "cluster", "--name", CLUSTER, "--wait", "180s"]
    command += ["--config", str(ROOT / "e2e/scale/kind.yaml"), "--kubeconfig", kubeconfig]
    run(*command, *(["--image", node_image] if node_image else []), limit_s=360)
    try:
        manifests = [f"/etc/kubernetes/manifests/{name}.yaml" for name in STATIC_PODS]
        run("docker", "exec", f"{CLUSTER}-control-plane", "rm", *manifests)
        yield kubeconfig
    finally:
        if not os.environ.get("KEEP"):
            run("kind", "delete", "cluster", "--name", CLUSTER, limit_s=300)


def cluster(stack: ExitStack, folder: Path, kubeconfig: str) -> tuple[str, str]:
    """The kubeconfig to use, and what kind of cluster it is of."""
    if kubeconfig:
        return kubeconfig, "given"
    if ASSETS:
        api = stack.enter_context(kube_api(folder, controllers=""))
        return str(api.kubeconfig), "etcd and API server alone"
    return stack.enter_context(kind_cluster(folder)), "kind"


def verdict(figures: dict[str, Any]) -> list[str]:
    """What the figures do not keep of what is promised."""
    broken = []
    for what in ("spec_to_status_s", "pod_to_status_s", "drift_to_repair_s"):
        if figures[what]["p99"] >= 1:
            broken.append(f"{what} is 1 s or more at p99")
    if figures["reconcile_s_at_most"]["p99"] > 1:
        broken.append("a reconcile takes more than 1 s at p99")
    if max(figures["rss_max_mb"], figures["start_again"]["rss_max_mb"]) >= 250:
        broken.append("the operator takes 250 MB or more")
    idle = figures["idle"]
    if idle["writes"] or idle["calls"] or idle["writes_that_the_api_server_counts"]:
        broken.append("an idle operator calls the API server")
    if figures["start_again"]["writes"]:
        broken.append("an operator that starts writes what is there already")
    return broken


def main() -> None:
    """Run and write the figures; status 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pools", type=int, default=1000)
    parser.add_argument("--pods", type=int, default=10_000, help="at least one per pool")
    parser.add_argument("--touched", type=int, default=300, help="pools that are changed")
    parser.add_argument("--idle-s", type=int, default=90, help="longer than the resync interval")
    parser.add_argument("--changes-per-s", type=float, default=20)
    parser.add_argument("--kubeconfig", default="", help="of a cluster that is there already")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    if not 1 <= args.pools <= args.pods:
        parser.error("--pods: at least one per pool")
    size = Size(args.pools, args.pods, args.touched, args.idle_s, args.changes_per_s)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ["KUBECONFIG"], kind = cluster(stack, folder, args.kubeconfig)
        figures = asyncio.run(measure(size, folder))
    cpu = re.search(r"model name\s+: (.+)", Path("/proc/cpuinfo").read_text())
    machine = {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }
    settings = {
        "cluster": kind,
        "pools": size.pools,
        "pods": size.pods,
        "changes_per_s": size.changes_per_s,
    }
    result = {"bench": "operator-scale", "machine": machine, "settings": settings, **figures}
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    broken = verdict(figures)
    for words in broken:
        say(f"BROKEN: {words}")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
