"""Event streams: a watcher that applies what it gets knows what the worker holds."""

from contextlib import aclosing

import pytest
from kvasir_kvstore import events
from kvasir_kvstore.events import EventHub
from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import worker_pb2

NEVER_MS = 3_600_000


def make_hub(
    *, queue_max: int = 16, dropped: list[None] | None = None
) -> EventHub[worker_pb2.WorkerEvent]:
    return EventHub(
        worker_pb2.WorkerEvent,
        lambda: worker_pb2.WorkerEvent(description=worker_pb2.WorkerDescription(model="m")),
        queue_max=queue_max,
        on_dropped=lambda: (dropped if dropped is not None else []).append(None),
    )


def name(i: int) -> bytes:
    return i.to_bytes(16, "big")


async def test_stream_begins_with_a_snapshot_then_follows_changes() -> None:
    hub = make_hub()
    hub.blocks_changed(stored=[name(1), name(2)], removed=[])
    async with aclosing(hub.watch(load_interval_ms=NEVER_MS)) as stream:
        first = await anext(stream)
        assert first.snapshot
        assert first.sequence == 1
        assert list(first.stored) == [name(1), name(2)]
        assert first.description.model == "m"
        hub.blocks_changed(stored=[name(3)], removed=[name(1)])
        removed, stored = await anext(stream), await anext(stream)
        assert (removed.sequence, list(removed.removed)) == (2, [name(1)])
        assert (stored.sequence, list(stored.stored)) == (3, [name(3)])
        assert not stored.snapshot
        assert not stored.HasField("description")


async def test_name_stored_again_after_removal_is_told_in_order() -> None:
    hub = make_hub()
    hub.blocks_changed(stored=[name(1)], removed=[])
    async with aclosing(hub.watch(load_interval_ms=NEVER_MS)) as stream:
        await anext(stream)
        hub.blocks_changed(stored=[name(1)], removed=[name(1)])
        assert list((await anext(stream)).removed) == [name(1)]
        assert list((await anext(stream)).stored) == [name(1)]
    assert list(hub.held) == [name(1)]


async def test_unknown_removals_and_known_stores_are_silent() -> None:
    hub = make_hub()
    hub.blocks_changed(stored=[name(1)], removed=[])
    async with aclosing(hub.watch(load_interval_ms=NEVER_MS)) as stream:
        await anext(stream)
        hub.blocks_changed(stored=[name(1)], removed=[name(9)])
        hub.blocks_changed(stored=[name(2)], removed=[])
        assert list((await anext(stream)).stored) == [name(2)]


async def test_description_comes_on_change_and_every_interval() -> None:
    hub = make_hub()
    async with aclosing(hub.watch(load_interval_ms=events.LOAD_INTERVAL_MS_MIN)) as stream:
        await anext(stream)
        assert (await anext(stream)).description.model == "m"
    async with aclosing(hub.watch(load_interval_ms=NEVER_MS)) as stream:
        await anext(stream)
        hub.description_changed()
        assert (await anext(stream)).description.model == "m"


async def test_watcher_that_falls_behind_is_cut_off() -> None:
    dropped: list[None] = []
    hub = make_hub(queue_max=2, dropped=dropped)
    async with aclosing(hub.watch(load_interval_ms=NEVER_MS)) as stream:
        await anext(stream)
        for i in range(4):
            hub.blocks_changed(stored=[name(i)], removed=[])
        with pytest.raises(KvasirError) as caught:
            await anext(stream)
    assert caught.value.reason is Reason.OVERLOADED
    assert len(dropped) == 1
    async with aclosing(hub.watch(load_interval_ms=NEVER_MS)) as stream:
        assert len((await anext(stream)).stored) == 4


async def test_long_snapshot_comes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "NAMES_PER_EVENT_MAX", 3)
    hub = make_hub()
    hub.blocks_changed(stored=[name(i) for i in range(7)], removed=[])
    async with aclosing(hub.watch(load_interval_ms=NEVER_MS)) as stream:
        parts = [await anext(stream) for _ in range(3)]
    assert [part.snapshot for part in parts] == [True, False, False]
    assert [n for part in parts for n in part.stored] == [name(i) for i in range(7)]


async def test_closing_the_hub_ends_streams() -> None:
    hub = make_hub()
    async with aclosing(hub.watch(load_interval_ms=NEVER_MS)) as stream:
        await anext(stream)
        hub.close()
        assert [event async for event in stream] == []
