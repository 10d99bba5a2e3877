"""The map of extended keys, as router replicas exchange it, in whatever order it reaches them.

Each prefix has one record, the last decision about it: an edge, or that it has none any more. Of
two records of a prefix the one of the higher version wins (of equal versions, the larger origin);
a replica that decides takes a version above all it has seen. Beyond `RECORDS_MAX` the records of
the lowest versions go, on every replica the same ones.

Invariant: merging is commutative, associative and idempotent, so replicas that have heard the same
records agree. A replica that hears nothing decides by its own window; nothing waits for others.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

RECORDS_MAX = 4_096
"""About 300 KB in memory, 200 KB on the wire."""


@dataclass(frozen=True, slots=True)
class Edge:
    """An extension: prompts that pass block `end` have their key at block number `depth`."""

    depth: int
    end: bytes
    """Name of block number depth - 1, the last one that the hot prefix's requests share."""

    def fits(self, names: Sequence[bytes]) -> bool:
        """Whether a prompt goes on to where the edge leads."""
        return len(names) >= self.depth and names[self.depth - 2] == self.end


@dataclass(frozen=True, slots=True)
class EdgeRecord:
    """The last decision about a prefix. `edge` of None: it is no longer extended."""

    name: bytes
    edge: Edge | None
    version: int
    origin: bytes
    """The replica that decided."""

    @property
    def rank(self) -> tuple[int, bytes, bytes, int, bytes]:
        """Larger wins. Total, even over records that no honest replica makes."""
        edge = self.edge or Edge(0, b"")
        return self.version, self.origin, self.name, edge.depth, edge.end


class EdgeMap:
    """Records by prefix."""

    def __init__(self, origin: bytes, *, records_max: int = RECORDS_MAX) -> None:
        self._origin, self._records_max = origin, records_max
        self._records: dict[bytes, EdgeRecord] = {}
        self._version = 0  # the highest seen
        self.num_changes = 0
        """Grows whenever `records` would give something else."""

    def records(self) -> tuple[EdgeRecord, ...]:
        """All records, for another replica to merge."""
        return tuple(self._records.values())

    def decide(self, name: bytes, edge: Edge | None) -> None:
        """This replica has drawn or taken back the edge of a prefix."""
        self.merge([EdgeRecord(name, edge, self._version + 1, self._origin)])

    def merge(self, records: Iterable[EdgeRecord]) -> list[EdgeRecord]:
        """Takes over what is newer than known; returns what was."""
        newer: dict[bytes, EdgeRecord] = {}
        for record in records:
            known = newer.get(record.name) or self._records.get(record.name)
            if known is None or record.rank > known.rank:
                newer[record.name] = record
        self._records.update(newer)
        self._version = max([self._version, *(record.version for record in newer.values())])
        self._drop_lowest()
        kept = [record for name, record in newer.items() if name in self._records]
        self.num_changes += bool(kept)
        return kept

    def _drop_lowest(self) -> None:
        surplus = len(self._records) - self._records_max
        if surplus > 0:
            for record in sorted(self._records.values(), key=lambda r: r.rank)[:surplus]:
                del self._records[record.name]
