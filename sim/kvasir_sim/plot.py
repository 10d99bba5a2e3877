"""Draws a sweep: attainment and TTFT over the request rate, a column for each replica count."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvasir_sim.sweep import ATTAINMENT_WANTED, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"kvasir": "#b3001b", "dualmap": "#1f5fa8"}
OTHER_COLOURS = (
    "#4d9221", "#8c6bb1", "#e08214", "#35978f", "#c51b7d",
    "#7f7f7f", "#bf812d", "#5e4fa2", "#66a61e", "#a6761d",
)  # fmt: skip
MARKERS = "osv^D<>ph*X"


def draw_sweep(points: Sequence[Point], *, title: str, slo_ms: int) -> "Figure":
    """The picture of a sweep. Needs matplotlib.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    columns = sorted({point.replicas for point in points})
    figure = Figure(figsize=(1.2 + 3.9 * len(columns), 7.2), layout="constrained")
    grid = figure.subplots(2, len(columns), squeeze=False, sharex=True, sharey="row")
    for column, replicas in enumerate(columns):
        shown = [point for point in points if point.replicas == replicas]
        plural = "" if replicas == 1 else "s"
        grid[0][column].set_title(f"{replicas} router replica{plural}", fontsize=10)
        _curves(grid[0][column], shown, "attainment")
        _curves(grid[1][column], shown, "ttft_p90_ms")
        grid[0][column].axhline(ATTAINMENT_WANTED, color="#999999", linewidth=0.8, linestyle=":")
        grid[1][column].axhline(slo_ms / 1_000, color="#999999", linewidth=0.8, linestyle=":")
        grid[1][column].set_yscale("log")
        grid[1][column].set_xlabel("requests per second")
    grid[0][0].set_ylabel(f"share with TTFT within {slo_ms / 1_000:g} s")
    grid[1][0].set_ylabel("TTFT of those served, 90th percentile, s")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def save_sweep(points: Sequence[Point], path: Path, *, title: str, slo_ms: int) -> None:
    """Draws a sweep into a PNG file."""
    draw_sweep(points, title=title, slo_ms=slo_ms).savefig(path, format="png", dpi=110)


def _curves(axes: "Axes", points: Sequence[Point], figure_of: str) -> None:
    scale = 1 / 1_000 if figure_of.endswith("_ms") else 1.0
    for place, policy in enumerate(dict.fromkeys(point.policy for point in points)):
        own = sorted((p for p in points if p.policy == policy), key=lambda point: point.rate)
        is_ours = policy in COLOURS
        axes.plot(
            [point.rate for point in own],
            [getattr(point.result, figure_of) * scale for point in own],
            label=policy,
            color=COLOURS.get(policy, OTHER_COLOURS[place % len(OTHER_COLOURS)]),
            marker=MARKERS[place % len(MARKERS)],
            markersize=5 if is_ours else 3.5,
            linewidth=2.4 if is_ours else 1.1,
            zorder=3 if is_ours else 2,
        )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
