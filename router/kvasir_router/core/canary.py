"""Which pairs of workers a canary should cross, and what is known of each worker from it.

A KV block must have crossed between a worker and one of the other role before the worker counts as
ready; who serves both roles, or has nobody to serve with, needs none. Real hand-offs count too: the
workers themselves say whether KV has crossed. Invariants: at most CHECKS_MAX checks run; a decode
worker pulls in one check at a time; a worker that KV has crossed before is given up only after
FAILURES_MAX checks in a row, so that one slow moment changes nothing.
"""

import enum
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CHECKS_MAX = 8
PEERS_MAX = 3  # lenders that one check tries, so that one bad lender is not the puller's fault
FAILURES_MAX = 3
RECHECK_MS = 60_000
RETRY_MS_MIN = 500
RETRY_MS_MAX = 10_000

Life = tuple[bytes, int]


class Standing(enum.Enum):
    """What is known of one worker."""

    NOT_NEEDED = "not_needed"
    PENDING = "pending"
    CROSSED = "crossed"
    FAILED = "failed"


class Outcome(enum.Enum):
    """What came of one pull."""

    CROSSED = "crossed"
    FAILED = "failed"
    BUSY = "busy"  # nothing was learned
    UNSUPPORTED = "unsupported"  # of an earlier release: nothing will be


@dataclass(frozen=True, slots=True)
class Seat:
    """One worker that may be given requests."""

    name: str
    life: Life
    is_prefill: bool  # and nothing else
    is_decode: bool
    has_crossed: bool  # as it says itself


