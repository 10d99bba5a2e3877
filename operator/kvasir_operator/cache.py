"""The cluster as a reconcile sees it: reads from watch caches, writes to the API server.

What a write returns is put into the cache at once, so a read shows at least what was written. Other
changes show as soon as the watch brings them; the reconcile is level-triggered, and each piece of
news puts the custom resources that it concerns into the queue.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence

from kvasir_operator.cluster import NO_LABELS, KubeCluster, Labels, Manifests
from kvasir_operator.core.manifests import API_OF_GATEWAY_KIND, Manifest, Ref
from kvasir_operator.core.slim import about, group_of_labels
from kvasir_operator.core.store import Entry, Key, with_labels
from kvasir_operator.watch import CHILD, WATCHED, Reflector, Watched, concerned

WATCH_LAG_MAX_S = 240.0  # a silent connection is made again after 100 s


class CachedCluster:
    """See cluster.Cluster. Kinds that are not watched are read from the API server.

    Gateways' kinds are watched from the moment that somebody asks for one and the API server has
    it; a cluster may lose them again, so nothing waits for these watches.
    `namespaces` are those that are watched (none: all); `on_news` is told which custom resources
    to look at.
    """

    def __init__(
        self, kube: KubeCluster, *, namespaces: Sequence[str], on_news: Callable[[Ref], None]
    ) -> None:
        self._kube = kube
        self._on_news = on_news
        self._namespaces = tuple(namespaces) or ("",)
        self._tasks: asyncio.TaskGroup | None = None
        self._late: dict[tuple[str, str], Reflector] = {}  # of gateways' kinds
        self._reflectors = {
            (kind, namespace): self._make_reflector(kind, namespace, watched)
            for kind, watched in WATCHED.items()
            for namespace in self._namespaces
        }

    def _make_reflector(self, kind: str, namespace: str, watched: Watched) -> Reflector:
        return Reflector(
            self._kube, kind, namespace, on_news=self._tell, watched=watched, spared=self._uids
        )

    async def run(self) -> None:
        """Keep the caches up to date."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            for (kind, namespace), reflector in self._reflectors.items():
                run = self._run_last(reflector) if kind == "Event" else reflector.run()
                tasks.create_task(run, name=f"watch of {kind} {namespace}")

    async def _run_last(self, reflector: Reflector) -> None:
        """Which events are about objects of ours shows once these are known."""
        for other in self._reflectors.values():
            if other.kind != reflector.kind:
                await other.is_synced.wait()
        await reflector.run()

    def _uids(self) -> set[str]:
        """All that is known but the events: what events may be about."""
        reflectors = (r for r in self._reflectors.values() if r.kind != "Event")
        return {uid for reflector in reflectors for uid in reflector.store.uids()}

    async def wait_until_synced(self) -> None:
        """Wait until every kind has been listed."""
        for reflector in self._reflectors.values():
            await reflector.is_synced.wait()

    def problems(self) -> list[str]:
        """Why the caches are not complete yet."""
        waiting = (r for r in self._reflectors.values() if not r.is_synced.is_set())
        return [f"{r.kind}: {r.problem}" for r in waiting]

    def lags_s(self) -> dict[str, float]:
        """How long each kind has been silent while others were not, in seconds."""
        newest_s = max(r.alive_s for r in self._reflectors.values())
        lags: dict[str, float] = {}
        for reflector in self._reflectors.values():
            lag_s = newest_s - reflector.alive_s
            lags[reflector.kind] = max(lag_s, lags.get(reflector.kind, 0.0))
        return lags

    def sizes(self) -> Mapping[str, int]:
        """How many objects of each kind are kept."""
        sizes: dict[str, int] = {}
        for reflector in (*self._reflectors.values(), *self._late.values()):
            sizes[reflector.kind] = sizes.get(reflector.kind, 0) + len(reflector.store)
        return sizes

    async def get(self, ref: Ref) -> Manifest | None:
        """See Cluster."""
        if not self._is_cached(ref):
            return await self.fetch(ref)
        entry = self._entry(ref)
        return None if entry is None else entry.decode()

    async def fetch(self, ref: Ref) -> Manifest | None:
        """See Cluster."""
        return await self._kube.get(ref)

    async def is_served(self, kind: str) -> bool:
        """See Cluster."""
        is_served = await self._kube.is_served(kind)
        if is_served and kind in API_OF_GATEWAY_KIND:
            self._watch_late(kind)
        return is_served

    def _watch_late(self, kind: str) -> None:
        for namespace in self._namespaces:
            if self._tasks is not None and (kind, namespace) not in self._late:
                reflector = self._make_reflector(kind, namespace, CHILD)
                self._late[kind, namespace] = reflector
                self._tasks.create_task(reflector.run(), name=f"watch of {kind} {namespace}")

    async def list(self, kind: str, namespace: str, *, labels: Labels = NO_LABELS) -> Manifests:
        """See Cluster."""
        if kind not in WATCHED:
            return await self._kube.list(kind, namespace, labels=labels)
        reflector = self._reflector(kind, namespace)
        if reflector is None:
            return []
        group = group_of_labels(dict(labels))
        store = reflector.store
        found: Iterable[Entry] = (
            store.in_group(namespace, group) if group else store.in_namespace(namespace)
        )
        return with_labels(found, labels)

    async def warning(self, uid: str, namespace: str) -> str:
        """See Cluster."""
        reflector = self._reflector("Event", namespace)
        events = [] if reflector is None else reflector.store.in_group(namespace, uid)
        if not events:
            return ""
        latest = max((event.decode() for event in events), key=_time)
        return f"{latest.get('reason', '')}: {latest.get('message', '')}"

    async def apply(self, manifest: Manifest) -> Manifest:
        """See Cluster."""
        return self._written(await self._kube.apply(manifest))

    async def apply_status(self, ref: Ref, status: Manifest) -> Manifest:
        """See Cluster."""
        written = await self._kube.apply_status(ref, status)
        # Who wrote it knows it, unless somebody changed the spec just before.
        metadata = written["metadata"]
        is_known = metadata.get("generation") == status.get("observedGeneration")
        is_known = is_known and "deletionTimestamp" not in metadata
        return self._written(written, by=ref if is_known else None)

    async def annotate(self, ref: Ref, uid: str, annotations: Mapping[str, str]) -> Manifest:
        """See Cluster."""
        return self._written(await self._kube.annotate(ref, uid, annotations))

    async def delete(self, ref: Ref, *, uid: str = "") -> Manifest | None:
        """See Cluster."""
        entry = self._entry(ref)
        answer = await self._kube.delete(ref, uid=uid)
        if answer is None:
            return None
        if "deletionTimestamp" in answer.get("metadata", {}):
            return self._written(answer)
        reflector = self._reflector(ref.kind, ref.namespace)
        if reflector is not None and entry is not None:
            reflector.store.deleted(entry.key, entry.uid)
            self._tell(entry)
        return answer

    async def create_event(self, namespace: str, event: Manifest) -> None:
        """See Cluster."""
        await self._kube.create_event(namespace, event)

    def _written(self, obj: Manifest, *, by: Ref | None = None) -> Manifest:
        reflector = self._reflector(obj["kind"], obj["metadata"].get("namespace", ""))
        entry = None if reflector is None else reflector.entry_of(obj)
        if reflector is not None and entry is not None and reflector.store.written(entry):
            self._tell(entry, but=by)
        return obj

    def _tell(self, entry: Entry, *, but: Ref | None = None) -> None:
        obj = entry.decode()
        if "involvedObject" in obj:
            subject = self._entry(about(obj))
            if subject is None:
                return
            obj = subject.decode()
        for ref in concerned(obj):
            if ref != but:
                self._on_news(ref)

    def _is_cached(self, ref: Ref) -> bool:
        """Whether what the caches do not show is not there."""
        reflector = self._reflector(ref.kind, ref.namespace)
        return ref.kind in WATCHED or (reflector is not None and reflector.is_synced.is_set())

    def _reflector(self, kind: str, namespace: str) -> Reflector | None:
        reflectors = self._late if kind in API_OF_GATEWAY_KIND else self._reflectors
        return reflectors.get((kind, namespace)) or reflectors.get((kind, ""))

    def _entry(self, ref: Ref) -> Entry | None:
        reflector = self._reflector(ref.kind, ref.namespace)
        return None if reflector is None else reflector.store.get(Key(ref.namespace, ref.name))


def _time(event: Manifest) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or "")
