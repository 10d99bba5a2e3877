"""Which blocks one tier of a KV node holds, and which it gives up for new ones.

A slot is free, reserved (being filled, invisible) or held under one name: reserve, write, commit.
What is given up is the least valuable (core/eviction.py); a tenant that has reached its quota gives
up blocks of its own. Above the high watermark blocks are given up before anybody needs their slots,
down to the low one. Invariants: every slot is in exactly one of the three states; a name is held
or reserved at most once; no tenant has more slots than its quota; a pinned block stays; a block
whose time is over is not found. Moving the bytes and the index are left to the node.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

from kvasir_kvstore.core.eviction import ValueOrder


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a block comes from."""

    tenant: bytes = b""
    """Tells tenants apart; empty: none is named."""
    chain_head: bytes = b""
    """Name of the chain's first block."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a cache."""

    num_slots: int
    tenant_slots_max: int
    ttl_ms: int = 0
    """After a block was stored; 0: no limit."""
    watermarks: tuple[float, float] = (1.0, 1.0)
    """Parts of the slots, high and low: (1, 1) keeps no slot free."""

    @classmethod
    def of(
        cls,
        num_slots: int,
        *,
        tenant_share_max: float = 1.0,
        ttl_ms: int = 0,
        watermarks: tuple[float, float] = (1.0, 1.0),
    ) -> "Limits":
        """With a tenant's quota as a share of the slots."""
        return cls(num_slots, max(1, int(num_slots * tenant_share_max)), ttl_ms, watermarks)


@dataclass(frozen=True, slots=True)
class Reservation:
    """Slots to fill, one per name, and the names given up for them."""

    names: tuple[bytes, ...]
    slots: tuple[int, ...]
    evicted: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """A block that is held, or one that is on its way into its slot."""

    slot: int
    origin: Origin
    stored_ms: int
    is_cold: bool = False
    """It came to be kept, without being wanted: the first to go."""


