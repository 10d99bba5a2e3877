"""Stop strings on streamed text: decides which characters may go out and where the text ends.

Invariant: whatever pieces the text arrives in, what goes out is the text up to the stop string
that ends first (the longest of those, if several end there). Only characters that may still
become part of a stop string are held back.
"""

from collections.abc import Sequence


class StopChecker:
    """Finds the first stop string in text that arrives piece by piece."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self._num_emitted = 0
        self.is_stopped = False

    @property
    def num_chars_emitted(self) -> int:
        """Characters handed out so far; once stopped: where the text was cut."""
        return self._num_emitted

    def feed(self, text: str) -> str:
        """Characters that may go out after `text` has arrived; none after a stop."""
        if self.is_stopped:
            return ""
        window = self._held + text
        cut = self._cut(window)
        if cut is not None:
            self.is_stopped = True
            return self._emit(window, cut)
        return self._emit(window, len(window) - self._num_held(window))

    def flush(self) -> str:
        """What was held back, when no more text will come."""
        return "" if self.is_stopped else self._emit(self._held, len(self._held))

    def _emit(self, window: str, end: int) -> str:
        self._held = "" if self.is_stopped else window[end:]
        self._num_emitted += end
        return window[:end]

    def _cut(self, window: str) -> int | None:
        """Start of the stop string that ends first."""
        found = [(at + len(stop), at) for stop in self._stops if (at := window.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _num_held(self, window: str) -> int:
        """Length of the longest suffix that begins a stop string."""
        longest = min(len(window), max(map(len, self._stops), default=1) - 1)
        for size in range(longest, 0, -1):
            suffix = window[-size:]
            if any(stop.startswith(suffix) for stop in self._stops):
                return size
        return 0
