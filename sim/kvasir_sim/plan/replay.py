"""One day under one rule, second by second."""

import heapq
from dataclasses import dataclass, field

import numpy as np
from kvasir_operator.core.planner.facts import Role
from kvasir_operator.core.planner.history import Sample

from kvasir_sim.plan.day import Day, Floats
from kvasir_sim.plan.fleet import Fleet
from kvasir_sim.plan.pools import DecodePool, PrefillPool
from kvasir_sim.plan.rules import Rule, Seen
from kvasir_sim.plan.settings import PlanSimSettings

WARMUP_S = 900
"""Requests of the first and last minutes are served but not counted: every rule begins with a
guess, and the last requests have no time to end."""


@dataclass(frozen=True, slots=True)
class DayResult:
    """What a rule made of a day."""

    name: str
    attainment: float  # share of requests that met both objectives
    ttft_attainment: float
    tpot_attainment: float
    worker_hours: float
    workers_mean: float
    workers_max: int
    flips_per_hour: float
    flips_per_hour_max: int  # in the worst clock hour
    changes_per_hour: float
    workers_by_minute: tuple[int, ...] = ()  # paid for at its begin


@dataclass(slots=True)
class _Interval:
    """Sums between two decisions."""

    start_s: float
    arrivals: int = 0
    first_tokens: int = 0
    ttft_ms: float = 0.0
    prompt: float = 0.0
    prompt_squared: float = 0.0
    ended: int = 0
    tpot_ms: float = 0.0
    output: float = 0.0
    attained: int = 0


