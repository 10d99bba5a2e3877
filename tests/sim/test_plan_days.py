"""Several days of the planner's simulation: spreads, the file, the picture."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from kvasir_cli.commands.sim_plan import plan
from kvasir_sim.plan import compare
from kvasir_sim.plan.compare import STATIC, Comparison, spread_of, spreads
from kvasir_sim.plan.replay import DayResult
from kvasir_sim.plan.settings import PlanSimSettings


def make_result(name: str, *, hours: float, attainment: float = 0.98) -> DayResult:
    return DayResult(
        name=name,
        attainment=attainment,
        ttft_attainment=0.99,
        tpot_attainment=0.99,
        worker_hours=hours,
        workers_mean=hours / 24,
        workers_max=9,
        flips_per_hour=0.5,
        flips_per_hour_max=3,
        changes_per_hour=2.0,
        workers_by_minute=(4, 5, 6),
    )


def make_comparison(seed: int) -> Comparison:
    """A day on which the planner needs 200 hours, ten more with every seed."""
    planner = make_result("kvasir", hours=190.0 + 10 * seed)
    static = make_result(f"static {8 + seed}:5", hours=400.0)
    return Comparison((planner, static, make_result("dynamo", hours=100.0)), 1_000, seed)


def test_spreads_are_medians_and_ranges_by_rule() -> None:
    assert spread_of([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    found = spreads([make_comparison(seed) for seed in (1, 2, 3)])
    assert list(found) == ["kvasir", STATIC, "dynamo"]
    assert found["kvasir"]["worker_hours"] == (210.0, 200.0, 220.0)
    assert found[STATIC]["worker_hours"] == (400.0, 400.0, 400.0)


def test_the_command_writes_days_and_draws_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")

    def compared(settings: PlanSimSettings, **_: object) -> Comparison:
        return make_comparison(settings.seed)

    monkeypatch.setattr(compare, "compare", compared)
    file, png = tmp_path / "days.json", tmp_path / "day.png"
    arguments = ["--seeds", "3", "--hours", "0.5", "--json", str(file), "--png", str(png)]
    result = CliRunner().invoke(plan, arguments, catch_exceptions=False, terminal_width=200)
    assert result.exit_code == 0, result.output
    assert "47.5% (45.0% to 50.0%) fewer worker-hours" in " ".join(result.output.split())
    written = json.loads(file.read_text())
    assert [day["seed"] for day in written["days"]] == [1, 2, 3]
    assert written["saving_against_best_static"]["median"] == pytest.approx(0.475)
    assert "workers_by_minute" not in written["days"][0]["rules"]["kvasir"]
    assert png.read_bytes().startswith(b"\x89PNG")
