"""The event engine: arrivals, completions, reports and changes of the fleet on one clock.

Invariant: every request of the trace is served or refused exactly once. Decisions are left to the
policies and to the workers' queues.
"""

import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from kvasir_sim.decode import DecodeStage
from kvasir_sim.fleet import Fleet
from kvasir_sim.lines import Dismissed
from kvasir_sim.policy import Action, Recall, Refuse, RoutingPolicy, Send, Why
from kvasir_sim.settings import FleetChange, SimSettings
from kvasir_sim.trace import TraceRequest
from kvasir_sim.worker import Job

HOP_MS = 1.0
"""From a worker to a router or back, beside the prompts themselves."""

DECODE_REPORT_MS = 250.0
"""How often decode workers report when the others' queues are known exactly."""

HELD_MS_MAX = 3_600_000.0
"""A policy that still holds requests this long after the last arrival has lost them."""

Progress = Callable[[int, int], None]


class Engine:
    """One run."""

    def __init__(
        self,
        settings: SimSettings,
        policy: type[RoutingPolicy],
        *,
        progress: Progress | None = None,
    ) -> None:
        self.served: list[Job] = []
        self.refused: list[Job] = []
        self.num_moved = self.num_recalled = 0
        self._settings, self._progress = settings, progress
        self._random = random.Random(settings.seed)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        discipline = settings.worker_queue or policy.discipline
        self.fleet = Fleet(settings, discipline, self._random)
        self.policies = [
            policy(view, settings, number) for number, view in enumerate(self.fleet.views)
        ]
        for replica in self.policies:
            replica.meet([peer for peer in self.policies if peer is not replica])
        self._num_open = 0
        self._decode: DecodeStage | None = None
        if settings.decode_workers:
            self._decode = DecodeStage(settings, at=self.at, ended=self._last_token)
            self._report_decode(0.0)

    def run(self, requests: Sequence[TraceRequest], arrivals_ms: Sequence[float]) -> None:
        """Replays the requests until each is served or refused."""
        self._plan()
        total = len(requests)
        for index, (request, now_ms) in enumerate(zip(requests, arrivals_ms, strict=True)):
            self._run_until(now_ms)
            self._arrive(index, request, now_ms)
            if self._progress is not None and index % 100 == 0:
                self._progress(index, total)
        end_ms = arrivals_ms[-1] + HELD_MS_MAX
        while self._num_open:
            assert self._events, "a policy lost requests"
            assert self._events[0][0] < end_ms, "a policy lost requests"
            self._step()

    def at(self, time_ms: float, event: Callable[[float], None]) -> None:
        """Calls `event(time_ms)` then; what was planned first comes first."""
        heapq.heappush(self._events, (time_ms, next(self._order), event))

    def _plan(self) -> None:
        """The events that do not depend on any decision."""
        if not self.fleet.is_exact:
            self.at(self._settings.sync_ms, self._sync)
        for replica, policy in enumerate(self.policies):
            if policy.tick_ms:
                self.at(policy.tick_ms, partial(self._tick, replica))
        for change in self._settings.fleet_changes():
            self.at(change.at_s * 1_000, partial(self._change, change))

    def _run_until(self, now_ms: float) -> None:
        while self._events and self._events[0][0] <= now_ms:
            self._step()

    def _step(self) -> None:
        now_ms, _, event = heapq.heappop(self._events)
        event(now_ms)

    def _arrive(self, index: int, request: TraceRequest, now_ms: float) -> None:
        slo_ms = request.ttft_slo_ms or self._settings.slo_ttft_ms
        replica = self._random.randrange(len(self.policies)) if len(self.policies) > 1 else 0
        job = Job(index, request, now_ms, now_ms + slo_ms, replica)
        self._num_open += 1
        self._act(replica, self.policies[replica].arrived(job, now_ms), now_ms)

    def _act(self, replica: int, actions: Iterable[Action], now_ms: float) -> None:
        for action in actions:
            match action:
                case Send(job, worker, may_move, decode):
                    assert job.replica == replica, "requests stay with the replica they came to"
                    job.may_move, job.decode = may_move, decode
                    self._send(job, worker, now_ms)
                case Refuse(job):
                    self._end(job, self.refused)
                case Recall(job, worker):
                    self.at(now_ms + HOP_MS, partial(self._recall, job, worker))

    def _send(self, job: Job, name: str, now_ms: float) -> None:
        worker = self.fleet.workers.get(name)
        if worker is None:  # it failed, and this replica does not know yet
            self.at(now_ms + HOP_MS, partial(self._give_back, job, name, Why.FAILED))
            return
        self.fleet.views[job.replica].sent(name, job.index, job.request)
        self._dismiss(worker.accept(job, now_ms), now_ms)
        self._start(name, now_ms)

    def _recall(self, job: Job, name: str, now_ms: float) -> None:
        worker = self.fleet.workers.get(name)
        if worker is not None and job.worker == name and worker.line.take_out(job):
            self.num_recalled += 1
            self.at(now_ms + HOP_MS, partial(self._give_back, job, name, Why.RECALLED))
            self._retire_if_done(name)

    def _start(self, name: str, now_ms: float) -> None:
        job, dismissed = self.fleet.workers[name].start_next(now_ms)
        if job is not None:
            self.at(job.finished_ms, partial(self._finish, name, job))
        self._dismiss(dismissed, now_ms)

    def _finish(self, name: str, job: Job, now_ms: float) -> None:
        worker = self.fleet.workers.get(name)
        if worker is None or worker.current is not job:  # the worker failed meanwhile
            return
        self.fleet.stored(name, *worker.finish())
        view, policy = self.fleet.views[job.replica], self.policies[job.replica]
        view.ended(job.index, is_served=True)
        if self._decode is not None and job.request.output_tokens > 1:
            self._decode.take(job, job.decode or policy.choose_decode(job, now_ms), now_ms)
            view.decode_began(job.decode)
        else:
            self._last_token(job, now_ms)
        self._act(job.replica, policy.first_token(job, name, now_ms), now_ms)
        self._start(name, now_ms)
        self._retire_if_done(name)

    def _last_token(self, job: Job, now_ms: float) -> None:
        job.last_token_ms = now_ms
        self._end(job, self.served)
        self.policies[job.replica].ended(job, now_ms)

    def _dismiss(self, dismissed: Iterable[Dismissed], now_ms: float) -> None:
        for one in dismissed:
            if one.is_refused:
                self.fleet.views[one.job.replica].ended(one.job.index, is_served=False)
                self._end(one.job, self.refused)
                policy = self.policies[one.job.replica]
                actions = policy.refused(one.job, one.job.worker, now_ms)
                self._act(one.job.replica, actions, now_ms)
            else:
                self.num_moved += 1
                event = partial(self._give_back, one.job, one.job.worker, Why.BUSY)
                self.at(now_ms + HOP_MS, event)

    def _give_back(self, job: Job, worker: str, why: Why, now_ms: float) -> None:
        self.fleet.views[job.replica].ended(job.index, is_served=False)
        actions = self.policies[job.replica].returned(job, worker, why, now_ms)
        self._act(job.replica, actions, now_ms)

    def _end(self, job: Job, where: list[Job]) -> None:
        self._num_open -= 1
        where.append(job)

    def _sync(self, now_ms: float) -> None:
        self.fleet.report(now_ms)
        self.at(now_ms + self._settings.sync_ms, self._sync)

    def _report_decode(self, now_ms: float) -> None:
        assert self._decode is not None
        reports = self._decode.reports()
        for view, policy in zip(self.fleet.views, self.policies, strict=True):
            view.decode_reported(reports)
            policy.decode_reported(now_ms)
        period_ms = DECODE_REPORT_MS if self.fleet.is_exact else self._settings.sync_ms
        self.at(now_ms + period_ms, self._report_decode)

    def _tick(self, replica: int, now_ms: float) -> None:
        policy = self.policies[replica]
        self._act(replica, policy.tick(now_ms), now_ms)
        self.at(now_ms + policy.tick_ms, partial(self._tick, replica))

    def _change(self, change: FleetChange, now_ms: float) -> None:
        match change.kind:
            case "+":
                self.fleet.join(change.num_workers)
            case "-":
                for name in self.fleet.leave(change.num_workers):
                    self._retire_if_done(name)
            case "x":
                for name in self.fleet.newest(change.num_workers):
                    self._fail(name, now_ms)
        for replica, policy in enumerate(self.policies):
            self._act(replica, policy.members(now_ms), now_ms)

    def _fail(self, name: str, now_ms: float) -> None:
        """What the worker had accepted goes back to the routers, which see the broken streams."""
        for job in self.fleet.workers[name].fail():
            self.at(now_ms + HOP_MS, partial(self._give_back, job, name, Why.FAILED))
        self.fleet.remove(name)

    def _retire_if_done(self, name: str) -> None:
        if name in self.fleet.leaving and not self.fleet.workers[name].num_pending:
            self.fleet.remove(name)
