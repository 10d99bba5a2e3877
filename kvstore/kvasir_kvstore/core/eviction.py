"""The order in which cached blocks are given up: the least valuable first.

What a block is worth is the time that computing it again would take, times how likely it is wanted
again, per byte. Blocks of one node are of one layout, so that bytes and, but for attention, time
are alike, and likelihood decides. It is estimated by a frequency that halves with every `half_life`
touches of the cache, which gives uses long ago less weight without a sweep: in

    score = last touch + half_life * log2(frequency then)

all blocks age at one rate, so that their order by score is their order by frequency now, and it
changes only for the block that is touched (LRFU, Lee et al., 2001). Blocks given up are remembered
by name for a while, with their frequency: one that comes back is known.

A short half life makes this LRU, a long one LFU; which is right differs between loads and sizes. So
a few half lives are tried all the time, each in a model of the cache that sees every 16th name and
holds as many fewer (Waldspurger et al., 2017), and the one whose model had the most hits is used.
Pure; who may be given up is left to the cache.
"""

import heapq
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

HALF_LIVES_PER_SLOT = (0.25, 1.0, 4.0, 16.0)
GHOSTS_PER_SLOT = 4
HEAP_SLACK = 1024
SAMPLING_MAX = 16
MODEL_SLOTS_MIN = 64
TRIAL_TOUCHES_PER_SLOT = 4
HITS_KEPT = 0.5
"""Of the hits of earlier trials, at each new one."""

COLD_FREQUENCY = 2.0**-64
"""Of a name that came without being wanted: as of one wanted 64 half lives ago."""

_Entry = tuple[float, bytes]
"""Score and name."""


@dataclass(frozen=True, slots=True)
class _Known:
    frequency: float
    at: int
    score: float
    group: bytes


class Ranking:
    """Names by value under one half life, over all and within each group."""

    def __init__(self, num_slots: int, *, half_life: float) -> None:
        self.half_life = half_life
        self._ghosts_max = num_slots * GHOSTS_PER_SLOT
        self._touches = 0
        self._known: dict[bytes, _Known] = {}
        self._ghosts: OrderedDict[bytes, _Known] = OrderedDict()
        self._all: list[_Entry] = []
        self._groups: defaultdict[bytes, list[_Entry]] = defaultdict(list)
        self._group_sizes = Counter[bytes]()

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, name: bytes) -> bool:
        return name in self._known

    def add(self, name: bytes, *, group: bytes = b"", is_cold: bool = False) -> None:
        """A name comes in, or comes back; a cold one is worth less than any that was wanted."""
        self._group_sizes[group] += 1
        before = self._ghosts.pop(name, None)
        if is_cold:
            self._set(name, COLD_FREQUENCY, group)
        else:
            self._note(name, before, group)

    def touch(self, name: bytes) -> None:
        """A name that is in was wanted."""
        self._note(name, self._known[name], self._known[name].group)

    def discard(self, name: bytes) -> None:
        """A name goes for another reason than its value, and is not remembered."""
        self._leave(name)

    def take(
        self, group: bytes | None, may_go: Callable[[bytes], bool] = lambda _: True
    ) -> bytes | None:
        """Removes and returns the least valuable name (of the group) that may go, if any."""
        with closing(self.victims(group, may_go)) as victims:
            return next(victims, None)

    def victims(
        self, group: bytes | None, may_go: Callable[[bytes], bool]
    ) -> Generator[bytes, None, None]:
        """Removes and yields the least valuable names (of the group) that may go.

        Those that may not are asked about once, however many are taken. To be closed.
        """
        heap = self._all if group is None else self._groups[group]
        refused: list[_Entry] = []
        try:
            while heap:
                score, name = entry = heapq.heappop(heap)
                if self._score(name) != score:
                    continue  # it was touched since, or is gone
                if may_go(name):
                    self._remember(name, self._leave(name))
                    yield name
                else:
                    refused.append(entry)
        finally:
            for entry in refused:
                heapq.heappush(heap, entry)

    def use(self, half_life: float) -> None:
        """Ranks all names anew."""
        if half_life == self.half_life:
            return
        self.half_life = half_life
        self._all.clear()
        self._groups.clear()
        for name, known in self._known.items():
            score = known.at + half_life * math.log2(known.frequency)
            self._known[name] = _Known(known.frequency, known.at, score, known.group)
            self._all.append((score, name))
            self._groups[known.group].append((score, name))
        for heap in (self._all, *self._groups.values()):
            heapq.heapify(heap)

    def _note(self, name: bytes, before: _Known | None, group: bytes) -> None:
        self._touches += 1
        frequency = 1.0
        if before is not None:
            frequency += before.frequency * 0.5 ** ((self._touches - before.at) / self.half_life)
        self._set(name, frequency, group)

    def _set(self, name: bytes, frequency: float, group: bytes) -> None:
        score = self._touches + self.half_life * math.log2(frequency)
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


class _Trials:
    """Models of the cache, one per half life, and how many hits each would have had."""

    def __init__(self, num_slots: int) -> None:
        self._sampling = max(1, min(SAMPLING_MAX, num_slots // MODEL_SLOTS_MIN))
        self._slots = max(1, num_slots // self._sampling)
        self._models = {
            half_life: Ranking(self._slots, half_life=half_life * self._slots)
            for half_life in HALF_LIVES_PER_SLOT
        }
        self._hits = dict.fromkeys(HALF_LIVES_PER_SLOT, 0.0)
        self._touches = 0

    def wanted(self, name: bytes) -> float | None:
        """The half life, per slot, to be used from now on; None: as before."""
        if int.from_bytes(name[:4], "big") % self._sampling:
            return None
        for half_life, model in self._models.items():
            if name in model:
                self._hits[half_life] += 1
                model.touch(name)
                continue
            model.add(name)
            if len(model) > self._slots:
                model.take(None)
        self._touches += 1
        if self._touches % (TRIAL_TOUCHES_PER_SLOT * self._slots):
            return None
        best = max(self._hits, key=lambda half_life: self._hits[half_life])
        self._hits = {half_life: HITS_KEPT * hits for half_life, hits in self._hits.items()}
        return best


class ValueOrder:
    """Names by value, under the half life that suits the load."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._ranking = Ranking(num_slots, half_life=num_slots)
        self._trials = _Trials(num_slots)

    def __contains__(self, name: bytes) -> bool:
        return name in self._ranking

    def add(self, name: bytes, *, group: bytes = b"", is_cold: bool = False) -> None:
        """A name comes in, or comes back; a cold one because it is to be kept, not wanted."""
        self._ranking.add(name, group=group, is_cold=is_cold)
        if not is_cold:
            self._wanted(name)

    def touch(self, name: bytes) -> None:
        """A name that is in was wanted."""
        self._ranking.touch(name)
        self._wanted(name)

    def discard(self, name: bytes) -> None:
        """A name goes for another reason than its value, and is not remembered."""
        self._ranking.discard(name)

    def take(
        self, group: bytes | None, may_go: Callable[[bytes], bool] = lambda _: True
    ) -> bytes | None:
        """Removes and returns the least valuable name (of the group) that may go, if any."""
        return self._ranking.take(group, may_go)

    def victims(
        self, group: bytes | None, may_go: Callable[[bytes], bool]
    ) -> Generator[bytes, None, None]:
        """Removes and yields the least valuable names (of the group) that may go. To be closed."""
        return self._ranking.victims(group, may_go)

    def _wanted(self, name: bytes) -> None:
        half_life = self._trials.wanted(name)
        if half_life is not None:
            self._ranking.use(half_life * self._num_slots)
