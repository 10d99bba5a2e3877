"""The order in which cached blocks are given up: the least valuable first.

What a block is worth is the time that computing it again would take, times how likely it is wanted
again, per byte. Blocks of one node are of one layout, so that bytes and, but for attention, time
are alike, and likelihood decides. It is estimated by a frequency that halves with every `half_life`
touches of the cache, which gives uses long ago less weight without a sweep: in

    score = last touch + half_life * log2(frequency then)

all blocks age at one rate, so that their order by score is their order by frequency now, and it
changes only for the block that is touched (LRFU, Lee et al., 2001). Blocks given up are remembered
by name for as many touches as there are slots, with their frequency: one that comes back is
known. Pure; who may be given up is left to the cache.
"""

import heapq
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

HALF_LIFE_PER_SLOT = 16.0
GHOSTS_PER_SLOT = 1.0
HEAP_SLACK = 1024

_Entry = tuple[float, bytes]
"""Score and name."""


@dataclass(frozen=True, slots=True)
class _Known:
    frequency: float
    at: int
    score: float
    group: bytes


class ValueOrder:
    """Names by value, over all and within each group."""

    def __init__(self, num_slots: int, *, half_life_per_slot: float = HALF_LIFE_PER_SLOT) -> None:
        self._half_life = max(1.0, num_slots * half_life_per_slot)
        self._ghosts_max = int(num_slots * GHOSTS_PER_SLOT)
        self._touches = 0
        self._known: dict[bytes, _Known] = {}
        self._ghosts: OrderedDict[bytes, _Known] = OrderedDict()
        self._all: list[_Entry] = []
        self._groups: defaultdict[bytes, list[_Entry]] = defaultdict(list)
        self._group_sizes = Counter[bytes]()

    def add(self, name: bytes, *, group: bytes = b"") -> None:
        """A name comes in, or comes back."""
        self._group_sizes[group] += 1
        self._note(name, self._ghosts.pop(name, None), group)

    def touch(self, name: bytes) -> None:
        """A name that is in was wanted."""
        self._note(name, self._known[name], self._known[name].group)

    def discard(self, name: bytes) -> None:
        """A name goes for another reason than its value, and is not remembered."""
        self._leave(name)

    def take(self, group: bytes | None, may_go: Callable[[bytes], bool]) -> bytes | None:
        """Removes and returns the least valuable name (of the group) that may go, if any."""
        heap = self._all if group is None else self._groups[group]
        refused: list[_Entry] = []
        taken: bytes | None = None
        while heap and taken is None:
            score, name = entry = heapq.heappop(heap)
            if self._score(name) != score:
                continue  # it was touched since, or is gone
            if may_go(name):
                taken = name
                self._remember(name, self._leave(name))
            else:
                refused.append(entry)
        for entry in refused:
            heapq.heappush(heap, entry)
        return taken

    def _note(self, name: bytes, before: _Known | None, group: bytes) -> None:
        self._touches += 1
        frequency = 1.0
        if before is not None:
            frequency += before.frequency * 0.5 ** ((self._touches - before.at) / self._half_life)
        score = self._touches + self._half_life * math.log2(frequency)
        self._known[name] = _Known(frequency, self._touches, score, group)
        self._push(self._all, (score, name), size=len(self._known))
        self._push(self._groups[group], (score, name), size=self._group_sizes[group])

    def _push(self, heap: list[_Entry], entry: _Entry, *, size: int) -> None:
        heapq.heappush(heap, entry)
        if len(heap) > 2 * size + HEAP_SLACK:  # most are of names touched since, or gone
            heap[:] = [entry for entry in heap if self._score(entry[1]) == entry[0]]
            heapq.heapify(heap)

    def _leave(self, name: bytes) -> _Known:
        known = self._known.pop(name)
        self._group_sizes[known.group] -= 1
        if not self._group_sizes[known.group]:
            del self._group_sizes[known.group], self._groups[known.group]
        return known

    def _score(self, name: bytes) -> float | None:
        known = self._known.get(name)
        return None if known is None else known.score

    def _remember(self, name: bytes, known: _Known) -> None:
        self._ghosts[name] = known
        if len(self._ghosts) > self._ghosts_max:
            self._ghosts.popitem(last=False)
