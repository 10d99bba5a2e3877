"""Prompt tokens that this router has sent to a worker and that no load report shows yet.

A worker reports its queue every few hundred milliseconds; between reports its true queue is the
reported one plus what was routed since. Invariant: what was sent before `report_lag_ms` ahead of a
report is counted by the report, never twice.
"""

from collections import deque
from dataclasses import dataclass

REPORT_LAG_MS = 20
"""A request sent this shortly before a report arrived may not have been in the worker's count."""

ENTRIES_MAX = 4096
"""Per worker: above it the oldest are taken as reported."""


@dataclass(frozen=True, slots=True)
class _Entry:
    request_id: str
    tokens: int
    sent_ms: int


class Ledger:
    """Unreported prompt tokens and requests in flight, per worker."""

    def __init__(self) -> None:
        self._entries: dict[str, deque[_Entry]] = {}
        self._tokens: dict[str, int] = {}
        self._in_flight: dict[str, int] = {}

    def tokens(self, worker: str) -> int:
        """Prompt tokens sent to `worker` and not yet in its reports."""
        return self._tokens.get(worker, 0)

    def in_flight(self, worker: str) -> int:
        """Requests that this router has open at `worker` as their decode side."""
        return self._in_flight.get(worker, 0)

    def sent(self, worker: str, *, request_id: str, tokens: int, now_ms: int) -> None:
        """A request with `tokens` to compute goes to `worker`."""
        entries = self._entries.setdefault(worker, deque())
        entries.append(_Entry(request_id, tokens, now_ms))
        self._tokens[worker] = self.tokens(worker) + tokens
        if len(entries) > ENTRIES_MAX:
            self._tokens[worker] -= entries.popleft().tokens

    def reported(self, worker: str, *, now_ms: int) -> None:
        """A load report of `worker` arrived."""
        entries = self._entries.get(worker)
        while entries and entries[0].sent_ms <= now_ms - REPORT_LAG_MS:
            self._tokens[worker] -= entries.popleft().tokens

    def prefilled(self, worker: str, *, request_id: str) -> None:
        """The request's first token came, or it failed: nothing of it waits at `worker`."""
        entries = self._entries.get(worker, deque())
        for entry in entries:
            if entry.request_id == request_id:
                entries.remove(entry)
                self._tokens[worker] -= entry.tokens
                return

    def opened(self, worker: str) -> None:
        """A stream from `worker` begins."""
        self._in_flight[worker] = self.in_flight(worker) + 1

    def closed(self, worker: str) -> None:
        """A stream from `worker` has ended."""
        left = self.in_flight(worker) - 1
        assert left >= 0, worker
        if left:
            self._in_flight[worker] = left
        else:
            del self._in_flight[worker]

    def forget(self, worker: str) -> None:
        """`worker` has left the fleet; streams it still has open are closed one by one."""
        self._entries.pop(worker, None)
        self._tokens.pop(worker, None)
