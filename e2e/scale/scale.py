"""The operator with 1,000 pools and 10,000 pods on a real API server; figures as JSON.

The pods are made by Kubernetes' own controllers and stay objects: there is no scheduler, and this
script writes their status in the kubelet's place. The operator runs here, with the cluster's
kubeconfig, so that its memory can be read.

    python e2e/scale/scale.py --json bench/results/operator-scale.json
"""

import argparse
import asyncio
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[1]))
from e2e_shell import ROOT, CommandError, Kubectl, metric, run, say, wait_for

CLUSTER = "kvasir-scale"
NAMESPACE = "kvasir-scale"
OPERATOR_PORT = 18470
PROXY_PORT = 18471
OPERATOR_URL = f"http://127.0.0.1:{OPERATOR_PORT}"
API_URL = f"http://127.0.0.1:{PROXY_PORT}"
PODS = f"{API_URL}/api/v1/namespaces/{NAMESPACE}/pods"
PLURALS = {
    "PrefillPool": "prefillpools",
    "DecodePool": "decodepools",
    "KVCachePool": "kvcachepools",
}
WRITERS = 16
POLL_S = 1.0
CHANGES = 200  # pools that are changed, to see how soon the operator has acted
RECONCILE_SECONDS = "kvasir_operator_reconcile_seconds"
WRITES = "kvasir_operator_api_writes_total"


@dataclass(frozen=True)
class Size:
    """How much there is of everything."""

    pools: int
    pods_per_pool: int
    idle_s: int


def pool(kind: str, number: int, size: Size) -> dict[str, Any]:
    """One pool; its pods are never started."""
    spec: dict[str, Any] = {"replicas": size.pods_per_pool}
    if kind != "KVCachePool":
        spec["model"] = {"name": "none", "source": {"image": {"reference": "none"}}}
    return {
        "apiVersion": "kvasir.dev/v1alpha1",
        "kind": kind,
        "metadata": {"name": f"pool-{number}", "namespace": NAMESPACE},
        "spec": spec,
    }


def pools(size: Size) -> list[dict[str, Any]]:
    """All pools, of the three kinds in turn."""
    kinds = list(PLURALS)
    return [pool(kinds[n % len(kinds)], n, size) for n in range(size.pools)]


@contextmanager
def cluster(folder: Path) -> Iterator[Kubectl]:
    """A kind cluster without a scheduler, with the CRDs."""
    kubeconfig = str(folder / "kubeconfig")
    run("kind", "delete", "cluster", "--name", CLUSTER, limit_s=300)
    node_image = os.environ.get("KIND_NODE_IMAGE", "")
    command = ["kind", "create", "cluster", "--name", CLUSTER, "--wait", "180s"]
    command += ["--config", str(ROOT / "e2e/scale/kind.yaml"), "--kubeconfig", kubeconfig]
    run(*command, *(["--image", node_image] if node_image else []), limit_s=360)
    try:
        kubectl = Kubectl(kubeconfig, NAMESPACE, cache=str(folder / "cache"))
        manifest = "/etc/kubernetes/manifests/kube-scheduler.yaml"
        run("docker", "exec", f"{CLUSTER}-control-plane", "rm", manifest)
        kubectl("apply", "--server-side", "-f", str(ROOT / "crds"))
        kubectl("wait", "--for=condition=Established", "crd", "--all", quiet=True)
        kubectl("create", "namespace", NAMESPACE)
        yield kubectl
    finally:
        if not os.environ.get("KEEP"):
            run("kind", "delete", "cluster", "--name", CLUSTER, limit_s=300)


