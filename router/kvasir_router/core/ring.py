"""Two consistent-hash rings over the same workers: which two workers a key belongs to.

Invariants: the same member list gives the same rings on every replica; a pair is two distinct
workers whenever two exist; removing a worker moves only the keys that it owned. Which of the two
serves a request is left to `choose`.

Source: DualMap (arXiv 2602.06502), section on dual mapping.
"""

import hashlib
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field

VIRTUAL_NODES = 128
"""Points per worker and ring: keeps the largest arc share within about 1.25x of the mean."""

KEY_BYTES = 16
_HALVES = struct.Struct("<QQ")


CHANGES_MAX = 16
"""Up to this many joins and departures are worked into a ring; after more it is built anew."""


def _point(person: bytes, worker: str, replica: int) -> int:
    digest = hashlib.blake2b(f"{worker}\0{replica}".encode(), digest_size=8, person=person)
    return int.from_bytes(digest.digest(), "little")


@dataclass(frozen=True, slots=True)
class HashRing:
    """One ring: sorted points on a circle of 2**64, each owned by a worker."""

    person: bytes
    points: Sequence[int]
    owners: Sequence[str]

    @classmethod
    def build(cls, workers: Iterable[str], *, person: bytes) -> "HashRing":
        """The ring of `workers`; `person` makes its hash independent of another ring's."""
        placed = sorted(
            (_point(person, worker, replica), worker)
            for worker in set(workers)
            for replica in range(VIRTUAL_NODES)
        )
        return cls(person, [p for p, _ in placed], [w for _, w in placed])

    def changed(self, *, joined: Iterable[str], gone: Iterable[str]) -> "HashRing":
        """This ring with some workers more and some fewer: the same as one built anew."""
        points, owners, gone = list(self.points), list(self.owners), frozenset(gone)
        if gone:
            kept = [at for at, owner in enumerate(owners) if owner not in gone]
            points, owners = [points[at] for at in kept], [owners[at] for at in kept]
        for worker in joined:
            for replica in range(VIRTUAL_NODES):
                point = _point(self.person, worker, replica)
                at = bisect_left(points, point)
                points.insert(at, point)
                owners.insert(at, worker)
        return HashRing(self.person, points, owners)

    def owner(self, position: int, avoid: Container[str] = ()) -> str | None:
        """The first worker clockwise of `position` that is not in `avoid`."""
        owners = self.owners
        start = bisect_right(self.points, position)
        for at in range(start - len(owners), start):
            if owners[at] not in avoid:
                return owners[at]
        return None


@dataclass(frozen=True, slots=True)
class RingPair:
    """Both rings. `version` is equal for equal member lists, whoever computes it."""

    members: tuple[str, ...]
    first: HashRing = field(repr=False)
    second: HashRing = field(repr=False)
    version: int = 0

    @classmethod
    def build(cls, workers: Iterable[str]) -> "RingPair":
        """Rings over `workers`, in whatever order they come."""
        members = tuple(sorted(set(workers)))
        return cls(
            members,
            HashRing.build(members, person=b"kvasir-ring-1"),
            HashRing.build(members, person=b"kvasir-ring-2"),
            _version(members),
        )

    def changed(self, workers: Iterable[str]) -> "RingPair":
        """The rings of another member list, made from these where that is less work."""
        members = tuple(sorted(set(workers)))
        joined = set(members).difference(self.members)
        gone = set(self.members).difference(members)
        if len(joined) + len(gone) > CHANGES_MAX:
            return RingPair.build(members)
        return RingPair(
            members,
            self.first.changed(joined=joined, gone=gone),
            self.second.changed(joined=joined, gone=gone),
            _version(members),
        )

    def candidates(self, key: bytes, avoid: frozenset[str] = frozenset()) -> tuple[str, ...]:
        """The two workers of a 16-byte key, or fewer if fewer are left outside `avoid`.

        The halves of a key are independent, as a key is itself a hash: one per ring.
        """
        assert len(key) == KEY_BYTES
        one_at, two_at = _HALVES.unpack(key)
        one = self.first.owner(one_at, avoid)
        if one is None:
            return ()
        two = self.second.owner(two_at, avoid | {one} if avoid else (one,))
        return (one,) if two is None else (one, two)


def _version(members: tuple[str, ...]) -> int:
    digest = hashlib.blake2b("\0".join(members).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