@dataclass(frozen=True, slots=True)
class Check:
    """A pull to be tried: by `decode`, from the first of `lenders` that it succeeds with."""

    decode: str
    lenders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a lender, or of the whole check where nobody was tried."""

    outcome: Outcome
    error: str = ""


@dataclass(slots=True)
class _Record:
    life: Life
    next_ms: int
    is_settled: bool = False  # ready without a canary: alone when it came, or of an earlier release
    num_checks: int = 0
    num_failures: int = 0
    num_waits: int = 0  # checks in a row that taught nothing
    error: str = ""
    is_checked: bool = False  # a check of it runs


class Canaries:
    """What one router knows; every router asks for itself, the workers' own word they share."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}
        self._seats: dict[str, Seat] = {}
        self._num_prefill = self._num_decode = 0
        self._num_running = 0

    def seat(self, seats: Iterable[Seat], *, now_ms: int) -> None:
        """The workers as they are now; a new life begins anew."""
        self._seats = {seat.name: seat for seat in seats}
        self._num_prefill = sum(seat.is_prefill for seat in self._seats.values())
        self._num_decode = sum(seat.is_decode for seat in self._seats.values())
        self._records = {n: r for n, r in self._records.items() if n in self._seats}
        for name, seat in self._seats.items():
            record = self._records.get(name)
            if record is None or record.life != seat.life:
                wait_ms = zlib.crc32(name.encode()) % RECHECK_MS if seat.has_crossed else 0
                record = self._records[name] = _Record(seat.life, now_ms + wait_ms)
            if not self._is_needed(seat):
                record.is_settled = True

    def due(self, now_ms: int) -> list[Check]:
        """Checks to begin now; each must be `ended`."""
        waiting = [
            seat
            for seat in self._seats.values()
            if self._is_needed(seat) and self._records[seat.name].next_ms <= now_ms
        ]
        waiting.sort(key=lambda seat: self._records[seat.name].next_ms)
        checks = []
        for seat in waiting:
            if self._num_running >= CHECKS_MAX:
                break
            check = self._check_of(seat)
            if check is None or self._records[seat.name].is_checked:
                continue  # its partners are being checked: soon
            for name in (check.decode, check.lenders[0]):
                self._records[name].is_checked = True
                self._records[name].num_checks += 1
            self._num_running += 1
            checks.append(check)
        return checks

    def ended(self, check: Check, results: Sequence[Result], *, now_ms: int) -> None:
        """What came of a check: one result for each lender tried, in order."""
        assert results, "the failure of the check itself is a result, too"
        self._num_running -= 1
        for name in (check.decode, check.lenders[0]):
            if name in self._records:
                self._records[name].is_checked = False
        is_puller_suspect = self._is_suspect(check.decode, results)
        for lender, result in zip(check.lenders, results, strict=False):
            if is_puller_suspect and result.outcome is Outcome.FAILED:
                self._ask_soon(lender, now_ms=now_ms)
            else:
                self._note(lender, result, now_ms=now_ms)
        self._note(check.decode, _of_decode(results), now_ms=now_ms)

    def standing(self, name: str) -> tuple[Standing, str]:
        """What is known of a worker, and why no canary crosses, if none does."""
        seat, record = self._seats.get(name), self._records.get(name)
        if seat is None or record is None or not self._is_needed(seat):
            return Standing.NOT_NEEDED, ""
        is_trusted = seat.has_crossed or record.is_settled
        if record.num_failures >= (FAILURES_MAX if is_trusted else 1):
            return Standing.FAILED, record.error
        if seat.has_crossed:
            return Standing.CROSSED, ""
        if record.is_settled:
            return Standing.NOT_NEEDED, ""
        other = "decode" if seat.is_prefill else "prefill"
        text = record.error or f"no KV block has crossed yet between it and a {other} worker"
        return Standing.PENDING, text

    def _is_needed(self, seat: Seat) -> bool:
        return bool(
            (seat.is_prefill and self._num_decode) or (seat.is_decode and self._num_prefill)
        )

    def _check_of(self, seat: Seat) -> Check | None:
        """A check of this worker; None: nobody of the other role is free now."""
        lenders = self._order(seat, [s for s in self._seats.values() if s.is_prefill])
        if seat.is_decode:
            return Check(seat.name, tuple(s.name for s in lenders[:PEERS_MAX]))
        pullers = self._order(seat, [s for s in self._seats.values() if s.is_decode])
        free = [s for s in pullers if not self._records[s.name].is_checked]
        if not free:
            return None
        others = [s.name for s in lenders if s is not seat]
        return Check(free[0].name, (seat.name, *others[: PEERS_MAX - 1]))

    def _order(self, seat: Seat, partners: list[Seat]) -> list[Seat]:
        """Those that need a check themselves first, those that fail last; else in turns."""
        turn = self._records[seat.name].num_checks

        def key(partner: Seat) -> tuple[int, bool, int]:
            record = self._records[partner.name]
            mixed = zlib.crc32(f"{seat.name} {partner.name} {turn}".encode())
            return record.num_failures, partner.has_crossed, mixed

        return sorted(partners, key=key)

    def _is_suspect(self, decode: str, results: Sequence[Result]) -> bool:
        """Whether failures are rather the puller's: it has failed before, and others have not."""
        failures = {s.name: self._records[s.name].num_failures for s in self._seats.values()}
        others = (s for s in self._seats.values() if s.is_decode and s.name != decode)
        has_crossed = any(result.outcome is Outcome.CROSSED for result in results)
        has_failed = failures.get(decode, 0) > 0 and not has_crossed
        return has_failed and any(failures[other.name] == 0 for other in others)

    def _ask_soon(self, name: str, *, now_ms: int) -> None:
        """A check of its own, with another worker, tells more."""
        record = self._records.get(name)
        if record is not None:
            record.next_ms = min(record.next_ms, now_ms)

    def _note(self, name: str, result: Result, *, now_ms: int) -> None:
        record = self._records.get(name)
        if record is None:
            return
        if result.outcome in (Outcome.CROSSED, Outcome.UNSUPPORTED):
            record.num_failures = record.num_waits = 0
            record.error = ""
            record.is_settled = True
            record.next_ms = now_ms + RECHECK_MS
            return
        record.error = result.error
        record.num_failures += result.outcome is Outcome.FAILED
        record.num_waits += 1
        doubled = RETRY_MS_MIN << min(record.num_waits - 1, 10)
        record.next_ms = now_ms + min(doubled, RETRY_MS_MAX)


def _of_decode(results: Sequence[Result]) -> Result:
    """What the results say of the worker that pulled: the best of them."""
    order = (Outcome.CROSSED, Outcome.UNSUPPORTED, Outcome.FAILED, Outcome.BUSY)
    return min(results, key=lambda result: order.index(result.outcome))
