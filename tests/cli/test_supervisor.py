"""How the supervisor treats parts that do not start or do not stay."""

import asyncio
from pathlib import Path

import pytest
from kvasir_cli.errors import CommandError
from kvasir_cli.fleet.part import RESTARTS_MAX, Part
from kvasir_cli.fleet.plan import FleetOptions, PartPlan
from kvasir_cli.fleet.state import LOGS
from kvasir_cli.fleet.supervisor import Supervisor


class Lines:
    """A report that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def line(self, text: str) -> None:
        self.said.append(text)

    def waiting(self, text: str) -> None:
        pass


def make_plan(name: str, *arguments: str) -> PartPlan:
    return PartPlan(name, "prefill", "127.0.0.1", 9, 9, 9, arguments, stop_stage=0)


def make_supervisor(folder: Path, *plan: PartPlan) -> Supervisor:
    (folder / LOGS).mkdir()
    options = FleetOptions(folder, "m", 1, 1, 0, "127.0.0.1", 9, 0, None, 1, 1, 1)
    return Supervisor(options, plan, run_folder=folder, report=Lines())


def test_part_that_refuses_its_settings_ends_the_fleet_with_its_words(tmp_path: Path) -> None:
    plan = make_plan("prefill-0", "worker", "--model", "m", "--role", "king")
    with pytest.raises(CommandError, match=r"^prefill-0: .*'--role': 'king'"):
        asyncio.run(make_supervisor(tmp_path, plan).run())


async def test_part_that_keeps_dying_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvasir_cli.fleet.part.BACKOFF_MIN_S", 0.0)
    plan = make_plan("prefill-0", "generate", "--prompt", "a", "--url", "http://127.0.0.1:9")
    with pytest.raises(CommandError, match=r"died too often; its log is .*nothing answers"):
        await make_supervisor(tmp_path, plan).run()
    assert (tmp_path / LOGS / "prefill-0.log").read_text().count("error:") == RESTARTS_MAX + 1


def test_restarts_wait_longer_each_time_and_end(tmp_path: Path) -> None:
    part = Part(make_plan("a"), tmp_path)
    waits = [part.next_backoff_s() for _ in range(RESTARTS_MAX)]
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert part.next_backoff_s() is None
