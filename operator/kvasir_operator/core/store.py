"""What a watch cache holds of one kind: the newest known version of each object, as bytes.

Versions (`resourceVersion`) of one kind grow with every write, whoever writes. Invariants:
- a version is never replaced by an older one, so a read after an own write shows at least it;
- an object that is known to be gone does not come back by older news about it;
- a change that leaves what is kept of an object as it was is no news.
Bytes take a tenth of the memory that objects take, and every read is a copy of its own.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from sys import intern
from typing import NamedTuple

from kvasir_operator.core.manifests import Manifest


class Key(NamedTuple):
    """Which object of the kind."""

    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One object: `data` is JSON without the version."""

    key: Key
    version: int
    uid: str
    group: str  # objects that are read together
    data: bytes

    def decode(self) -> Manifest:
        """The object, a copy of its own."""
        obj: Manifest = json.loads(self.data)
        obj["metadata"]["resourceVersion"] = str(self.version)
        return obj


def encode(obj: Manifest, *, group: str) -> Entry:
    """An object as it is kept."""
    metadata = obj["metadata"]
    rest = {key: value for key, value in metadata.items() if key != "resourceVersion"}
    data = json.dumps({**obj, "metadata": rest}, separators=(",", ":")).encode()
    key = Key(intern(metadata.get("namespace", "")), metadata["name"])
    return Entry(key, int(metadata["resourceVersion"]), metadata["uid"], group, data)


class Store:
    """The objects of one kind.

    `limit` bounds their number. Over it, those of groups that nobody cares for (`spared` names the
    others) are dropped, the first to come first, half the limit at once; and if there are none,
    the first of all.
    """

    def __init__(
        self,
        *,
        limit: int | None = None,
        spared: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        self._limit = limit
        self._spared = spared
        self._entries: dict[Key, Entry] = {}
        self._groups: dict[tuple[str, str], set[Key]] = {}  # by namespace and group
        self._deleted: set[str] = set()  # UIDs that we deleted, until the watch has told so, too
        self._seen = 0  # the watch has brought everything up to this version

    def __len__(self) -> int:
        """How many objects there are."""
        return len(self._entries)

    @property
    def version(self) -> int:
        """Where a watch goes on."""
        return self._seen

    def get(self, key: Key) -> Entry | None:
        """The object, or None."""
        return self._entries.get(key)

    def in_group(self, namespace: str, group: str) -> list[Entry]:
        """The objects of a group, by name."""
        keys: Collection[Key] = self._groups.get((namespace, group), ())
        return [self._entries[key] for key in sorted(keys)]

    def in_namespace(self, namespace: str) -> Iterator[Entry]:
        """All objects of a namespace ("": of all)."""
        return (e for e in self._entries.values() if namespace in ("", e.key.namespace))

    def uids(self) -> Iterator[str]:
        """The UIDs of all objects."""
        return (entry.uid for entry in self._entries.values())

    def saw(self, version: int) -> None:
        """The watch has brought everything up to this version."""
        self._seen = max(self._seen, version)

    def put(self, entry: Entry) -> bool:
        """Take what the watch has brought; False: no news."""
        self.saw(entry.version)
        return entry.uid not in self._deleted and self._put(entry)

    def written(self, entry: Entry) -> bool:
        """Take the answer to an own write, unless the watch has got further; False: no news."""
        return entry.version > self._seen and self._put(entry)

    def drop(self, entry: Entry) -> bool:
        """The watch says that the object is gone (as of the entry's version)."""
        self.saw(entry.version)
        self._deleted.discard(entry.uid)
        present = self._entries.get(entry.key)
        if present is None or present.version > entry.version:
            return False  # one of the same name was made since
        self._remove(present)
        return True

    def let_go(self, key: Key, version: int) -> Entry | None:
        """The watch has brought a version that is not kept; what was kept until then."""
        self.saw(version)
        present = self._entries.get(key)
        if present is None or present.version > version:
            return None
        self._remove(present)
        return present

    def deleted(self, key: Key, uid: str) -> bool:
        """We have deleted the object and it is gone at once."""
        present = self._entries.get(key)
        if present is None or present.uid != uid:
            return False
        self._deleted.add(uid)
        self._remove(present)
        return True

    def replace(self, entries: Mapping[Key, Entry], version: int) -> list[Entry]:
        """Take a complete list as of `version`; what is news: new, changed and gone objects.

        A list older than what the watch has brought means that the API server was set back to a
        backup: nothing that is known counts any more.
        """
        is_set_back = version < self._seen
        gone = [
            entry
            for key, entry in self._entries.items()
            if is_set_back or (key not in entries and entry.version <= version)
        ]
        for entry in gone:
            self._remove(entry)
        self._deleted &= {entry.uid for entry in entries.values()}
        self._seen = 0 if is_set_back else self._seen
        news = [entry for entry in entries.values() if self.put(entry)]
        self.saw(version)
        return [*gone, *news]

    def _put(self, entry: Entry) -> bool:
        present = self._entries.get(entry.key)
        if present is not None:
            if present.version >= entry.version:
                return False
            self._remove(present)
        self._entries[entry.key] = entry
        self._groups.setdefault((entry.key.namespace, entry.group), set()).add(entry.key)
        self._keep_limit()
        return present is None or present.data != entry.data

    def _keep_limit(self) -> None:
        if self._limit is None or len(self._entries) <= self._limit:
            return
        spared = self._spared()
        others = [e for e in self._entries.values() if e.group not in spared]
        for entry in others[: max(1, self._limit // 2)]:
            self._remove(entry)
        if not others:
            self._remove(next(iter(self._entries.values())))

    def _remove(self, entry: Entry) -> None:
        del self._entries[entry.key]
        place = (entry.key.namespace, entry.group)
        self._groups[place].discard(entry.key)
        if not self._groups[place]:
            del self._groups[place]


def with_labels(entries: Iterable[Entry], labels: Mapping[str, str]) -> list[Manifest]:
    """The objects that have all of these labels."""
    objects = (entry.decode() for entry in entries)
    return [o for o in objects if labels.items() <= o["metadata"].get("labels", {}).items()]
