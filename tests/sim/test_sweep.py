"""Sweeps: every combination once, tables and pictures that say what was measured."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from kvasir_cli.commands.sim import sim
from kvasir_sim.result import SimResult
from kvasir_sim.settings import SimSettings
from kvasir_sim.sweep import Axes, Point, capacity_rps, run_sweep, to_markdown


def a_point(policy: str, rate: float, attainment: float, replicas: int = 1) -> Point:
    figures = SimResult(attainment, 0.5, rate, 100.0, 900.0, 2_000.0, 0.3, 0.1, 50.0, 0, 9)
    return Point(policy, replicas, rate, figures)


def write_trace(path: Path) -> Path:
    rows = [
        {"timestamp": 250 * n, "input_length": 512, "output_length": 1, "hash_ids": [n % 7]}
        for n in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize(
    ("attainments", "expected"),
    [((1.0, 0.95, 0.85), 9.5), ((0.89, 1.0, 1.0), 0.0), ((1.0, 0.9, 0.9), 10.0), ((1.0,), 8.0)],
    ids=["between", "never", "always", "one"],
)
def test_capacity_is_where_attainment_falls_below_nine_tenths(attainments, expected) -> None:
    points = [a_point("kvasir", 8.0 + n, value) for n, value in enumerate(attainments)]
    assert capacity_rps(points[::-1]) == pytest.approx(expected)


def test_the_table_has_a_part_for_each_replica_count_and_marks_the_best() -> None:
    points = [a_point("kvasir", 9.0, 0.98), a_point("dualmap", 9.0, 0.94)]
    points += [a_point("kvasir", 9.0, 0.5, replicas=4)]
    text = to_markdown(points)
    assert "**1 router replica**" in text
    assert "**4 router replicas**" in text
    assert "| kvasir | **0.980** | >= 9.0 |" in text
    assert "| dualmap | 0.940 | >= 9.0 |" in text
    assert "| kvasir | **0.500** | < 9 |" in text


@pytest.mark.parametrize("num_processes", [1, 2])
def test_every_combination_runs_once_and_in_order(tmp_path: Path, num_processes: int) -> None:
    base = SimSettings(trace=write_trace(tmp_path / "t"), workers=2, warmup=0)
    axes = Axes(("dualmap", "round-robin"), (2.0, 4.0), (1, 2))
    advanced: list[int] = []
    points = run_sweep(axes.settings(base), num_processes=num_processes, advance=advanced.append)
    assert len(advanced) == 8
    assert [(p.policy, p.replicas, p.rate) for p in points[:5]] == [
        ("dualmap", 1, 2.0),
        ("dualmap", 1, 4.0),
        ("dualmap", 2, 2.0),
        ("dualmap", 2, 4.0),
        ("round-robin", 1, 2.0),
    ]
    assert all(point.result.served == 40 for point in points)


def test_a_run_that_fails_ends_the_sweep(tmp_path: Path) -> None:
    base = SimSettings(trace=tmp_path / "absent", warmup=0)
    runs = Axes(("dualmap",), (2.0, 3.0), (1,)).settings(base)
    with pytest.raises(FileNotFoundError):
        run_sweep(runs, num_processes=2, advance=lambda _: None)


def test_the_command_writes_picture_table_and_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = {kind: tmp_path / f"out.{kind}" for kind in ("png", "table", "json")}
    args = ["--trace", str(write_trace(tmp_path / "t")), "--warmup", "0", "--workers", "2"]
    args += ["--policy", "affinity", "--rate", "2", "--rate", "6", "--replicas", "1"]
    args += ["--processes", "1"]
    for kind, path in files.items():
        args += [f"--{kind}", str(path)]
    shown = CliRunner().invoke(sim, ["sweep", *args], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert files["table"].read_text() in shown.output
    figures = json.loads(files["json"].read_text())
    assert [(row["policy"], row["rate"], row["served"]) for row in figures] == [
        ("affinity", 2.0, 40),
        ("affinity", 6.0, 40),
    ]


def test_the_picture_has_a_curve_for_each_policy_and_a_column_for_each_count() -> None:
    pytest.importorskip("matplotlib")
    from kvasir_sim.plot import draw_sweep

    points = [
        a_point(policy, rate, 0.9, replicas)
        for policy in ("kvasir", "dualmap", "chwbl")
        for replicas in (1, 16)
        for rate in (8.0, 9.0)
    ]
    figure = draw_sweep(points, title="t", slo_ms=5_000)
    assert len(figure.axes) == 4
    assert all(len([c for c in axes.lines if len(c.get_xdata()) == 2]) >= 3 for axes in figure.axes)
    assert figure.axes[1].get_title() == "16 router replicas"


def test_a_trace_is_generated_and_replayed(tmp_path: Path) -> None:
    target = tmp_path / "rag.jsonl"
    args = ["generate", str(target), "--kind", "rag", "--requests", "60", "--documents", "9"]
    made = CliRunner().invoke(sim, args, catch_exceptions=False)
    assert "60 requests over" in made.output
    ran = CliRunner().invoke(
        sim, ["run", "--trace", str(target), "--warmup", "0"], catch_exceptions=False
    )
    assert ran.exit_code == 0
    wrong = CliRunner().invoke(sim, [*args, "--burst-factor", "0.5"])
    assert wrong.exit_code == 2
    assert "--burst-factor" in wrong.output
