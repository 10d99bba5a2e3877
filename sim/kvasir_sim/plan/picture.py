"""Draws a day: the load, and the workers that each rule paid for."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvasir_sim.plan.compare import Comparison
from kvasir_sim.plan.day import Day

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BIN_S = 300
COLOURS = ("#b3001b", "#1f5fa8", "#7f7f7f", "#a6cee3", "#4d9221", "#e08214")


def draw_day(day: Day, found: Comparison) -> "Figure":
    """The picture of one day. Needs matplotlib.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 6.5), layout="constrained")
    load, workers = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    edges = np.arange(0, day.duration_s + BIN_S, BIN_S)
    counts, _ = np.histogram(day.arrivals_s, bins=edges)
    load.fill_between(edges[:-1] / 3600, counts / BIN_S, step="post", color="#bbbbbb")
    load.set_ylabel("requests per second")
    for place, result in enumerate(found.results):
        hours = np.arange(len(result.workers_by_minute)) / 60
        workers.step(
            hours,
            result.workers_by_minute,
            where="post",
            label=f"{result.name}: {result.attainment:.1%}, {result.worker_hours:.0f} h",
            color=COLOURS[place % len(COLOURS)],
            linewidth=2.2 if place == 0 else 1.0,
            zorder=3 if place == 0 else 2,
        )
    workers.set_ylabel("workers")
    workers.set_xlabel("hour of the day")
    for axes in (load, workers):
        axes.grid(alpha=0.25)
        axes.set_xlim(0, day.duration_s / 3600)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    title = "rule: share of requests within both objectives, worker-hours"
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9, title=title)
    return figure


def save_day(day: Day, found: Comparison, path: Path) -> None:
    """Draws a day into a PNG file."""
    draw_day(day, found).savefig(path, format="png", dpi=110)