@contextmanager
def process(*command: str, log: Path, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended with the block."""
    with log.open("wb") as out:
        child = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **env}
        )
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait(10)


@contextmanager
def operator(kubectl: Kubectl, folder: Path) -> Iterator[int]:
    """The operator of this checkout; its process id."""
    kvasir = str(Path(sys.executable).parent / "kvasir")
    command = (kvasir, "operator", "--image", "kvasir:none", "--host", "127.0.0.1")
    log = folder / "operator.log"
    port = ("--http-port", str(OPERATOR_PORT))
    with process(*command, *port, log=log, KUBECONFIG=kubectl.kubeconfig) as child:
        wait_for("the operator to be ready", _is_operator_ready, limit_s=60)
        try:
            yield child.pid
        except BaseException:
            say(log.read_text(errors="replace")[-4000:])
            raise
        trouble = [line for line in log.read_text().splitlines() if " ERROR " in line]
        assert trouble == [], trouble[:5]


def _is_operator_ready() -> bool:
    return bool(urllib.request.urlopen(f"{OPERATOR_URL}/readyz", timeout=5).status == 200)


async def fake_kubelet(stop: asyncio.Event) -> None:
    """Write the status of every pod that has none: running and ready."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=WRITERS)) as session:
        slots = asyncio.Semaphore(WRITERS)
        known: set[str] = set()
        while not stop.is_set():
            async with session.get(PODS, params={"resourceVersion": "0"}) as answer:
                items = (await answer.json())["items"]
            fresh = [pod for pod in items if pod["metadata"]["uid"] not in known]
            async with asyncio.TaskGroup() as tasks:
                for pod in fresh:
                    known.add(pod["metadata"]["uid"])
                    tasks.create_task(_run_pod(session, slots, pod))
            await asyncio.sleep(0 if fresh else POLL_S)


async def _run_pod(
    session: aiohttp.ClientSession, slots: asyncio.Semaphore, pod: dict[str, Any]
) -> None:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    kinds = ("PodScheduled", "Initialized", "ContainersReady", "Ready")
    container = pod["spec"]["containers"][0]
    status = {
        "phase": "Running",
        "podIP": "127.0.0.1",
        "podIPs": [{"ip": "127.0.0.1"}],
        "startTime": now,
        "conditions": [{"type": k, "status": "True", "lastTransitionTime": now} for k in kinds],
        "containerStatuses": [
            {
                "name": container["name"],
                "image": container["image"],
                "imageID": "none",
                "ready": True,
                "started": True,
                "restartCount": 0,
                "state": {"running": {"startedAt": now}},
            }
        ],
    }
    url = f"{PODS}/{pod['metadata']['name']}/status"
    headers = {"Content-Type": "application/merge-patch+json"}
    async with slots, session.patch(url, json={"status": status}, headers=headers) as answer:
        if answer.status not in (200, 404):
            raise CommandError(f"status of a pod: {answer.status} {await answer.text()}")


async def create_pools(size: Size) -> None:
    """Create all pools, WRITERS at a time."""
    slots = asyncio.Semaphore(WRITERS)

    async def create(body: dict[str, Any]) -> None:
        url = f"{API_URL}/apis/kvasir.dev/v1alpha1/namespaces/{NAMESPACE}/{PLURALS[body['kind']]}"
        async with slots, session.post(url, json=body) as answer:
            if answer.status != 201:
                raise CommandError(f"{answer.status} {await answer.text()}")

    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:
        for body in pools(size):
            tasks.create_task(create(body))


async def list_pools(session: aiohttp.ClientSession) -> list[dict[str, Any]]:
    """All pools of all kinds."""
    items: list[dict[str, Any]] = []
    for plural in PLURALS.values():
        url = f"{API_URL}/apis/kvasir.dev/v1alpha1/namespaces/{NAMESPACE}/{plural}"
        async with session.get(url, params={"resourceVersion": "0"}) as answer:
            items += [{**item, "plural": plural} for item in (await answer.json())["items"]]
    return items


def is_settled(item: dict[str, Any]) -> bool:
    """Whether a pool serves and nothing is under way."""
    conditions = item.get("status", {}).get("conditions", [])
    found = {c["type"]: c["status"] for c in conditions}
    return found.get("Available") == "True" and found.get("Progressing") == "False"


async def wait_until_settled(size: Size, *, limit_s: float) -> float:
    """Wait until every pool is settled; how long that took, in seconds."""
    started_s = told_s = time.monotonic()
    async with aiohttp.ClientSession() as session:
        while True:
            num_settled = sum(is_settled(item) for item in await list_pools(session))
            now_s = time.monotonic()
            if num_settled == size.pools:
                return now_s - started_s
            if now_s - started_s > limit_s:
                raise CommandError(f"{num_settled} of {size.pools} pools after {limit_s:.0f} s")
            if now_s - told_s > 15:
                told_s = now_s
                say(f"  {num_settled} of {size.pools} pools are settled")
            await asyncio.sleep(2 * POLL_S)


async def change_pools() -> list[float]:
    """Change one pool after another; seconds from each write until its status describes it."""
    taken_s = []
    async with aiohttp.ClientSession() as session:
        items = [i for i in await list_pools(session) if i["kind"] == "KVCachePool"][:CHANGES]
        for item in items:
            name = item["metadata"]["name"]
            url = f"{API_URL}/apis/kvasir.dev/v1alpha1/namespaces/{NAMESPACE}/kvcachepools/{name}"
            headers = {"Content-Type": "application/merge-patch+json"}
            change = {"spec": {"maxReplicas": 99}}
            started_s = time.monotonic()
            async with session.patch(url, json=change, headers=headers) as answer:
                wanted = (await answer.json())["metadata"]["generation"]
            while True:
                async with session.get(url) as answer:
                    if (await answer.json())["status"].get("observedGeneration") == wanted:
                        break
                if time.monotonic() - started_s > 60:
                    raise CommandError(f"{name} is not reconciled after 60 s")
                await asyncio.sleep(0.005)
            taken_s.append(time.monotonic() - started_s)
    return taken_s


def buckets() -> dict[float, float]:
    """The cumulative histogram of the time of a reconcile, over all kinds."""
    text = urllib.request.urlopen(f"{OPERATOR_URL}/metrics", timeout=20).read().decode()
    found: dict[float, float] = {}
    for match in re.finditer(rf'{RECONCILE_SECONDS}_bucket{{.*le="(.+?)".*}} (.+)', text):
        bound = float(match[1].replace("+Inf", "inf"))
        found[bound] = found.get(bound, 0.0) + float(match[2])
    return found


def quantile_s(before: dict[float, float], after: dict[float, float], share: float) -> float:
    """The bound of the bucket that this quantile of the reconciles in between lies in."""
    counts = {bound: after[bound] - before.get(bound, 0.0) for bound in sorted(after)}
    wanted = share * counts[float("inf")]
    return next(bound for bound, count in counts.items() if count >= wanted)


def memory_mb(pid: int, field: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    assert found, field
    return round(int(found[1]) / 1024, 1)


def percentile(values: list[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))], 3)


