"""Keeps stores up to date with the API server: a list, then a watch from the list's version on.

A watch that ends goes on from the last version it brought (bookmarks move that on while nothing
happens); only a version that the server has forgotten (410 Gone) takes a new list. Whatever was
missed meanwhile, deletions too, shows in the new list.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

from kvasir_operator.api import KINDS, MODEL_SERVICE
from kvasir_operator.core.manifests import (
    MANAGED_BY,
    POOL_LABEL,
    ROLE_LABEL,
    SERVICE_LABEL,
    Manifest,
    Ref,
    selector_text,
)
from kvasir_operator.core.pool import ROLES
from kvasir_operator.core.slim import (
    group_of,
    slim_autoscaler,
    slim_event,
    slim_object,
    slim_pod,
)
from kvasir_operator.core.store import Entry, Key, Store, encode
from kvasir_operator.errors import ClusterError

logger = logging.getLogger(__name__)

BACKOFF_S_MIN = 0.5
BACKOFF_S_MAX = 30.0
SHORT_WATCH_S = 1.0  # one that ends sooner without an event is not made again at once
WARNINGS_MAX = 4096  # warning events that are kept: of others, as long as there is room
POOL_KIND_BY_ROLE = {role: kind for kind, role in ROLES.items()}


class Event(NamedTuple):
    """ADDED, MODIFIED, DELETED or BOOKMARK, and the object."""

    type: str
    object: Manifest


OPENED = Event("OPENED", {})  # the API server has accepted the watch; no news


class Source(Protocol):
    """Where objects come from. Calls raise ClusterError."""

    def pages(
        self, kind: str, namespace: str, *, labels: str, fields: str
    ) -> AsyncIterator[tuple[list[Manifest], int]]:
        """A list in pages, each with the version of the whole."""
        ...

    def watch(
        self, kind: str, namespace: str, *, labels: str, fields: str, version: int
    ) -> AsyncIterator[Event]:
        """OPENED, then changes since a version; it ends now and then, and is then made again."""
        ...


@dataclass(frozen=True, slots=True)
class Watched:
    """What is watched of a kind, and what is kept of it."""

    labels: str = selector_text(MANAGED_BY)
    fields: str = ""
    slim: Callable[[Manifest], Manifest | None] = slim_object
    limit: int | None = None


CHILD = Watched()
WATCHED: Mapping[str, Watched] = MappingProxyType(
    {
        **{kind.kind: Watched(labels="") for kind in KINDS},
        "Deployment": CHILD,
        "NetworkPolicy": CHILD,
        "Pod": Watched(slim=slim_pod),
        "PodDisruptionBudget": CHILD,
        "ReplicaSet": CHILD,
        "Service": CHILD,
        "ServiceAccount": CHILD,
        "StatefulSet": CHILD,
        "HorizontalPodAutoscaler": Watched(labels="", slim=slim_autoscaler),
        "Event": Watched(labels="", fields="type=Warning", slim=slim_event, limit=WARNINGS_MAX),
    }
)
RESOURCES = frozenset(kind.kind for kind in KINDS)


def owner_of(namespace: str, labels: Mapping[str, str]) -> Ref | None:
    """The custom resource that a child belongs to, from its labels."""
    if POOL_LABEL in labels:
        kind = POOL_KIND_BY_ROLE.get(labels.get(ROLE_LABEL, ""))
        return Ref(kind, namespace, labels[POOL_LABEL]) if kind else None
    if SERVICE_LABEL in labels:
        return Ref(MODEL_SERVICE.kind, namespace, labels[SERVICE_LABEL])
    return None


def concerned(obj: Manifest) -> list[Ref]:
    """The custom resources that a change of this object concerns."""
    kind, metadata = obj["kind"], obj["metadata"]
    namespace = metadata.get("namespace", "")
    if "scaleTargetRef" in obj.get("spec", {}):
        target = obj["spec"]["scaleTargetRef"]
        is_pool = target.get("kind") in ROLES
        return [Ref(target["kind"], namespace, target["name"])] if is_pool else []
    owner = owner_of(namespace, metadata.get("labels", {}))
    itself = [Ref(kind, namespace, metadata["name"])] if kind in RESOURCES else []
    return itself if owner is None else [*itself, owner]


class Reflector:
    """Keeps one store, of one kind in one namespace ("": in all)."""

    def __init__(
        self,
        source: Source,
        kind: str,
        namespace: str,
        *,
        on_news: Callable[[Entry], None],
        watched: Watched = CHILD,
        spared: Callable[[], Collection[str]] = frozenset,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.kind = kind
        self.namespace = namespace
        self.store = Store(limit=watched.limit, spared=spared)
        self.is_synced = asyncio.Event()
        self.problem = "not listed yet"
        self.alive_s = now_s()  # when the API server last gave a sign of life
        self._now_s = now_s
        self._source = source
        self._watched = watched
        self._on_news = on_news

    async def run(self) -> None:
        """List and watch for ever."""
        failures, must_list = 0, True
        self.alive_s = self._now_s()
        while True:
            started_s = self._now_s()
            try:
                if must_list:
                    await self._list()
                    must_list = False
                had_events = await self._follow()
                self.problem = ""
                if had_events or self._now_s() - started_s > SHORT_WATCH_S:
                    failures = 0
                    continue
            except ClusterError as error:
                must_list = must_list or error.status in (404, 410)  # 404: the kind is gone
                self.problem = f"{self.kind}: {error}"
                logger.info("watching %s: %s", self.kind, error)
            failures += 1
            await asyncio.sleep(_backoff_s(failures))

    async def _list(self) -> None:
        entries: dict[Key, Entry] = {}
        version = 0
        query = {"labels": self._watched.labels, "fields": self._watched.fields}
        async for page, listed in self._source.pages(self.kind, self.namespace, **query):
            version = listed
            self.alive_s = self._now_s()
            for obj in page:
                if (entry := self.entry_of(obj)) is not None:
                    entries[entry.key] = entry
        for entry in self.store.replace(entries, version):
            self._on_news(entry)
        self.problem = ""
        self.is_synced.set()

    async def _follow(self) -> bool:
        """Take what one watch brings; whether it brought anything."""
        had_events = False
        watching = self._source.watch(
            self.kind,
            self.namespace,
            labels=self._watched.labels,
            fields=self._watched.fields,
            version=self.store.version,
        )
        async for event in watching:
            self.alive_s = self._now_s()
            if event is not OPENED:
                had_events = True
                self._take(event)
        return had_events

    def _take(self, event: Event) -> None:
        if event.type == "BOOKMARK":
            self.store.saw(int(event.object["metadata"]["resourceVersion"]))
            return
        entry = self.entry_of(event.object)
        if entry is None:
            metadata = event.object["metadata"]
            key = Key(metadata.get("namespace", ""), metadata["name"])
            if (old := self.store.let_go(key, int(metadata["resourceVersion"]))) is not None:
                self._on_news(old)
            return
        is_news = self.store.drop(entry) if event.type == "DELETED" else self.store.put(entry)
        if is_news:
            self._on_news(entry)

    def entry_of(self, obj: Manifest) -> Entry | None:
        """The object as it is kept; None: it is not."""
        kept = self._watched.slim(obj)
        return None if kept is None else encode(kept, group=group_of(kept))


def _backoff_s(failures: int) -> float:
    limit_s = min(BACKOFF_S_MIN * 2 ** min(failures - 1, 16), BACKOFF_S_MAX)
    return random.uniform(limit_s / 2, limit_s)
