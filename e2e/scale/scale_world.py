"""The cluster of a scale run: pools are made and changed here, and pods given their status."""

import asyncio
import random
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import aiohttp
import kopf
import yaml
from e2e_shell import ROOT, CommandError
from kvasir_operator.api import GROUP, POOL_KINDS, VERSION
from kvasir_operator.cluster import KubeCluster, login
from kvasir_operator.watch import Reflector, Watched

NAMESPACE = "kvasir-scale"
POOLS_URL = f"/apis/{GROUP}/{VERSION}/namespaces/{NAMESPACE}"
PODS_URL = f"/api/v1/namespaces/{NAMESPACE}/pods"
PLURALS = {kind.kind: kind.plural for kind in POOL_KINDS}
WRITERS = 16
MERGE_PATCH = "application/merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"
CHANGE_LIMIT_S = 60.0
Object = dict[str, Any]


class Name(NamedTuple):
    """Which pool."""

    kind: str
    name: str


class World:
    """Knows the newest status of every pool by watches, and runs every pod that appears."""

    def __init__(self) -> None:
        info = login(settings=kopf.OperatorSettings())
        self._kube = KubeCluster(timeout_s=60)
        self._session = aiohttp.ClientSession(
            info.server.rstrip("/"),
            connector=aiohttp.TCPConnector(ssl=info.as_ssl_context(), limit=2 * WRITERS),
            headers=info.as_http_headers(),
        )
        self._slots = asyncio.Semaphore(WRITERS)
        self._tasks = asyncio.TaskGroup()
        self._watches: list[asyncio.Task[None]] = []
        self._waiters: dict[Name, tuple[Callable[[Object], bool], asyncio.Future[float]]] = {}
        self._ran: set[str] = set()  # UIDs of pods that have been given a status
        self.pools: dict[Name, Object] = {}

    async def __aenter__(self) -> "World":
        """Make the namespace and Kvasir's kinds, then watch."""
        await self._tasks.__aenter__()
        for path in sorted((ROOT / "crds").glob("*.yaml")):
            crd = yaml.safe_load(path.read_text())
            url = (
                f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{crd['metadata']['name']}"
            )
            await self.write("PATCH", url, crd, APPLY_PATCH)
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
        await self.write("PATCH", f"/api/v1/namespaces/{NAMESPACE}", namespace, APPLY_PATCH)
        kinds = (*PLURALS, "Pod")
        for kind in kinds:
            reflector = Reflector(
                self._kube,
                kind,
                NAMESPACE,
                on_news=lambda _: None,
                watched=Watched(labels="", slim=self._on_pod if kind == "Pod" else self._on_pool),
            )
            self._watches.append(self._tasks.create_task(reflector.run()))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Watch no more; the objects stay."""
        for watch in self._watches:
            watch.cancel()
        await self._tasks.__aexit__(kind, error, trace)
        await self._session.close()
        await self._kube.close()

    async def write(self, method: str, url: str, body: Object, content: str) -> Object:
        """One call, WRITERS at a time."""
        params = {"fieldManager": "scale", "force": "true"} if content == APPLY_PATCH else {}
        headers = {"Content-Type": content}
        async with (
            self._slots,
            self._session.request(method, url, json=body, params=params, headers=headers) as answer,
        ):
            if answer.status >= 300:
                raise CommandError(f"{method} {url}: {answer.status} {await answer.text()}")
            found: Object = await answer.json()
            return found

    def _on_pool(self, pool: Object) -> None:
        """Nothing is kept but what is looked at here."""
        name = Name(pool["kind"], pool["metadata"]["name"])
        self.pools[name] = {"metadata": pool["metadata"], "status": pool.get("status", {})}
        holds, future = self._waiters.get(name, (None, None))
        if holds is not None and future is not None and not future.done() and holds(pool):
            future.set_result(time.monotonic())

    def _on_pod(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        if uid not in self._ran and "deletionTimestamp" not in pod["metadata"]:
            self._ran.add(uid)
            container = pod["spec"]["containers"][0]
            status = running_status(container["name"], container["image"])
            self._tasks.create_task(self.write_pod(pod["metadata"]["name"], status))

    async def write_pod(self, name: str, status: Object) -> None:
        """Write a pod's status as the kubelet would."""
        await self.write("PATCH", f"{PODS_URL}/{name}/status", {"status": status}, MERGE_PATCH)

    async def create_pools(self, num: int, pods_per_pool: int) -> None:
        """Pools of the three kinds in turn."""
        kinds = list(PLURALS)
        async with asyncio.TaskGroup() as tasks:
            for n in range(num):
                body = make_pool(kinds[n % len(kinds)], n, pods_per_pool)
                url = f"{POOLS_URL}/{PLURALS[body['kind']]}"
                tasks.create_task(self.write("POST", url, body, "application/json"))

    async def change(self, name: Name) -> float:
        """Change a pool's spec; seconds until its status describes the change."""
        wanted = self.pools[name]["metadata"]["generation"] + 1
        url = f"{POOLS_URL}/{PLURALS[name.kind]}/{name.name}"
        write = self.write("PATCH", url, {"spec": {"maxReplicas": 99}}, MERGE_PATCH)
        return await self._until(
            name, lambda pool: pool.get("status", {}).get("observedGeneration") == wanted, write
        )

    async def fail_pod(self, name: Name) -> float:
        """Let a pod be unready for a moment; seconds until the status says so, the longer time."""
        before = self.pools[name]["status"]
        url = f"{PODS_URL}?limit=1&labelSelector={before['selector']}"
        async with self._session.get(url) as answer:
            pod = (await answer.json())["items"][0]["metadata"]["name"]
        ready: int = before["readyReplicas"]
        fails_s = await self._set_ready(name, pod, "False", wanted=ready - 1)
        return max(fails_s, await self._set_ready(name, pod, "True", wanted=ready))

    async def _set_ready(self, name: Name, pod: str, state: str, *, wanted: int) -> float:
        return await self._until(
            name,
            lambda pool: pool["status"].get("readyReplicas") == wanted,
            self.write_pod(pod, {"conditions": [{"type": "Ready", "status": state}]}),
        )

    async def _until(self, name: Name, holds: Callable[[Object], bool], write: Any) -> float:
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiters[name] = (holds, future)
        started_s = time.monotonic()
        await write
        async with asyncio.timeout(CHANGE_LIMIT_S):
            taken_s = await future - started_s
        del self._waiters[name]
        return taken_s

    async def paced(self, change: Callable[[Name], Any], num: int, per_s: float) -> list[float]:
        """Change `num` pools at this rate, whether or not the last one is done; the seconds."""
        names = random.Random(1).sample(sorted(self.pools), num)
        async with asyncio.TaskGroup() as tasks:
            made = []
            for name in names:
                made.append(tasks.create_task(change(name)))
                await asyncio.sleep(1 / per_s)
        return [task.result() for task in made]

    def num_settled(self) -> int:
        """Pools that serve, with nothing under way."""
        return sum(is_settled(pool) for pool in self.pools.values())


