"""What one router replica knows of the workers.

With one replica, or a sync period of 0, everything as it is. Otherwise a worker's queue and cache
are known as they stood at the last report that came through, less what the worker can have computed
since, plus what this replica has itself sent since. Policies read nothing else of the fleet.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvasir_router.core.prefix import PrefixView

from kvasir_sim.decode import DecodeReport
from kvasir_sim.trace import BLOCK_TOKENS, TraceRequest
from kvasir_sim.worker import SimWorker


@dataclass(frozen=True, slots=True)
class Report:
    """A worker's queue at one time."""

    at_ms: float
    pending_tokens: int
    num_pending: int


GONE_TOKENS = 1 << 40
GONE_US_PER_TOKEN = 1e6
"""Of a worker that is no more: nobody would wait for it."""

NOTHING = Report(0.0, 0, 0)


class _OwnPrompts:
    """Blocks of the prompts that a replica has sent: they will be where it sent them."""

    def __init__(self) -> None:
        self._holders: dict[bytes, dict[str, int]] = {}  # name -> worker -> prompts

    def add(self, worker: str, names: Sequence[bytes]) -> None:
        """A prompt was sent."""
        for name in names:
            holders = self._holders.setdefault(name, {})
            holders[worker] = holders.get(worker, 0) + 1

    def remove(self, worker: str, names: Sequence[bytes]) -> None:
        """One of the prompts that were sent counts no more."""
        for name in names:
            holders = self._holders[name]
            holders[worker] -= 1
            if not holders[worker]:
                del holders[worker]
                if not holders:
                    del self._holders[name]

    def run(self, worker: str, names: Sequence[bytes]) -> int:
        """Leading names that prompts sent to one worker have."""
        run = 0
        for name in names:
            if worker not in self._holders.get(name, ()):
                break
            run += 1
        return run

    def extend(self, runs: dict[str, int], names: Sequence[bytes]) -> None:
        """Lengthens leading runs by those of the own prompts, each of which is whole."""
        for depth, name in enumerate(names, start=1):
            holders = self._holders.get(name)
            if holders is None:
                return
            for worker in holders:
                runs[worker] = max(runs.get(worker, 0), depth)


class ReplicaView:
    """One replica's knowledge. The engine writes it; policies only read."""

    def __init__(
        self, workers: Mapping[str, SimWorker], blocks: PrefixView, *, is_exact: bool
    ) -> None:
        self.members: tuple[str, ...] = tuple(workers)
        """Workers that may be chosen, in a fixed order."""
        self._workers, self._blocks, self.is_exact = workers, blocks, is_exact
        self.decode: Mapping[str, DecodeReport] = {}
        """Decode workers, as they last reported; written by `decode_reported`."""
        self._reports: dict[str, Report] = {}
        self._sent: dict[str, dict[int, int]] = {}  # worker -> request -> its uncached tokens
        self._own = _OwnPrompts()
        self._open: dict[int, tuple[str, Sequence[bytes]]] = {}
        self._ended: dict[str, list[Sequence[bytes]]] = {}  # by worker, since its last report
        self._begun = Counter[str]()  # own requests by decode worker, since its last report

    def pending_tokens(self, worker: str, now_ms: float) -> int:
        """Uncached prompt tokens that `worker` was given and, as far as known, has not computed."""
        if worker not in self._workers:
            return GONE_TOKENS
        if self.is_exact:
            return self._workers[worker].pending_tokens(now_ms)
        report = self._reports.get(worker, NOTHING)
        computed = int((now_ms - report.at_ms) * 1_000 / self.us_per_token(worker))
        return max(report.pending_tokens - computed, 0) + self.own_tokens(worker)

    def num_pending(self, worker: str) -> int:
        """Requests that `worker` was given and, as far as known, has not computed."""
        if self.is_exact:
            return self._workers[worker].num_pending
        reported = self._reports.get(worker, NOTHING).num_pending
        return reported + len(self._sent.get(worker, ()))

    def own_tokens(self, worker: str) -> int:
        """The part of `pending_tokens` that this replica sent after the worker's last report."""
        return 0 if self.is_exact else sum(self._sent.get(worker, {}).values())

    def us_per_token(self, worker: str) -> float:
        """What the worker says a computed prompt token costs it."""
        known = self._workers.get(worker)
        return known.speed.prefill_us if known else GONE_US_PER_TOKEN

    def leading(self, names: Sequence[bytes]) -> Mapping[str, int]:
        """Workers that hold, or will hold by what this replica sent, the first block; and how many
        leading blocks each."""
        runs = self._blocks.leading(names)
        self._own.extend(runs, names)
        return runs

    def hit_tokens(self, worker: str, request: TraceRequest) -> int:
        """Leading prompt tokens that `worker` holds."""
        names = request.names
        run = max(self._blocks.match(names, (worker,))[worker], self._own.run(worker, names))
        return min(run * BLOCK_TOKENS, request.input_tokens)

    @property
    def blocks(self) -> PrefixView:
        """The production index behind `leading`."""
        return self._blocks

    def sent(self, worker: str, index: int, request: TraceRequest) -> None:
        """This replica sent a request."""
        if not self.is_exact:
            uncached_tokens = request.input_tokens - self.hit_tokens(worker, request)
            self._sent.setdefault(worker, {})[index] = uncached_tokens
        self._open[index] = (worker, request.names)
        self._own.add(worker, request.names)

    def ended(self, index: int, *, is_served: bool) -> None:
        """The first token of an own request came, or it came back."""
        if index not in self._open:  # it was sent to a worker that was gone
            return
        worker, names = self._open.pop(index)
        self._sent.get(worker, {}).pop(index, None)
        if is_served and not self.is_exact:
            self._ended.setdefault(worker, []).append(names)
        else:
            self._own.remove(worker, names)

    def reported(self, worker: str, report: Report) -> None:
        """A worker's report: it counts all that was sent before."""
        self._reports[worker] = report
        self._sent.pop(worker, None)
        for names in self._ended.pop(worker, ()):
            self._own.remove(worker, names)

    def decode_running(self, worker: str) -> int:
        """Requests that a decode worker was given and, as far as known, has not ended."""
        return self.decode[worker].num_running + self._begun[worker]

    def decode_began(self, worker: str) -> None:
        """This replica's request is handed off to a decode worker."""
        self._begun[worker] += 1

    def decode_reported(self, reports: Mapping[str, DecodeReport]) -> None:
        """All decode workers have reported."""
        self.decode = reports
        self._begun.clear()

    def left(self, worker: str) -> None:
        """The worker is no member any more."""
        self._reports.pop(worker, None)
        self._sent.pop(worker, None)
        for names in self._ended.pop(worker, ()):
            self._own.remove(worker, names)
