"""Who owns which KV block, and which blocks hold reusable prefixes.

Invariants: every block is exactly one of free, evictable (named, referenced by nobody) or owned
(referenced at least once); a name stands for one block; a named block is whole. Unreferenced
named blocks are evicted least recently used first. What the blocks hold, and moving them, is left
to others; the registry makes named blocks visible to peers.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from kvasir_engine.core.types import BlockChange


class BlockRegistry(Protocol):
    """Where peers find blocks by name; `kvasir_kvstore._native.BlockPool` is one."""

    def reset(self, block: int) -> None:
        """The block is about to be filled anew."""

    def publish(self, name: bytes, block: int) -> object:
        """The block is whole and may be pulled by name."""

    def unpublish(self, name: bytes) -> bool:
        """It may be pulled no more. False: a running transfer pins it, so it stays as it is."""


class BlockManager:
    """All KV blocks of one engine."""

    def __init__(self, num_blocks: int, registry: BlockRegistry) -> None:
        self.num_blocks = num_blocks
        self._registry = registry
        self._free = deque(range(num_blocks))
        self._num_refs = [0] * num_blocks
        self._names: list[bytes | None] = [None] * num_blocks
        self._by_name: dict[bytes, int] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._stored: dict[bytes, None] = {}  # net changes since the last `take_changes`
        self._removed: dict[bytes, None] = {}

    @property
    def num_available(self) -> int:
        """Blocks that are free or can be evicted."""
        return len(self._free) + len(self._evictable)

    def names(self) -> tuple[bytes, ...]:
        """Names of all blocks held whole."""
        return tuple(self._by_name)

    def holds(self, name: bytes) -> bool:
        """Whether the block of this name is held whole."""
        return name in self._by_name

    def match(self, names: Iterable[bytes]) -> list[int]:
        """Blocks of the longest leading run of `names` that is held; references are not taken."""
        blocks = []
        for name in names:
            block = self._by_name.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_evictable(self, blocks: Iterable[int]) -> int:
        """How many of these blocks nobody references: taking them uses up available blocks."""
        return sum(self._num_refs[block] == 0 for block in blocks)

    def acquire(self, blocks: Iterable[int]) -> None:
        """Takes one more reference to each of these blocks, which must be named or owned."""
        for block in blocks:
            assert self._num_refs[block] or block in self._evictable, "block is free"
            self._evictable.pop(block, None)
            self._num_refs[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` fresh blocks with one reference each; None (and no change) if there are not."""
        if count > self.num_available or not self._evict(count - len(self._free)):
            return None
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._num_refs[block] = 1
            self._registry.reset(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Gives back one reference to each of these blocks of one chain.

        The end of a chain becomes evictable before its beginning: a prefix without its end is of
        use, the end without its prefix is not.
        """
        for block in reversed(blocks):
            assert self._num_refs[block] > 0, "block is not owned"
            self._num_refs[block] -= 1
            if self._num_refs[block] == 0:
                self._retire(block)

    def name_block(self, block: int, name: bytes) -> None:
        """Names an owned block that is now whole; a second block of one name stays unnamed."""
        assert self._num_refs[block] > 0, "block is not owned"
        if self._names[block] is None and name not in self._by_name:
            self._names[block] = name
            self._by_name[name] = block
            self._registry.publish(name, block)
            if self._removed.pop(name, name) is not None:
                self._stored[name] = None

    def take_changes(self) -> BlockChange | None:
        """What was named and evicted since the last call, on balance."""
        if not self._stored and not self._removed:
            return None
        change = BlockChange(tuple(self._stored), tuple(self._removed))
        self._stored, self._removed = {}, {}
        return change

    def _retire(self, block: int) -> None:
        if self._names[block] is None:
            self._free.append(block)
        else:
            self._evictable[block] = None

    def _evict(self, count: int) -> bool:
        """Frees `count` evictable blocks; False if transfers pin too many of them."""
        victims: list[int] = []
        for block in self._evictable if count > 0 else ():
            if self._registry.unpublish(self._name(block)):
                victims.append(block)
                if len(victims) == count:
                    break
        for block in victims:
            self._forget(block)
        return len(victims) >= count

    def _forget(self, block: int) -> None:
        name = self._name(block)
        del self._evictable[block], self._by_name[name]
        self._names[block] = None
        self._free.append(block)
        if self._stored.pop(name, name) is not None:
            self._removed[name] = None

    def _name(self, block: int) -> bytes:
        name = self._names[block]
        assert name is not None, "block has no name"
        return name
