"""Which blocks a KV node holds, and which it gives up for new ones.

A slot of memory is free, reserved (being filled, invisible) or held under one name: reserve,
write, commit. Eviction is least recently used, children before their parents, with a second chance
for blocks that peers have pulled since they were last considered. Invariant: every slot is in
exactly one of the three states, and a name is held or reserved at most once. Moving the bytes,
pins and the index are left to the node.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reservation:
    """Slots to fill, one per name, and the names given up for them."""

    names: tuple[bytes, ...]
    slots: tuple[int, ...]
    evicted: tuple[bytes, ...]


@dataclass(slots=True)
class _Held:
    slot: int
    uses_seen: int


class BlockCache:
    """The slots of one node's memory."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots - 1, -1, -1))
        self._held: OrderedDict[bytes, _Held] = OrderedDict()  # least recently used first
        self._reserved: dict[bytes, int] = {}
        self.num_slots = num_slots

    @property
    def num_held(self) -> int:
        """Blocks that can be served."""
        return len(self._held)

    @property
    def num_reserved(self) -> int:
        """Slots being filled."""
        return len(self._reserved)

    def names(self) -> list[bytes]:
        """Names held, least recently used first."""
        return list(self._held)

    def missing(self, names: Sequence[bytes]) -> list[bytes]:
        """Names neither held nor being filled, each once, in order."""
        unique = dict.fromkeys(names)
        return [name for name in unique if name not in self._held and name not in self._reserved]

    def touch(self, names: Sequence[bytes]) -> None:
        """The chain is wanted: its blocks are the most recently used, parents last to go."""
        for name in reversed(names):
            if name in self._held:
                self._held.move_to_end(name)

    def reserve(
        self,
        names: Sequence[bytes],
        *,
        evict: Callable[[bytes], bool],
        uses: Callable[[int], int],
    ) -> Reservation:
        """Slots for the first of these (missing) names, as many as can be had.

        Args:
            evict: takes a name out of service; False if a transfer still reads it.
            uses: how often a slot's block was pulled so far.
        """
        slots = [self._free.pop() for _ in range(min(len(names), len(self._free)))]
        evicted: list[bytes] = []
        tries = 2 * len(self._held)  # each block may get its second chance once
        while len(slots) < len(names) and self._held and tries > 0:
            tries -= 1
            name, held = next(iter(self._held.items()))
            uses_now = uses(held.slot)
            if uses_now == held.uses_seen and evict(name):
                del self._held[name]
                evicted.append(name)
                slots.append(held.slot)
            else:
                held.uses_seen = uses_now
                self._held.move_to_end(name)
        taken = tuple(names[: len(slots)])
        self._reserved.update(zip(taken, slots, strict=True))
        return Reservation(taken, tuple(slots), tuple(evicted))

    def commit(self, name: bytes, *, uses: int) -> None:
        """The slot reserved for this name is filled: it is held, most recently used.

        Args:
            uses: of the slot so far; what was in it before does not speak for this block.
        """
        slot = self._reserved.pop(name)
        self._held[name] = _Held(slot, uses)

    def abandon(self, name: bytes) -> None:
        """The slot reserved for this name was not filled."""
        self._free.append(self._reserved.pop(name))
