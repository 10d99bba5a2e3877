"""The bars of the routing core, in the simulator: `python bench/routing_bars.py TRACE [--json F]`.

TRACE is Mooncake's conversation trace: 4,000 requests up to 20,480 tokens, 8 workers, TTFT SLO 5 s.
Prints one line a bar, what was measured and what was asked for; ends with 1 if one is missed.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvasir_router.core.keys import KeyLimits, KeyTree
from kvasir_router.core.ring import RingPair
from kvasir_sim.engine import Engine
from kvasir_sim.main import POLICIES, simulate
from kvasir_sim.readers import load_trace
from kvasir_sim.result import SimResult
from kvasir_sim.settings import SimSettings
from kvasir_sim.trace import TraceRequest, at_rate

WINDOW_MS = 20_000
"""Attainment after a change of the fleet is taken over windows of this length."""

DIP_MAX = 0.03
"""A window has recovered when it attains this much less at most than the same window of a fleet
that always had so many workers: the trace's own bursts are no effect of the change."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure and its limit."""

    name: str
    measured: float
    low: float = float("-inf")
    high: float = float("inf")

    @property
    def is_met(self) -> bool:
        """Whether it is within its limits."""
        return self.low <= self.measured <= self.high


class Bench:
    """All bars on one trace."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace
        self._requests = load_trace(trace, max_input=20_480, count=4_000)

    def bars(self) -> Iterator[Bar]:
        """One after the other."""
        yield from self._attainment()
        yield from self._overload()
        yield from self._beside_dualmap()
        yield from self._scaling()
        yield from self._kv_nodes()
        yield self._speed()

    def _run(self, **fields: Any) -> SimResult:
        return simulate(self._settings(**fields), self._requests)

    def _settings(self, **fields: Any) -> SimSettings:
        return SimSettings(trace=self._trace, **fields)

    def _attainment(self) -> Iterator[Bar]:
        for replicas, low in ((1, 0.985), (4, 0.98), (16, 0.98)):
            result = self._run(rate=9, replicas=replicas)
            yield Bar(f"attainment at 9 req/s, {replicas} replicas", result.attainment, low)

    def _overload(self) -> Iterator[Bar]:
        for rate, low in ((12, 0.94), (14, 0.90)):
            for replicas in (1, 16):
                result = self._run(rate=rate, replicas=replicas)
                where = f"at {rate} req/s, {replicas} replicas"
                yield Bar(f"attainment {where}", result.attainment, low)
                yield Bar(f"longest wait in ms {where}", result.wait_max_ms, high=60_000)
                if rate == 14:
                    longest = result.attainment_longest_quarter
                    yield Bar(f"longest quarter {where}", longest, 0.60)

    def _beside_dualmap(self) -> Iterator[Bar]:
        for replicas, published in ((1, 0.94), (4, 0.86), (16, 0.82)):
            figure = self._run(policy="dualmap", rate=9, replicas=replicas).attainment
            name = f"dualmap at 9 req/s, {replicas} replicas"
            yield Bar(name, figure, published - 0.05, published + 0.05)
        for replicas in (1, 16):
            ours, theirs = (
                self._capacity_rps(policy, replicas) for policy in ("kvasir", "dualmap")
            )
            name = f"goodput at 90 % over dualmap's, {replicas} replicas"
            yield Bar(name, ours / theirs, 1.5)

    def _capacity_rps(self, policy: str, replicas: int) -> float:
        """The highest rate, in steps of 0.5, at which 90 % of the requests attain their SLO."""
        rate = 7.0
        while self._run(policy=policy, rate=rate, replicas=replicas).attainment >= 0.9:
            rate += 0.5
        return rate - 0.5

    def _scaling(self) -> Iterator[Bar]:
        changed = self._windows(changes=("200:-2", "380:+2"))
        for first, last, workers in ((10, 19, 6), (19, 28, 8)):
            always = self._windows(workers=workers)
            bad = [n for n in range(first, last) if changed[n] < always[n] - DIP_MAX]
            recovery_s = (bad[-1] + 1 - first) * WINDOW_MS / 1_000 if bad else 0.0
            yield Bar(f"seconds to recover, to {workers} workers", recovery_s, high=60)
        yield Bar("remapped, over the ideal share", _remapped(self._requests), high=1.3)

    def _windows(self, **fields: Any) -> list[float]:
        """Attainment of each window, by time of arrival, at 7 req/s."""
        engine = Engine(self._settings(rate=7, replicas=16, **fields), POLICIES["kvasir"])
        engine.run(self._requests, at_rate(self._requests, 7))
        count, attained = Counter[int](), Counter[int]()
        for job in (*engine.served, *engine.refused):
            window = int(job.arrival_ms / WINDOW_MS)
            count[window] += 1
            attained[window] += 0 < job.finished_ms <= job.deadline_ms
        return [attained[n] / count[n] for n in range(max(count) + 1)]

    def _kv_nodes(self) -> Iterator[Bar]:
        without, tier = (
            self._run(rate=12, replicas=16, kv_node_tokens=tokens) for tokens in (0, 20_000_000)
        )
        yield Bar("hit rate, with KV nodes over without", tier.hit_rate / without.hit_rate, 1.0)
        yield Bar(
            "goodput, with KV nodes over without", tier.goodput_rps / without.goodput_rps, 1.0
        )

    def _speed(self) -> Bar:
        started_s = time.process_time()
        count = 12_000
        requests = load_trace(self._trace, max_input=20_480, count=count)
        simulate(self._settings(rate=9, requests=count), requests)
        return Bar("CPU seconds for 12,000 requests", time.process_time() - started_s, high=10)


def _remapped(requests: Sequence[TraceRequest]) -> float:
    """Share of the requests' candidates that change when 2 of 8 workers leave, over a quarter."""
    names = [f"w{number}" for number in range(8)]
    before, after = RingPair.build(names), RingPair.build(names[:6])
    keys, num_moved = KeyTree(KeyLimits(start_blocks=2)), 0
    for index, request in enumerate(requests):
        keys.observe(request.names, num_workers=8, now_ms=index * 100)
        key = request.names[keys.depth(request.names) - 1]
        pairs = zip(before.candidates(key), after.candidates(key), strict=True)
        num_moved += sum(one != two for one, two in pairs)
    return num_moved / (2 * len(requests)) / 0.25


def main() -> None:
    """Runs all and shows them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bars = []
    for bar in Bench(args.trace).bars():
        limit = f">= {bar.low:g}" if bar.high == float("inf") else f"<= {bar.high:g}"
        verdict = "met" if bar.is_met else "MISSED"
        print(f"{bar.name:52}{bar.measured:10.4g}  {limit:12}{verdict}", flush=True)
        bars.append(bar)
    if args.json is not None:
        rows = {bar.name: {"measured": bar.measured, "is_met": bar.is_met} for bar in bars}
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    raise SystemExit(0 if all(bar.is_met for bar in bars) else 1)


if __name__ == "__main__":
    main()
