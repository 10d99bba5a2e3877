"""The cluster of a scale run: this script writes what users, controllers and the kubelet would.

No controller and no scheduler may run beside it: pods and the status of workloads are written here.
"""

import asyncio
import json
import random
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from types import TracebackType
from typing import Any, NamedTuple

import aiohttp
import kopf
import yaml
from e2e_shell import ROOT, CommandError, say
from kvasir_operator.cluster import API_PATHS, KubeCluster, login
from kvasir_operator.watch import Reflector, Watched
from scale_objects import (
    NAMESPACE,
    PLURALS,
    children_of,
    is_settled,
    is_workload,
    make_pool,
    pods_of,
    running_status,
    workload_status,
)

WRITERS = 24
CALL_LIMIT_S = 60
CHANGE_LIMIT_S = 60.0
FILL_LIMIT_S = 900
PROGRESS_INTERVAL_S = 10
JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"
WRITE_VERBS = ("APPLY", "DELETE", "DELETECOLLECTION", "PATCH", "POST", "PUT")
RESOURCES = {plural for _, plural in API_PATHS.values()} - {"leases"}  # that an operator writes
Object = dict[str, Any]


class Name(NamedTuple):
    """Which pool."""

    kind: str
    name: str


class World:
    """Fills the cluster, then follows the status of every pool by watches, and changes some."""

    def __init__(self) -> None:
        info = login(settings=kopf.OperatorSettings())
        self._kube = KubeCluster(timeout_s=CALL_LIMIT_S)
        self._session = aiohttp.ClientSession(
            info.server.rstrip("/"),
            connector=aiohttp.TCPConnector(ssl=info.as_ssl_context(), limit=WRITERS + 8),
            headers=info.as_http_headers(),
            timeout=aiohttp.ClientTimeout(total=CALL_LIMIT_S),
        )
        self._tasks = asyncio.TaskGroup()
        self._watches: list[asyncio.Task[None]] = []
        self._waiters: dict[Name, tuple[Callable[[Object], bool], asyncio.Future[float]]] = {}
        self._workloads: dict[Name, Object] = {}
        self._num_written = 0
        self.pools: dict[Name, Object] = {}

    async def __aenter__(self) -> "World":
        """Make the namespace and Kvasir's kinds."""
        await self._tasks.__aenter__()
        for path in sorted((ROOT / "crds").glob("*.yaml")):
            crd = yaml.safe_load(path.read_text())
            url = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
            await self._write("PATCH", f"{url}/{crd['metadata']['name']}", crd, APPLY_PATCH)
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
        await self._write("PATCH", f"/api/v1/namespaces/{NAMESPACE}", namespace, APPLY_PATCH)
        async with asyncio.timeout(CALL_LIMIT_S):
            while not set(PLURALS) <= await self._kube.served_kinds():  # noqa: ASYNC110 (a server)
                await asyncio.sleep(0.2)
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

    async def fill(self, *, num_pools: int, num_pods: int) -> dict[str, float]:
        """Write everything, then watch the pools; how long it took."""
        sizes = [num_pods // num_pools + (n < num_pods % num_pools) for n in range(num_pools)]
        pools = iter([make_pool(n, pods=size) for n, size in enumerate(sizes)])
        started_s = time.monotonic()
        progress = asyncio.create_task(self._tell_progress(started_s))
        try:
            async with asyncio.timeout(FILL_LIMIT_S), asyncio.TaskGroup() as writers:
                for _ in range(WRITERS):
                    writers.create_task(self._fill(pools))
        finally:
            progress.cancel()
        seconds = round(time.monotonic() - started_s, 1)
        say(f"{num_pools} pools and {num_pods} pods in {seconds} s, {self._num_written} writes")
        self._watch()
        return {"seconds": seconds, "writes": self._num_written}

    async def _fill(self, pools: Iterable[Object]) -> None:
        for body in pools:
            pool = await self._write("POST", _url(body, is_new=True), body, JSON)
            name = Name(pool["kind"], pool["metadata"]["name"])
            for manifest in children_of(pool):
                child = await self._kube.apply(manifest)
                self._num_written += 1
                if is_workload(child):
                    self._workloads[name] = child
                    await self._run(child)

    async def _run(self, workload: Object) -> None:
        """A workload's pods, all of them ready."""
        for body in pods_of(workload):
            pod = await self._write("POST", _url(body, is_new=True), body, JSON)
            await self._write_status(pod, running_status(pod))
        await self._write_status(workload, workload_status(workload))

    async def _tell_progress(self, started_s: float) -> None:
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL_S)
            taken_s = time.monotonic() - started_s
            done = f"{len(self._workloads)} pools, {self._num_written} writes"
            say(f"  {done}, {self._num_written / taken_s:.0f} a second")

    def _watch(self) -> None:
        for kind in PLURALS:
            watched = Watched(labels="", slim=self._on_pool)
            reflector = Reflector(
                self._kube, kind, NAMESPACE, on_news=lambda _: None, watched=watched
            )
            self._watches.append(self._tasks.create_task(reflector.run()))

    def _on_pool(self, pool: Object) -> None:
        """Nothing is kept but what is looked at here."""
        name = Name(pool["kind"], pool["metadata"]["name"])
        self.pools[name] = {"metadata": pool["metadata"], "status": pool.get("status", {})}
        holds, future = self._waiters.get(name, (None, None))
        if holds is not None and future is not None and not future.done() and holds(pool):
            future.set_result(time.monotonic())

    async def _write(self, method: str, url: str, body: Object, content: str) -> Object:
        params = {"fieldManager": "scale", "force": "true"} if content == APPLY_PATCH else {}
        headers = {"Content-Type": content}
        call = self._session.request(method, url, json=body, params=params, headers=headers)
        async with call as answer:
            if answer.status >= 300:
                raise CommandError(f"{method} {url}: {answer.status} {await answer.text()}")
            self._num_written += 1
            found: Object = await answer.json()
            return found

    async def _write_status(self, obj: Object, status: Object) -> None:
        """As its controller or the kubelet would."""
        await self._write("PATCH", f"{_url(obj)}/status", {"status": status}, MERGE_PATCH)

    async def server_writes(self) -> dict[str, float]:
        """Writes that the API server has counted, by verb and resource, where operators write."""
        async with self._session.get("/metrics") as answer:
            text = await answer.text()
        found: dict[str, float] = {}
        for labels, count in re.findall(r"^apiserver_request_total{(.*)} (\S+)$", text, re.M):
            fields = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            if fields["verb"] in WRITE_VERBS and fields["resource"] in RESOURCES:
                key = f"{fields['verb']} {fields['resource']}"
                found[key] = found.get(key, 0.0) + float(count)
        return found

    async def change_spec(self, name: Name) -> float:
        """Change a pool's spec; seconds until its status describes the change."""
        pool = self.pools[name]
        wanted = pool["metadata"]["generation"] + 1
        url = _url({"kind": name.kind, **pool})
        return await self._until(
            name,
            lambda pool: pool.get("status", {}).get("observedGeneration") == wanted,
            self._write("PATCH", url, {"spec": {"maxReplicas": 99}}, MERGE_PATCH),
        )

    async def fail_pod(self, name: Name) -> float:
        """Let a pod be unready for a moment; seconds until the status says so, the longer time."""
        ready: int = self.pools[name]["status"]["readyReplicas"]
        fails_s = await self._set_ready(name, wanted=ready - 1)
        return max(fails_s, await self._set_ready(name, wanted=ready))

    async def _set_ready(self, name: Name, *, wanted: int) -> float:
        """A worker's pod as the kubelet tells of it; of KV nodes their StatefulSet tells."""
        workload = self._workloads[name]
        unready = workload["spec"]["replicas"] - wanted
        if workload["kind"] == "StatefulSet":
            obj, status = workload, workload_status(workload, unready=unready)
        else:
            obj = pods_of(workload)[0]
            status = {"conditions": [{"type": "Ready", "status": str(not unready)}]}
        return await self._until(
            name,
            lambda pool: pool["status"].get("readyReplicas") == wanted,
            self._write_status(obj, status),
        )

    async def spoil_child(self, name: Name) -> float:
        """Change what the operator made; seconds until it is as it was."""
        url = _url({"kind": "PodDisruptionBudget", "metadata": {"name": name.name}})
        started_s = time.monotonic()
        spoilt = await self._write("PATCH", url, {"spec": {"maxUnavailable": 7}}, MERGE_PATCH)
        folder, _, own_name = url.rpartition("/")
        query = {"watch": "true", "fieldSelector": f"metadata.name={own_name}"}
        query["resourceVersion"] = spoilt["metadata"]["resourceVersion"]
        async with self._session.get(folder, params=query) as answer:
            event = json.loads(await answer.content.readline())
        if event["object"]["spec"]["maxUnavailable"] != 1:
            raise CommandError(f"{name} was not repaired: {event}")
        return time.monotonic() - started_s

    async def _until(
        self, name: Name, holds: Callable[[Object], bool], write: Awaitable[object]
    ) -> float:
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiters[name] = (holds, future)
        started_s = time.monotonic()
        await write
        async with asyncio.timeout(CHANGE_LIMIT_S):
            taken_s = await future - started_s
        del self._waiters[name]
        return taken_s

    async def paced(
        self, change: Callable[[Name], Coroutine[Any, Any, float]], *, num: int, per_s: float
    ) -> list[float]:
        """Change `num` pools at this rate, whether or not the last one is done; the seconds."""
        names = random.Random(1).sample(sorted(self.pools), min(num, len(self.pools)))
        async with asyncio.TaskGroup() as tasks:
            made = []
            for name in names:
                made.append(tasks.create_task(change(name)))
                await asyncio.sleep(1 / per_s)
        return [task.result() for task in made]

    def num_settled(self) -> int:
        """Pools that serve, with nothing under way."""
        return sum(is_settled(pool) for pool in self.pools.values())


def _url(obj: Object, *, is_new: bool = False) -> str:
    prefix, plural = API_PATHS[obj["kind"]]
    url = f"{prefix}/namespaces/{NAMESPACE}/{plural}"
    return url if is_new else f"{url}/{obj['metadata']['name']}"
