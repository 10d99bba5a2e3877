"""Which worker holds which blocks, as far as this router knows.

Fed by the workers' events (exact while a stream lives) and asked for leading runs. Invariant: never
more than `blocks_max` names, the oldest go first; a wrong answer costs time, never correctness.

One dictionary from name to a bit mask of holders answers for all workers in one walk over a
prompt's names. A worker that sends a new snapshot gets a new bit: its old bit is dead at once and
is swept out later, all dead bits in one pass.
"""

from collections.abc import Iterable, Mapping, Sequence

DEAD_BITS_MAX = 64
"""Dead bits that may pile up before a sweep over all names."""


class PrefixView:
    """Names and their holders."""

    def __init__(self, *, blocks_max: int) -> None:
        self._blocks_max = blocks_max
        self._holders: dict[bytes, int] = {}  # oldest first
        self._bits: dict[str, int] = {}  # worker -> its bit's number
        self._workers: dict[int, str] = {}
        self._counts: dict[str, int] = {}
        self._dead: set[int] = set()
        self._next_bit = 0

    def __len__(self) -> int:
        return len(self._holders)

    @property
    def num_blocks(self) -> Mapping[str, int]:
        """Blocks known of each worker; approximate once old names have been dropped."""
        return self._counts

    def snapshot(self, worker: str, names: Iterable[bytes]) -> None:
        """`names` are all that `worker` holds."""
        self.forget(worker)
        self.stored(worker, names)

    def stored(self, worker: str, names: Iterable[bytes]) -> None:
        """`worker` now holds `names` too."""
        mask = 1 << self._bit(worker)
        for name in names:
            held = self._holders.pop(name, 0)
            self._holders[name] = held | mask
            self._counts[worker] += not held & mask
        while len(self._holders) > self._blocks_max:
            self._drop_oldest()

    def removed(self, worker: str, names: Iterable[bytes]) -> None:
        """`worker` no longer holds `names`."""
        mask = 1 << self._bit(worker)
        for name in names:
            held = self._holders.get(name, 0)
            if held & mask:
                self._counts[worker] -= 1
                if held == mask:
                    del self._holders[name]
                else:
                    self._holders[name] = held & ~mask

    def forget(self, worker: str) -> None:
        """`worker` is gone, or is about to tell all it holds."""
        bit = self._bits.pop(worker, None)
        if bit is None:
            return
        del self._workers[bit], self._counts[worker]
        self._dead.add(bit)
        if len(self._dead) > DEAD_BITS_MAX:
            self._sweep()

    def leading(self, names: Sequence[bytes]) -> dict[str, int]:
        """Workers that hold the first name, and how many leading names each holds."""
        runs: dict[str, int] = {}
        alive = self._live_mask()
        for depth, name in enumerate(names):
            still = alive & self._holders.get(name, 0)
            self._note(runs, alive & ~still, depth)
            alive = still
            if not alive:
                return runs
        self._note(runs, alive, len(names))
        return runs

    def _note(self, runs: dict[str, int], mask: int, depth: int) -> None:
        while mask and depth:
            low = mask & -mask
            runs[self._workers[low.bit_length() - 1]] = depth
            mask ^= low

    def _live_mask(self) -> int:
        return sum(1 << bit for bit in self._workers)

    def _bit(self, worker: str) -> int:
        bit = self._bits.get(worker)
        if bit is None:
            bit = self._next_bit
            self._next_bit += 1
            self._bits[worker], self._workers[bit], self._counts[worker] = bit, worker, 0
        return bit

    def _drop_oldest(self) -> None:
        name = next(iter(self._holders))
        mask = self._holders.pop(name)
        for worker, bit in self._bits.items():
            if mask >> bit & 1:
                self._counts[worker] -= 1

    def _sweep(self) -> None:
        """Gives the live workers the lowest bits again and drops names without a live holder."""
        old_bits = self._bits
        self._bits = {worker: bit for bit, worker in enumerate(old_bits)}
        self._workers = {bit: worker for worker, bit in self._bits.items()}
        moves = [(1 << old_bits[worker], 1 << bit) for worker, bit in self._bits.items()]
        self._holders = {
            name: moved
            for name, held in self._holders.items()
            if (moved := sum(new for old, new in moves if held & old))
        }
        self._dead.clear()
        self._next_bit = len(self._bits)
