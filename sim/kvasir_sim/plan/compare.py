"""All rules on one day or several, and the best static split to measure them by.

A static split meets both objectives for a share of requests only if its prefill workers do so for
TTFT and its decode workers for TPOT; both shares grow with the workers. So the least of each is
found by bisection, and the splits above are tried by their sum: the first that attains the goal is
the cheapest of all.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import NamedTuple

from kvasir_sim.plan.day import make_day
from kvasir_sim.plan.replay import DayResult, Replay
from kvasir_sim.plan.rules import Dynamo, Kvasir, Rule, Static, hpa_for
from kvasir_sim.plan.settings import PlanSimSettings

SPLIT_MAX = 128  # workers of one role that a static split may have
HPA_FILLS = (0.5, 0.7, 0.9)  # shares of what the SLO allows that the HPA is tuned over
Progress = Callable[[str], None]


STATIC = "best static"
FIGURES = (
    "attainment",
    "ttft_attainment",
    "tpot_attainment",
    "worker_hours",
    "workers_max",
    "changes_per_hour",
    "flips_per_hour",
    "flips_per_hour_max",
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One day's figures by rule; the first is the planner's, the second the best static split."""

    results: tuple[DayResult, ...]
    num_requests: int
    seed: int

    @property
    def saving(self) -> float:
        """Share of the best static split's worker-hours that the planner does not need."""
        planner, static = self.results[:2]
        return 1 - planner.worker_hours / static.worker_hours

    def to_json(self) -> dict[str, object]:
        """Without the series that pictures are drawn from."""
        rules = {result.name: asdict(result) for result in self.results}
        for figures in rules.values():
            del figures["workers_by_minute"]
        return {
            "seed": self.seed,
            "requests": self.num_requests,
            "saving_against_best_static": self.saving,
            "rules": rules,
        }


class Spread(NamedTuple):
    """A figure over several days."""

    median: float
    least: float
    most: float


def spread_of(values: Iterable[float]) -> Spread:
    """Median and range."""
    known = list(values)
    return Spread(median(known), min(known), max(known))


def spreads(days: Sequence[Comparison]) -> dict[str, dict[str, Spread]]:
    """Every figure by rule; the best static splits of all days count as one rule."""
    found = {}
    for place, result in enumerate(days[0].results):
        own = [day.results[place] for day in days]
        name = STATIC if place == 1 else result.name
        found[name] = {f: spread_of(getattr(r, f) for r in own) for f in FIGURES}
    return found


def to_json(days: Sequence[Comparison]) -> dict[str, object]:
    """As `kvasir sim plan --json` writes it: each day, and every figure over all of them."""
    return {
        "saving_against_best_static": spread_of(day.saving for day in days)._asdict(),
        "rules": {
            name: {figure: spread._asdict() for figure, spread in figures.items()}
            for name, figures in spreads(days).items()
        },
        "days": [day.to_json() for day in days],
    }


def compare_days(
    settings: PlanSimSettings, *, num_seeds: int, progress: Progress = lambda _: None
) -> tuple[Comparison, ...]:
    """Days of `settings.seed` and the seeds after it.

    Raises:
        ValueError: see `compare`.
    """
    return tuple(
        compare(
            settings.model_copy(update={"seed": seed}),
            progress=lambda name, seed=seed: progress(f"seed {seed}, {name}"),  # type: ignore[misc]
        )
        for seed in range(settings.seed, settings.seed + num_seeds)
    )


def compare(settings: PlanSimSettings, *, progress: Progress = lambda _: None) -> Comparison:
    """Replays the day under every rule.

    Raises:
        ValueError: no static split of up to SPLIT_MAX workers a role attains what the planner does.
    """
    day = make_day(hours=settings.hours, rate_rps=settings.rate, seed=settings.seed)

    def run(name: str, rule: Rule) -> DayResult:
        progress(name)
        return Replay(day, settings, rule).run(name)

    planner = run("kvasir", Kvasir(settings))
    static = _best_static(run, goal=planner.attainment)
    context = float(day.prompts.mean() + day.outputs.mean())
    rules: list[tuple[str, Rule]] = [("dynamo", Dynamo(settings))]
    rules += [
        (f"hpa {fill:.0%}", hpa_for(settings, fill=fill, context_tokens=context))
        for fill in HPA_FILLS
    ]
    others = [run(name, rule) for name, rule in rules]
    return Comparison((planner, static, *others), len(day.arrivals_s), settings.seed)


def _best_static(run: Callable[[str, Rule], DayResult], *, goal: float) -> DayResult:
    """The fewest workers that attain the goal without ever changing."""
    prefill = _least(
        lambda n: run(f"static {n}:any", Static(n, 1)).ttft_attainment >= goal,
    )
    decode = _least(
        lambda n: run(f"static {2 * prefill}:{n}", Static(2 * prefill, n)).tpot_attainment >= goal,
    )
    for extra in range(SPLIT_MAX):
        for more in range(extra + 1):
            split = Static(prefill + more, decode + extra - more)
            found = run(f"static {split.prefill}:{split.decode}", split)
            if found.attainment >= goal:
                return found
    raise ValueError(f"no static split attains {goal:.1%}")


def _least(is_enough: Callable[[int], bool]) -> int:
    low, high = 0, 1
    while not is_enough(high):
        low, high = high, 2 * high
        if high > SPLIT_MAX:
            raise ValueError(f"{SPLIT_MAX} workers of a role are not enough for this day")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high