@dataclass(slots=True)
class Replay:
    """The state of one run."""

    day: Day
    settings: PlanSimSettings
    rule: Rule
    fleet: Fleet = field(init=False)
    prefill: PrefillPool = field(init=False)
    decode: DecodePool = field(init=False)
    firsts: list[tuple[float, int]] = field(default_factory=list)
    next_index: int = 0
    workers_max: int = 0
    workers_by_minute: list[int] = field(default_factory=list)
    flips_by_hour: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.fleet = Fleet(self.settings)
        self.prefill = PrefillPool(self.settings.speed)
        self.decode = DecodePool(self.settings.speed)

    def run(self, name: str) -> DayResult:
        """All of the day; a counted request that is unfinished at its end has missed."""
        count = len(self.day.arrivals_s)
        ttft_ms, tpot_ms = np.full(count, np.inf), np.full(count, np.inf)
        self.fleet.change(self.rule.initial(), 0.0, is_initial=True)
        interval = _Interval(0.0)
        for second in range(self.day.duration_s):
            self._advance(second, ttft_ms, tpot_ms, interval)
            if (second + 1) % self.rule.interval_s == 0:
                self._decide(second + 1, interval)
                interval = _Interval(second + 1.0)
        return self._result(name, ttft_ms, tpot_ms)

    def _advance(self, second: int, ttft_ms: Floats, tpot_ms: Floats, interval: _Interval) -> None:
        """One second: arrivals, prompts that begin, first tokens, decode steps."""
        day, end_s = self.day, second + 1.0
        while self.next_index < len(day.arrivals_s) and day.arrivals_s[self.next_index] < end_s:
            index = self.next_index
            self.prefill.arrive(index, float(day.arrivals_s[index]), float(day.prompts[index]))
            interval.arrivals += 1
            self.next_index += 1
        for index, first_s in self.prefill.advance(self.fleet.serving(Role.PREFILL, second), end_s):
            ttft_ms[index] = 1000 * (first_s - day.arrivals_s[index])
            heapq.heappush(self.firsts, (first_s, index))
            self._note_first(interval, float(ttft_ms[index]), float(day.prompts[index]))
        while self.firsts and self.firsts[0][0] < end_s:
            first_s, index = heapq.heappop(self.firsts)
            prompt, output = float(day.prompts[index]), float(day.outputs[index])
            self.decode.arrive(index, first_s, prompt=prompt, output=output)
        decoders = len(self.fleet.serving(Role.DECODE, second))
        for index, ms in self.decode.advance(decoders, start_s=float(second), end_s=end_s):
            tpot_ms[index] = ms
            interval.ended += 1
            interval.tpot_ms += ms
            interval.output += float(day.outputs[index])
            is_met = ms <= self.settings.slo_tpot_ms
            interval.attained += is_met and ttft_ms[index] <= self.settings.slo_ttft_ms
        self.fleet.pay(1.0, end_s)
        self.workers_max = max(self.workers_max, len(self.fleet.workers))
        if second % 60 == 0:
            self.workers_by_minute.append(len(self.fleet.workers) + len(self.fleet.drained_s))

    def _note_first(self, interval: _Interval, ttft_ms: float, prompt: float) -> None:
        interval.first_tokens += 1
        interval.ttft_ms += ttft_ms
        interval.prompt += prompt
        interval.prompt_squared += prompt**2

    def _decide(self, now_s: int, interval: _Interval) -> None:
        flips = self.fleet.num_flips
        targets = self.rule.decide(self._seen(now_s, interval))
        if targets is not None:
            self.fleet.change(targets, float(now_s), is_initial=False)
        hour = now_s // 3600
        made = self.fleet.num_flips - flips
        self.flips_by_hour[hour] = self.flips_by_hour.get(hour, 0) + made

    def _seen(self, now_s: int, interval: _Interval) -> Seen:
        firsts, ended = max(interval.first_tokens, 1), max(interval.ended, 1)
        busy = sum(w.free_s > now_s for w in self.fleet.serving(Role.PREFILL, now_s))
        oldest_s = self.prefill.queue[0][1] if self.prefill.queue else float(now_s)
        sample = Sample(
            start_ms=int(1000 * interval.start_s),
            end_ms=1000 * now_s,
            arrivals=interval.arrivals,
            measured=interval.first_tokens,
            uncached_tokens=interval.prompt,
            uncached_tokens_squared=interval.prompt_squared,
            prompt_tokens=interval.prompt,
            output_tokens=interval.output * interval.first_tokens / ended,
            judged=interval.ended,
            attained=interval.attained,
            queued_tokens=self.prefill.queued_tokens,
            queue_age_ms=1000 * (now_s - oldest_s),
        )
        fleet = self.fleet
        return Seen(
            sample=sample,
            num_queued=len(self.prefill.queue) + busy,
            num_decoding=self.decode.num_requests,
            replicas={role: fleet.replicas(role) for role in Role},
            ready={role: len(fleet.serving(role, now_s)) for role in Role},
            lent={role: fleet.lent(role) for role in Role},
            ttft_ms=interval.ttft_ms / firsts,
            tpot_ms=interval.tpot_ms / ended,
        )

    def _result(self, name: str, ttft_ms: Floats, tpot_ms: Floats) -> DayResult:
        """Without the first minutes and the last ones, whose requests may be unfinished."""
        arrivals = self.day.arrivals_s
        counted = (arrivals >= WARMUP_S) & (arrivals < self.day.duration_s - WARMUP_S)
        met_ttft = (ttft_ms <= self.settings.slo_ttft_ms)[counted]
        met_tpot = (tpot_ms <= self.settings.slo_tpot_ms)[counted]
        hours = self.day.duration_s / 3600
        return DayResult(
            name=name,
            attainment=float((met_ttft & met_tpot).mean()),
            ttft_attainment=float(met_ttft.mean()),
            tpot_attainment=float(met_tpot.mean()),
            worker_hours=self.fleet.worker_s / 3600,
            workers_mean=self.fleet.worker_s / 3600 / hours,
            workers_max=self.workers_max,
            flips_per_hour=self.fleet.num_flips / hours,
            flips_per_hour_max=max(self.flips_by_hour.values(), default=0),
            changes_per_hour=self.fleet.num_changes / hours,
            workers_by_minute=tuple(self.workers_by_minute),
        )
