"""Event streams: a watcher that applies what it gets knows what the worker holds."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvasir_kvstore import events
from kvasir_kvstore.events import EventHub
from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import worker_pb2

NEVER_MS = 3_600_000


def make_hub(
    *,
    queue_max: int = 16,
    dropped: list[None] | None = None,
    starts: list[events.Start] | None = None,
) -> EventHub[worker_pb2.WorkerEvent]:
    return EventHub(
        worker_pb2.WorkerEvent,
        lambda: worker_pb2.WorkerEvent(description=worker_pb2.WorkerDescription(model="m")),
        queue_max=queue_max,
        on_started=lambda start: (starts if starts is not None else []).append(start),
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


async def test_who_comes_when_all_streams_have_ended_is_sent_away() -> None:
    hub = make_hub()
    hub.close()
    async with aclosing(hub.watch(load_interval_ms=NEVER_MS)) as stream:
        with pytest.raises(KvasirError) as caught:
            await anext(stream)
    assert caught.value.reason is Reason.DRAINING


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


class Returning:
    """A watcher that leaves and comes back."""

    def __init__(self) -> None:
        self.held: set[bytes] = set()
        self.position = 0

    async def look(self, hub: EventHub[Any], *, num_events: int = 1_000) -> None:
        """Applies what a new stream has to tell, but so many events at most, and leaves."""
        async with aclosing(hub.watch(load_interval_ms=NEVER_MS, after=self.position)) as stream:
            for _ in range(num_events):
                event = await anext(stream)
                self.held = set() if event.snapshot else self.held
                self.held = (self.held - set(event.removed)) | set(event.stored)
                if event.snapshot or event.position:
                    self.position = event.position
                if self.position == hub.position:
                    return


async def test_watcher_that_comes_back_gets_what_it_missed_and_no_snapshot() -> None:
    starts: list[events.Start] = []
    hub, watcher = make_hub(starts=starts), Returning()
    hub.blocks_changed(stored=[name(1), name(2)], removed=[])
    await watcher.look(hub)
    hub.blocks_changed(stored=[name(3)], removed=[name(1)])
    async with aclosing(hub.watch(load_interval_ms=NEVER_MS, after=watcher.position)) as stream:
        removed, stored = await anext(stream), await anext(stream)
        assert (removed.sequence, list(removed.removed)) == (1, [name(1)])
        assert (stored.sequence, list(stored.stored)) == (2, [name(3)])
        assert not removed.snapshot
        assert not stored.snapshot
        assert removed.description.model == "m", "who it is comes first, as with a snapshot"
        hub.blocks_changed(stored=[name(4)], removed=[])
        assert list((await anext(stream)).stored) == [name(4)]
    assert starts == ["snapshot", "replay"]


async def test_watcher_that_missed_nothing_hears_so_at_once() -> None:
    hub, watcher = make_hub(), Returning()
    hub.blocks_changed(stored=[name(1)], removed=[])
    await watcher.look(hub)
    async with aclosing(hub.watch(load_interval_ms=NEVER_MS, after=watcher.position)) as stream:
        first = await anext(stream)
    assert (first.snapshot, list(first.stored), first.description.model) == (False, [], "m")


async def test_changes_beyond_the_bound_are_told_as_a_snapshot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "REPLAY_NAMES_MAX", 3)
    starts: list[events.Start] = []
    hub, within, beyond = make_hub(starts=starts), Returning(), Returning()
    await beyond.look(hub)
    hub.blocks_changed(stored=[name(1)], removed=[])
    await within.look(hub)
    hub.blocks_changed(stored=[name(2), name(3)], removed=[name(1)])
    for watcher in (within, beyond):
        await watcher.look(hub)
        assert watcher.held == {name(2), name(3)}
    assert starts == ["snapshot", "snapshot", "replay", "snapshot"]


async def test_changes_are_bounded_however_few_names_they_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "REPLAY_EVENTS_MAX", 2)
    starts: list[events.Start] = []
    hub, within, beyond = make_hub(starts=starts), Returning(), Returning()
    await beyond.look(hub)
    hub.blocks_changed(stored=[name(1)], removed=[])
    await within.look(hub)
    for change in (2, 3):
        hub.blocks_changed(stored=[name(change)], removed=[])
    for watcher in (within, beyond):
        await watcher.look(hub)
        assert watcher.held == {name(1), name(2), name(3)}
    assert starts == ["snapshot", "snapshot", "replay", "snapshot"]


async def test_position_of_another_life_or_of_before_a_reset_is_unknown() -> None:
    starts: list[events.Start] = []
    hub, watcher = make_hub(starts=starts), Returning()
    await watcher.look(make_hub())
    hub.blocks_changed(stored=[name(1)], removed=[])
    await watcher.look(hub)
    hub.tell_anew([name(7)])
    await watcher.look(hub)
    assert watcher.held == {name(7)}
    assert starts == ["snapshot", "snapshot"]


async def test_half_a_snapshot_is_nothing_to_go_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "NAMES_PER_EVENT_MAX", 3)
    hub, watcher = make_hub(), Returning()
    hub.blocks_changed(stored=[name(i) for i in range(7)], removed=[])
    await watcher.look(hub, num_events=2)
    assert watcher.position == 0
    await watcher.look(hub)
    assert watcher.held == set(hub.held)


CHANGE = st.tuples(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)))
LOOK = st.integers(1, 4)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(CHANGE | LOOK, max_size=25), names_max=st.integers(0, 12))
def test_watchers_that_come_and_go_know_all_that_is_held(
    steps: list[tuple[set[int], set[int]] | int], names_max: int
) -> None:
    async def run() -> None:
        hub, watcher = make_hub(), Returning()
        for step in steps:
            if isinstance(step, int):
                await watcher.look(hub, num_events=step)
            else:
                stored, removed = ([name(i) for i in part] for part in step)
                hub.blocks_changed(stored=stored, removed=removed)
        await watcher.look(hub)
        assert watcher.held == set(hub.held)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(events, "REPLAY_NAMES_MAX", names_max)
        patch.setattr(events, "NAMES_PER_EVENT_MAX", 2)
        asyncio.run(run())