async def measure(size: Size, pid: int) -> dict[str, Any]:
    """Fill the cluster, let it settle, change some of it, then leave it alone."""
    stop = asyncio.Event()
    kubelet = asyncio.create_task(fake_kubelet(stop))
    started_s = time.monotonic()
    await create_pools(size)
    say(f"{size.pools} pools created in {time.monotonic() - started_s:.0f} s")
    settled_s = await wait_until_settled(size, limit_s=1800)
    say(f"all settled after {settled_s:.0f} s; RSS {memory_mb(pid, 'VmRSS')} MB")
    await asyncio.sleep(5)
    before = buckets()
    taken_s = await change_pools()
    after = buckets()
    p50_s, p99_s = percentile(taken_s, 0.5), percentile(taken_s, 0.99)
    say(f"{len(taken_s)} changes: p50 {p50_s} s, p99 {p99_s} s")
    await asyncio.sleep(5)
    writes, calls = metric(OPERATOR_URL, WRITES), buckets()[float("inf")]
    await asyncio.sleep(size.idle_s)
    figures = {
        "settle_s": round(settled_s, 1),
        "change_to_status_s": {"p50": p50_s, "p99": p99_s},
        "reconcile_s_at_most": {
            "p50": quantile_s(before, after, 0.5),
            "p99": quantile_s(before, after, 0.99),
        },
        "idle_s": size.idle_s,
        "idle_reconciles": buckets()[float("inf")] - calls,
        "idle_writes": metric(OPERATOR_URL, WRITES) - writes,
        "rss_mb": memory_mb(pid, "VmRSS"),
        "rss_max_mb": memory_mb(pid, "VmHWM"),
    }
    stop.set()
    await kubelet
    return figures


def verdict(figures: dict[str, Any]) -> list[str]:
    """What the figures do not keep of what is promised."""
    broken = []
    if figures["change_to_status_s"]["p99"] >= 1:
        broken.append("a change takes 1 s or more at p99")
    if figures["reconcile_s_at_most"]["p99"] > 1:
        broken.append("a reconcile takes more than 1 s at p99")
    if figures["rss_max_mb"] >= 250:
        broken.append("the operator takes 250 MB or more")
    if figures["idle_writes"]:
        broken.append("an idle operator writes")
    return broken


def main() -> None:
    """Run and write the figures; status 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pools", type=int, default=1000)
    parser.add_argument("--pods-per-pool", type=int, default=10)
    parser.add_argument("--idle-s", type=int, default=90, help="longer than the resync interval")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    size = Size(args.pools, args.pods_per_pool, args.idle_s)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kubectl = stack.enter_context(cluster(folder))
        proxy = (*kubectl.prefix, "proxy", f"--port={PROXY_PORT}")
        stack.enter_context(process(*proxy, log=folder / "proxy.log"))
        pid = stack.enter_context(operator(kubectl, folder))
        figures = asyncio.run(measure(size, pid))
    cpu = re.search(r"model name\s+: (.+)", Path("/proc/cpuinfo").read_text())
    machine = {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }
    settings = {"pools": size.pools, "pods": size.pools * size.pods_per_pool}
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
