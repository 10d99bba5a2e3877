"""A store against a server in memory: nothing goes back in time, and in the end both agree."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from kvasir_operator.core.store import Entry, Key, Store, encode, with_labels

NAMES = ("a", "b", "c")


def make_entry(name: str, version: int, *, uid: str = "", group: str = "", **body: Any) -> Entry:
    metadata = {
        "name": name,
        "namespace": "ns",
        "uid": uid or f"uid-of-{name}",
        "resourceVersion": str(version),
        "labels": {"name": name},
    }
    return encode({"kind": "Thing", "metadata": metadata, **body}, group=group)


class Server:
    """The truth, and the log that a watch brings with a delay."""

    def __init__(self) -> None:
        self.version = 0
        self.objects: dict[str, Entry] = {}
        self.log: list[tuple[bool, Entry]] = []  # whether it is gone, and its last state
        self._num_made = 0

    def write(self, name: str) -> Entry:
        """Create or change an object."""
        self.version += 1
        if name not in self.objects:
            self._num_made += 1
        uid = self.objects[name].uid if name in self.objects else f"{name}-{self._num_made}"
        entry = make_entry(name, self.version, uid=uid, spec=self.version)
        self.objects[name] = entry
        self.log.append((False, entry))
        return entry

    def delete(self, name: str) -> Entry | None:
        """Delete an object; its last state with the version of the deletion."""
        before = self.objects.pop(name, None)
        if before is None:
            return None
        self.version += 1
        entry = make_entry(name, self.version, uid=before.uid)
        self.log.append((True, entry))
        return before


def catch_up(store: Store, server: Server, at: int, num: int) -> int:
    """Bring the next changes of the log to the store; where the watch is then."""
    for is_gone, entry in server.log[at : at + num]:
        if is_gone:
            store.drop(entry)
        else:
            store.put(entry)
    return min(len(server.log), at + num)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "delete", "own write", "own delete", "watch", "list"]),
        st.sampled_from(NAMES),
        st.integers(1, 3),
    ),
    min_size=5,
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS)
def test_store_never_goes_back_and_agrees_in_the_end(steps: list[tuple[str, str, int]]) -> None:
    server, store, at = Server(), Store(), 0
    least: dict[str, int] = {}  # version of the last own write
    gone: set[str] = set()  # UIDs that we have deleted
    for what, name, num in steps:
        if what == "write":
            server.write(name)
        elif what == "delete":
            server.delete(name)
        elif what == "own write":
            entry = server.write(name)
            store.written(entry)
            least[name] = entry.version
        elif what == "own delete":
            present = store.get(Key("ns", name))
            deleted = server.delete(name)
            if deleted is not None and present is not None and present.uid == deleted.uid:
                store.deleted(present.key, present.uid)
                gone.add(present.uid)
        elif what == "watch":
            at = catch_up(store, server, at, num)
        else:
            listed = {entry.key: entry for entry in server.objects.values()}
            store.replace(listed, server.version)
            at = len(server.log)
        for known, version in least.items():
            found, true = store.get(Key("ns", known)), server.objects.get(known)
            if true is not None and true.version == version:
                assert found is not None, "an own write is not visible"
                assert found.version >= version
        assert not gone & {entry.uid for entry in store.in_namespace("ns")}
    catch_up(store, server, at, len(server.log))
    assert {e.key.name: e for e in store.in_namespace("")} == server.objects


def test_answer_to_a_write_that_the_watch_has_overtaken_is_old() -> None:
    store = Store()
    entry = make_entry("a", 5)
    store.put(entry)
    store.drop(make_entry("a", 6))
    assert not store.written(entry)
    assert store.get(entry.key) is None


def test_late_news_about_an_earlier_version_change_nothing() -> None:
    store = Store()
    own = make_entry("a", 9, spec="own")
    assert store.written(own)
    assert not store.put(make_entry("a", 5, spec="earlier"))
    assert not store.drop(make_entry("a", 4, uid="of an earlier one of this name"))
    assert store.replace({}, 6) == []
    assert store.get(own.key) == own


def test_what_we_deleted_does_not_come_back_by_earlier_news() -> None:
    store = Store()
    entry = make_entry("a", 5)
    store.put(entry)
    assert store.deleted(entry.key, entry.uid)
    assert not store.put(make_entry("a", 6, spec="a change just before"))
    assert store.get(entry.key) is None
    store.drop(make_entry("a", 7))
    assert store.put(make_entry("a", 8, uid="of the next one"))


def test_change_of_what_is_not_kept_is_no_news() -> None:
    store = Store()
    assert store.put(make_entry("a", 1, spec=1))
    assert not store.put(make_entry("a", 2, spec=1))
    assert store.put(make_entry("a", 3, spec=2))
    found = store.get(Key("ns", "a"))
    assert found is not None
    assert found.decode()["metadata"]["resourceVersion"] == "3"


def test_list_tells_what_is_new_changed_and_gone() -> None:
    store = Store()
    for name in ("same", "changed", "gone"):
        store.put(make_entry(name, 1))
    fresh = [make_entry("same", 1), make_entry("changed", 4, spec=4), make_entry("new", 3)]
    news = store.replace({entry.key: entry for entry in fresh}, 5)
    assert sorted(entry.key.name for entry in news) == ["changed", "gone", "new"]
    assert store.version == 5


def test_server_set_back_to_a_backup_is_believed() -> None:
    store = Store()
    store.put(make_entry("a", 100, spec="late"))
    store.put(make_entry("b", 101))
    store.replace({Key("ns", "a"): make_entry("a", 7, spec="early")}, 10)
    found = store.get(Key("ns", "a"))
    assert found is not None
    assert (found.version, found.decode()["spec"], len(store)) == (7, "early", 1)
    assert store.put(make_entry("a", 11, spec="next"))


def test_groups_follow_their_objects() -> None:
    store = Store()
    store.put(make_entry("a", 1, group="x"))
    store.put(make_entry("b", 2, group="x"))
    store.put(make_entry("a", 3, group="y"))
    store.drop(make_entry("b", 4))
    assert [entry.key.name for entry in store.in_group("ns", "y")] == ["a"]
    assert store.in_group("ns", "x") == store.in_group("other", "y") == []


def test_limit_drops_what_came_first() -> None:
    store = Store(limit=2)
    for version, name in enumerate(("a", "b", "a", "c"), 1):
        store.put(make_entry(name, version))
    assert sorted(entry.key.name for entry in store.in_namespace("ns")) == ["a", "c"]


def test_objects_of_spared_groups_outlive_a_flood() -> None:
    store = Store(limit=4, spared=lambda: {"ours"})
    store.put(make_entry("a", 1, group="ours"))
    for version in range(2, 100):
        store.put(make_entry(f"other-{version}", version, group=f"theirs-{version}"))
        assert len(store) <= 4
    names = [entry.key.name for entry in store.in_namespace("ns")]
    assert names[0] == "a"
    assert names[-1] == "other-99"


def test_limit_holds_for_spared_groups_too() -> None:
    store = Store(limit=2, spared=lambda: {"ours"})
    for version, name in enumerate("abc", 1):
        store.put(make_entry(name, version, group="ours"))
    assert sorted(entry.key.name for entry in store.in_namespace("ns")) == ["b", "c"]


def test_reads_are_copies_selected_by_labels() -> None:
    store = Store()
    store.put(make_entry("a", 1, spec={"n": 1}))
    entries = list(store.in_namespace("ns"))
    [first] = with_labels(entries, {"name": "a"})
    first["spec"]["n"] = 2
    [again] = with_labels(entries, {"name": "a"})
    assert again["spec"] == {"n": 1}
    assert with_labels(entries, {"name": "b"}) == []


def test_what_is_no_longer_kept_goes_and_is_told() -> None:
    """As an autoscaler that now scales something else."""
    store = Store()
    kept = make_entry("a", 5)
    store.put(kept)
    assert store.let_go(kept.key, 4) is None  # older news
    assert store.let_go(kept.key, 6) == kept
    assert (len(store), store.version) == (0, 6)
    assert store.let_go(kept.key, 7) is None
