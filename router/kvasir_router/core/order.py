"""Workers in the order of a figure that changes often, so that the least is found at once."""

from bisect import bisect_left, insort
from collections.abc import Iterator

Key = tuple[float, ...]


class Order:
    """Names by key, least first; equal keys by name. O(log n) comparisons per change."""

    def __init__(self) -> None:
        self._keys: dict[str, Key] = {}
        self._sorted: list[tuple[Key, str]] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def __iter__(self) -> Iterator[str]:
        return (name for _, name in self._sorted)

    def items(self) -> Iterator[tuple[Key, str]]:
        """Keys and names."""
        return iter(self._sorted)

    def put(self, name: str, key: Key) -> None:
        """Adds a name, or moves it."""
        if self._keys.get(name) != key:
            self.discard(name)
            self._keys[name] = key
            insort(self._sorted, (key, name))

    def discard(self, name: str) -> None:
        """Takes a name out, if it is there."""
        old = self._keys.pop(name, None)
        if old is not None:
            del self._sorted[bisect_left(self._sorted, (old, name))]

    def least_key(self) -> Key | None:
        """The smallest key; None while empty."""
        return self._sorted[0][0] if self._sorted else None