class BlockCache:
    """The slots of one tier. Times are Unix milliseconds."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.slots_usable = limits.num_slots
        """Fewer than there are while not all can be filled."""
        self._free = list(range(limits.num_slots - 1, -1, -1))
        self._held: dict[bytes, Held] = {}
        self._name_of: dict[int, bytes] = {}
        self._reserved: dict[bytes, Held] = {}
        self._pins = Counter[bytes]()
        self._tenant_slots = Counter[bytes]()
        self._order = ValueOrder(limits.num_slots)
        self._ages: list[tuple[int, bytes]] = []  # a heap of (stored_ms, name); also of names gone

    @property
    def num_slots(self) -> int:
        """Of all states."""
        return self.limits.num_slots

    @property
    def num_held(self) -> int:
        """Blocks that can be served."""
        return len(self._held)

    @property
    def num_reserved(self) -> int:
        """Slots being filled."""
        return len(self._reserved)

    @property
    def num_surplus(self) -> int:
        """Blocks to give up now: down to the low watermark, once there are more than the high one.

        Of few slots none is kept free: both watermarks are rounded up.
        """
        high, low = (math.ceil(self.slots_usable * part) for part in self.limits.watermarks)
        num_used = len(self._held) + len(self._reserved)
        return num_used - low if num_used > high else 0

    def restore(self, blocks: Mapping[bytes, Held]) -> list[bytes]:
        """Holds blocks that lie in their slots already, in an empty cache; names within quotas."""
        assert not self._held
        assert not self._reserved
        kept = []
        for name, held in blocks.items():
            if self._tenant_slots[held.origin.tenant] < self.limits.tenant_slots_max:
                self._tenant_slots[held.origin.tenant] += 1
                self._reserved[name] = held
                kept.append(name)
        taken = {held.slot for held in self._reserved.values()}
        self._free = [slot for slot in self._free if slot not in taken]
        for name in kept:
            self.commit(name)
        return kept

    def names(self) -> list[bytes]:
        """Names held, in the order in which they came."""
        return list(self._held)

    def blocks(self, *, now_ms: int) -> dict[bytes, Held]:
        """What can be found, in the order in which it came."""
        return {name: held for name, held in self._held.items() if not self._is_over(held, now_ms)}

    def find(self, name: bytes, *, now_ms: int) -> Held | None:
        """The block, unless it is not held or its time is over."""
        held = self._held.get(name)
        return None if held is None or self._is_over(held, now_ms) else held

    def missing(self, names: Sequence[bytes]) -> list[bytes]:
        """Names neither held nor being filled, each once, in order."""
        unique = dict.fromkeys(names)
        return [name for name in unique if name not in self._held and name not in self._reserved]

    def tenant_slots(self, tenant: bytes) -> int:
        """Slots that hold blocks of one tenant or are being filled with them."""
        return self._tenant_slots[tenant]

    def touch(self, names: Sequence[bytes]) -> None:
        """The chain is wanted: its blocks gain value, parents the most."""
        for name in reversed(names):
            if name in self._held:
                self._order.touch(name)

    def touch_slots(self, slots: Iterable[int]) -> None:
        """Blocks in these slots were pulled."""
        for slot in slots:
            if (name := self._name_of.get(slot)) is not None:
                self._order.touch(name)

    def pin(self, name: bytes) -> None:
        """The held block stays until it is unpinned as often as it was pinned."""
        assert name in self._held
        self._pins[name] += 1

    def is_pinned(self, name: bytes) -> bool:
        """Whether it must stay."""
        return name in self._pins

    def unpin(self, name: bytes) -> None:
        """Ends one pin."""
        self._pins[name] -= 1
        if not self._pins[name]:
            del self._pins[name]

    def reserve(
        self,
        names: Sequence[bytes],
        origin: Origin,
        *,
        now_ms: int,
        evict: Callable[[bytes], bool] = lambda _: True,
        stored_ms: Mapping[bytes, int] | None = None,
        is_cold: bool = False,
    ) -> Reservation:
        """Slots for the first of these (missing) names, as many as can be had.

        Args:
            evict: takes a name out of service; False if a transfer still reads it.
            stored_ms: when blocks were first stored; none: now.
            is_cold: they are not wanted now.
        """
        since_ms = stored_ms or {}
        taken: list[bytes] = []
        evicted: list[bytes] = []
        with (
            closing(self._victims(origin.tenant, evict)) as own,
            closing(self._victims(None, evict)) as others,
        ):
            for name in names:
                is_over = self._tenant_slots[origin.tenant] >= self.limits.tenant_slots_max
                if is_over or len(self._held) + len(self._reserved) >= self.slots_usable:
                    victim = next(own if is_over else others, None)
                    if victim is None:
                        break
                    evicted.append(victim)
                since = since_ms.get(name, now_ms)
                self._reserved[name] = Held(self._free.pop(), origin, since, is_cold)
                self._tenant_slots[origin.tenant] += 1
                taken.append(name)
        slots = tuple(self._reserved[name].slot for name in taken)
        return Reservation(tuple(taken), slots, tuple(evicted))

    def trim(self, count: int, *, evict: Callable[[bytes], bool]) -> list[bytes]:
        """Gives up the least valuable blocks: so many, or fewer if no other may go."""
        with closing(self._victims(None, evict)) as victims:
            return list(islice(victims, count))

    def commit(self, name: bytes) -> None:
        """The slot reserved for this name is filled: it is held."""
        held = self._reserved.pop(name)
        self._held[name] = held
        self._name_of[held.slot] = name
        if self.limits.ttl_ms:
            heapq.heappush(self._ages, (held.stored_ms, name))
        self._order.add(name, group=held.origin.tenant, is_cold=held.is_cold)

    def abandon(self, name: bytes) -> None:
        """The slot reserved for this name was not filled."""
        self._free_slot(self._reserved.pop(name))

    def drop(self, name: bytes) -> None:
        """The block is not held any more, whatever it was worth. It must not be pinned."""
        assert name not in self._pins
        held = self._held.pop(name)
        del self._name_of[held.slot]
        self._order.discard(name)
        self._free_slot(held)

    def expire(self, *, now_ms: int, evict: Callable[[bytes], bool]) -> list[bytes]:
        """Gives up the blocks whose time is over; those that are pinned or read go later."""
        gone: list[bytes] = []
        kept: list[tuple[int, bytes]] = []
        while self._ages and now_ms - self._ages[0][0] >= self.limits.ttl_ms:
            stored_ms, name = heapq.heappop(self._ages)
            held = self._held.get(name)
            if held is None or held.stored_ms != stored_ms:
                continue
            if self._may_go(name, evict):
                self.drop(name)
                gone.append(name)
            else:
                kept.append((stored_ms, name))
        for age in kept:
            heapq.heappush(self._ages, age)
        return gone

    def _is_over(self, held: Held, now_ms: int) -> bool:
        return 0 < self.limits.ttl_ms <= now_ms - held.stored_ms

    def _may_go(self, name: bytes, evict: Callable[[bytes], bool]) -> bool:
        return name not in self._pins and evict(name)

    def _victims(
        self, tenant: bytes | None, evict: Callable[[bytes], bool]
    ) -> Generator[bytes, None, None]:
        """Frees the slots of the least valuable blocks (of this tenant) that may go."""
        order = self._order.victims(tenant, lambda name: self._may_go(name, evict))
        with closing(order):
            for name in order:
                held = self._held.pop(name)
                del self._name_of[held.slot]
                self._free_slot(held)
                yield name

    def _free_slot(self, held: Held) -> None:
        self._free.append(held.slot)
        self._tenant_slots[held.origin.tenant] -= 1
        if not self._tenant_slots[held.origin.tenant]:
            del self._tenant_slots[held.origin.tenant]