def make_pool(kind: str, number: int, pods: int) -> Object:
    """One pool; its pods are never started."""
    spec: Object = {"replicas": pods}
    if kind != "KVCachePool":
        spec["model"] = {"name": "none", "source": {"image": {"reference": "none"}}}
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": kind,
        "metadata": {"name": f"pool-{number}", "namespace": NAMESPACE},
        "spec": spec,
    }


def is_settled(pool: Object) -> bool:
    """Whether a pool serves and nothing is under way."""
    found = {c["type"]: c["status"] for c in pool["status"].get("conditions", [])}
    return found.get("Available") == "True" and found.get("Progressing") == "False"


def running_status(container: str, image: str) -> Object:
    """The status of a pod that runs and is ready."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    kinds = ("PodScheduled", "Initialized", "ContainersReady", "Ready")
    return {
        "phase": "Running",
        "podIP": "127.0.0.1",
        "podIPs": [{"ip": "127.0.0.1"}],
        "startTime": now,
        "conditions": [{"type": k, "status": "True", "lastTransitionTime": now} for k in kinds],
        "containerStatuses": [
            {
                "name": container,
                "image": image,
                "imageID": "none",
                "ready": True,
                "started": True,
                "restartCount": 0,
                "state": {"running": {"startedAt": now}},
            }
        ],
    }
