"""Prompt tokens that this router has sent to a worker and that no load report shows yet.

A worker reports its queue every few hundred milliseconds; between reports its true queue is the
reported one plus what was routed since. Invariant: what was sent before `report_lag_ms` ahead of a
report is counted by the report, never twice. Every call is O(1), however long the queues.
"""

from collections import OrderedDict

REPORT_LAG_MS = 20
"""A request sent this shortly before a report arrived may not have been in the worker's count."""

ENTRIES_MAX = 4096
"""Per worker: above it the oldest are taken as reported."""


class Ledger:
    """Unreported prompt tokens and requests in flight, per worker."""

    def __init__(self) -> None:
        self._sent: dict[str, OrderedDict[str, tuple[int, int]]] = {}  # id -> (tokens, sent_ms)
        self._tokens: dict[str, int] = {}
        self._in_flight: dict[str, int] = {}
        self._since_report: dict[str, int] = {}
        self._changed: set[str] = set()

    def tokens(self, worker: str) -> int:
        """Prompt tokens sent to `worker` and not yet in its reports."""
        return self._tokens.get(worker, 0)

    def in_flight(self, worker: str) -> int:
        """Requests that this router has open at `worker` as their decode side."""
        return self._in_flight.get(worker, 0)

    def opened_since_report(self, worker: str) -> int:
        """Streams opened at `worker` since its last report, less those closed; may be negative."""
        return self._since_report.get(worker, 0)

    def take_changed(self) -> set[str]:
        """Workers whose streams have changed since the last call."""
        if not self._changed:
            return self._changed
        changed, self._changed = self._changed, set()
        return changed

    def sent(self, worker: str, *, request_id: str, tokens: int, now_ms: int) -> None:
        """A request with `tokens` to compute goes to `worker`."""
        entries = self._sent.get(worker)
        if entries is None:
            entries = self._sent[worker] = OrderedDict()
        elif request_id in entries:
            self._tokens[worker] -= entries.pop(request_id)[0]
        entries[request_id] = (tokens, now_ms)
        self._tokens[worker] = self._tokens.get(worker, 0) + tokens
        if len(entries) > ENTRIES_MAX:
            self._drop_oldest(worker, entries)

    def reported(self, worker: str, *, now_ms: int) -> None:
        """A load report of `worker` arrived."""
        self._since_report.pop(worker, None)
        entries = self._sent.get(worker)
        while entries and next(iter(entries.values()))[1] <= now_ms - REPORT_LAG_MS:
            self._drop_oldest(worker, entries)

    def prefilled(self, worker: str, *, request_id: str) -> None:
        """The request's first token came, or it failed: nothing of it waits at `worker`."""
        entries = self._sent.get(worker)
        if entries and request_id in entries:
            self._tokens[worker] -= entries.pop(request_id)[0]

    def opened(self, worker: str) -> None:
        """A stream from `worker` begins."""
        self._in_flight[worker] = self._in_flight.get(worker, 0) + 1
        self._since_report[worker] = self._since_report.get(worker, 0) + 1
        self._changed.add(worker)

    def closed(self, worker: str) -> None:
        """A stream from `worker` has ended."""
        left = self.in_flight(worker) - 1
        assert left >= 0, worker
        self._since_report[worker] = self.opened_since_report(worker) - 1
        self._changed.add(worker)
        if left:
            self._in_flight[worker] = left
        else:
            del self._in_flight[worker]

    def forget(self, worker: str) -> None:
        """`worker` has left the fleet; streams it still has open are closed one by one."""
        self._sent.pop(worker, None)
        self._tokens.pop(worker, None)
        self._since_report.pop(worker, None)

    def _drop_oldest(self, worker: str, entries: OrderedDict[str, tuple[int, int]]) -> None:
        _, (tokens, _) = entries.popitem(last=False)
        self._tokens[worker] -= tokens
