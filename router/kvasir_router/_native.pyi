"""Who holds which block, in C++: a million names take about 60 MB and a walk a few microseconds.

Names are 16 bytes; anything else raises ValueError. Nothing here waits, and nothing is thread-safe.
"""

from collections.abc import Sequence

class PrefixIndex:
    """Names and their holders. A holder is a small number, its seat."""

    def __init__(self, *, blocks_max: int) -> None: ...
    def take_seat(self) -> int:
        """A seat that no name knows. ValueError: more than 8,192 are taken."""
    def give_up_seat(self, seat: int) -> None:
        """Forget all that the seat holds. IndexError: nobody has it; so in all calls below."""
    def store(self, seat: int, names: Sequence[bytes]) -> None:
        """The seat holds these too; they become the newest, and the oldest of all may go."""
    def remove(self, seat: int, names: Sequence[bytes]) -> None:
        """The seat no longer holds these."""
    def match(
        self,
        names: Sequence[bytes],
        wanted: tuple[str, ...],
        seats: dict[str, int],
        workers: list[str],
        num_longest: int,
        /,
    ) -> dict[str, int]:
        """Leading names held: the longest runs of all, longest first, then all `wanted`.

        `seats` gives a worker's seat, `workers` a seat's worker.
        """
    def num_blocks(self, seat: int) -> int:
        """Names that the seat holds."""
    @property
    def num_bytes(self) -> int:
        """Memory in use."""
    def __len__(self) -> int:
        """Names known."""

class AgedNames:
    """The cache of a worker that does not tell, imitated: what was sent to it, by last use."""

    def __init__(self) -> None: ...
    def use(self, names: Sequence[bytes], *, now_ms: int, num_names_max: int) -> list[bytes]:
        """A prompt with these names is computed; returns what had to go for it."""
    def drop_before(self, *, since_ms: int) -> list[bytes]:
        """Returns what was last used before then, and forgets it."""
    @property
    def num_bytes(self) -> int:
        """Memory in use."""
    def __len__(self) -> int:
        """Names held."""
