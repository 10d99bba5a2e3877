"""Reflectors against a scripted API server: lists, watches, expiry, silence; what news leads to."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from kvasir_operator import watch
from kvasir_operator.core.manifests import MANAGED_BY, POOL_LABEL, ROLE_LABEL, Manifest, Ref
from kvasir_operator.core.store import Entry
from kvasir_operator.errors import ClusterError
from kvasir_operator.watch import WATCHED, Event, Reflector, concerned

LABELS = {**MANAGED_BY, POOL_LABEL: "chat", ROLE_LABEL: "decode"}
GONE = ClusterError(410, "Expired", "too old resource version")


def make_child(name: str, version: int, **body: Any) -> Manifest:
    metadata = {"name": name, "namespace": "ns", "uid": f"uid-of-{name}", "labels": LABELS}
    metadata["resourceVersion"] = str(version)
    return {"kind": "Service", "metadata": metadata, **body}


def bookmark(version: int) -> Event:
    return Event("BOOKMARK", {"metadata": {"resourceVersion": str(version)}})


@dataclass
class FakeSource:
    """Answers lists and watches from a script; when it ends, a watch hangs."""

    lists: list[tuple[list[Manifest], int] | ClusterError]
    watches: list[list[Event | ClusterError]] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)  # that watches began from
    is_over: asyncio.Event = field(default_factory=asyncio.Event)

    async def pages(
        self, kind: str, namespace: str, *, labels: str, fields: str
    ) -> AsyncIterator[tuple[list[Manifest], int]]:
        answer = self.lists.pop(0)
        if isinstance(answer, ClusterError):
            raise answer
        items, version = answer
        for item in items:
            yield [item], version
        yield [], version

    async def watch(
        self, kind: str, namespace: str, *, labels: str, fields: str, version: int
    ) -> AsyncIterator[Event]:
        self.versions.append(version)
        yield watch.OPENED
        if not self.watches:
            self.is_over.set()
            await asyncio.Event().wait()
        for event in self.watches.pop(0):
            if isinstance(event, ClusterError):
                raise event
            yield event


@asynccontextmanager
async def reflected(
    source: FakeSource, kind: str = "Service", **more: Any
) -> AsyncIterator[tuple[Reflector, list[str]]]:
    """A reflector that has worked through the script, and the names that were news."""
    news: list[str] = []

    def tell(entry: Entry) -> None:
        news.append(entry.key.name)

    reflector = Reflector(source, kind, "", on_news=tell, watched=WATCHED[kind], **more)
    running = asyncio.create_task(reflector.run())
    try:
        async with asyncio.timeout(30):
            await source.is_over.wait()
        yield reflector, news
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "BACKOFF_S_MIN", 0.0)


async def test_list_then_changes() -> None:
    source = FakeSource(
        lists=[([make_child("a", 1), make_child("b", 2)], 5)],
        watches=[
            [
                Event("MODIFIED", make_child("a", 6, spec=1)),
                Event("ADDED", make_child("c", 7)),
                Event("DELETED", make_child("b", 8)),
            ]
        ],
    )
    async with reflected(source) as (reflector, news):
        assert reflector.is_synced.is_set()
        assert sorted(e.key.name for e in reflector.store.in_namespace("")) == ["a", "c"]
        assert news == ["a", "b", "a", "c", "b"]
        assert source.versions == [5, 8]


async def test_watch_goes_on_from_bookmarks() -> None:
    source = FakeSource(
        lists=[([], 5)],
        watches=[[bookmark(50)], [ClusterError(0, "ServerDisconnectedError", "")]],
    )
    async with reflected(source):
        assert source.versions == [5, 50, 50]


async def test_deletion_missed_while_the_version_expired_is_found_by_the_next_list() -> None:
    source = FakeSource(
        lists=[([make_child("a", 1), make_child("b", 2)], 5), ([make_child("b", 2)], 90)],
        watches=[[GONE]],
    )
    async with reflected(source) as (reflector, news):
        assert [e.key.name for e in reflector.store.in_namespace("")] == ["b"]
        assert news == ["a", "b", "a"]
        assert source.versions == [5, 90]


async def test_list_that_expires_between_pages_is_taken_again() -> None:
    source = FakeSource(lists=[GONE, ([make_child("a", 1)], 5)])
    async with reflected(source) as (reflector, news):
        assert (news, len(reflector.store)) == (["a"], 1)


async def test_kind_that_cannot_be_listed_says_why() -> None:
    refused = ClusterError(403, "Forbidden", "no right to list services")
    source = FakeSource(lists=[refused])
    reflector = Reflector(source, "Service", "", on_news=lambda _: None)
    source.lists += [refused] * 3
    running = asyncio.create_task(reflector.run())
    with pytest.raises(IndexError):  # the script's end
        await running
    assert "no right to list services" in reflector.problem
    assert not reflector.is_synced.is_set()


async def test_change_of_a_status_nobody_reads_is_no_news() -> None:
    def pod(version: int, **status: Any) -> Manifest:
        body = make_child("p", version, spec={"containers": []}, status=status)
        return {**body, "kind": "Pod"}

    source = FakeSource(
        lists=[([pod(1, phase="Running")], 1)],
        watches=[
            [
                Event("MODIFIED", pod(2, phase="Running", hostIPs=[{"ip": "1.2.3.4"}])),
                Event("MODIFIED", pod(3, phase="Failed")),
            ]
        ],
    )
    async with reflected(source, "Pod") as (_, news):
        assert news == ["p", "p"]


async def test_kind_without_any_change_is_alive_as_long_as_it_can_be_watched() -> None:
    now_s = [0.0]

    class Slow(FakeSource):
        async def watch(self, *args: Any, **query: Any) -> AsyncIterator[Event]:
            now_s[0] += 100
            async for event in super().watch(*args, **query):
                yield event

    source = Slow(lists=[([], 5)], watches=[[], [], []])
    async with reflected(source, now_s=lambda: now_s[0]) as (reflector, _):
        assert reflector.alive_s == 400


async def test_object_that_is_not_kept_moves_the_version_on() -> None:
    spec = {"scaleTargetRef": {"kind": "Deployment", "name": "x"}}
    other = {**make_child("x", 9, spec=spec), "kind": "HorizontalPodAutoscaler"}
    source = FakeSource(lists=[([], 5)], watches=[[Event("ADDED", other)]])
    async with reflected(source, "HorizontalPodAutoscaler") as (reflector, news):
        assert (news, len(reflector.store), source.versions) == ([], 0, [5, 9])


def test_whom_a_change_concerns() -> None:
    pool = Ref("DecodePool", "ns", "chat")
    assert concerned(make_child("a", 1)) == [pool]
    resource = {**make_child("own", 1), "kind": "KVCachePool"}
    assert concerned(resource) == [Ref("KVCachePool", "ns", "own"), pool]
    target = {"scaleTargetRef": {"kind": "DecodePool", "name": "chat"}}
    assert concerned({**make_child("h", 1), "spec": target}) == [pool]
    target = {"scaleTargetRef": {"kind": "StatefulSet", "name": "chat"}}
    assert concerned({**make_child("h", 1), "spec": target}) == []
