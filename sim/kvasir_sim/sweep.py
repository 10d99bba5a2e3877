"""Many simulations over one trace: every policy at every rate with every number of replicas.

Each run is a process of its own, so that a sweep uses the machine's cores. The figures come back in
the order of policy, replicas and rate, whatever finished first.
"""

import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

from kvasir_sim.main import simulate
from kvasir_sim.readers import load_trace
from kvasir_sim.result import SimResult
from kvasir_sim.settings import PolicyName, SimSettings
from kvasir_sim.trace import TraceRequest

ATTAINMENT_WANTED = 0.9
"""Capacity is the highest rate at which this share of the requests meets its SLO."""


@dataclass(frozen=True, slots=True)
class Axes:
    """What is varied."""

    policies: tuple[PolicyName, ...]
    rates: tuple[float, ...]
    replicas: tuple[int, ...]

    def settings(self, base: SimSettings) -> list[SimSettings]:
        """One run for each combination."""
        return [
            base.model_copy(update={"policy": policy, "replicas": replicas, "rate": rate})
            for policy, replicas, rate in itertools.product(
                self.policies, self.replicas, self.rates
            )
        ]


@dataclass(frozen=True, slots=True)
class Point:
    """One run."""

    policy: str
    replicas: int
    rate: float
    result: SimResult

    def to_json(self) -> dict[str, object]:
        """Flat, for a file."""
        varied = {"policy": self.policy, "replicas": self.replicas, "rate": self.rate}
        return {**varied, **self.result.to_json()}


def run_sweep(
    runs: Sequence[SimSettings], *, num_processes: int, advance: Callable[[int], None]
) -> list[Point]:
    """The figures of runs over one trace; `advance(1)` is called as each ends.

    Raises:
        OSError: the trace cannot be read.
        ValueError: the trace is malformed, or nothing is left to count.
    """
    base = runs[0]
    requests = load_trace(base.trace, max_input=base.max_input, count=base.requests)
    results: dict[int, SimResult] = {}
    for index, result in _each(runs, requests, num_processes):
        results[index] = result
        advance(1)
    return [
        Point(run.policy, run.replicas, run.rate, results[index]) for index, run in enumerate(runs)
    ]


def _each(
    runs: Sequence[SimSettings], requests: Sequence[TraceRequest], num_processes: int
) -> Iterator[tuple[int, SimResult]]:
    if num_processes == 1:
        for index, run in enumerate(runs):
            yield index, simulate(run, requests)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        pending = {pool.submit(simulate, run, requests): index for index, run in enumerate(runs)}
        try:
            for done in as_completed(pending):
                yield pending[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def capacity_rps(points: Sequence[Point]) -> float:
    """The rate up to which attainment stays at 90 %, between two rates by a straight line.

    `points` are those of one policy and one number of replicas. 0: not even at the lowest rate.
    """
    ordered = sorted(points, key=lambda point: point.rate)
    reached = 0.0
    for before, point in zip([None, *ordered], ordered, strict=False):
        attainment = point.result.attainment
        if attainment < ATTAINMENT_WANTED:
            if before is not None:
                fall = before.result.attainment - attainment
                share = (before.result.attainment - ATTAINMENT_WANTED) / fall
                reached = before.rate + share * (point.rate - before.rate)
            return reached
        reached = point.rate
    return reached


def to_markdown(points: Sequence[Point]) -> str:
    """Attainment by policy and rate, one table for each number of replicas; the best in bold."""
    rates = sorted({point.rate for point in points})
    parts = []
    for replicas in sorted({point.replicas for point in points}):
        shown = [point for point in points if point.replicas == replicas]
        best = {r: max(p.result.attainment for p in shown if p.rate == r) for r in rates}
        head = ["policy", *(f"{rate:g}" for rate in rates), "req/s at 90 %"]
        lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
        for policy in dict.fromkeys(point.policy for point in shown):
            own = {point.rate: point for point in shown if point.policy == policy}
            cells = [_cell(own[rate].result.attainment, best[rate]) for rate in rates]
            lines.append(_line([policy, *cells, _capacity_text(list(own.values()))]))
        title = "1 router replica" if replicas == 1 else f"{replicas} router replicas"
        parts.append(f"**{title}**\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(attainment: float, best: float) -> str:
    text = f"{attainment:.3f}"
    return f"**{text}**" if attainment == best and attainment > 0 else text


def _capacity_text(points: Sequence[Point]) -> str:
    capacity = capacity_rps(points)
    lowest, highest = min(p.rate for p in points), max(p.rate for p in points)
    if capacity == 0:
        return f"< {lowest:g}"
    return f">= {capacity:.1f}" if capacity == highest else f"{capacity:.1f}"
