"""Runs a planned fleet: starts every part, says when each is ready, restarts what dies, stops all.

Invariant: when `run` returns, no process of the fleet is left. Which parts there are was decided
by plan.py, whether they can work by checks.py.
"""

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp

from kvasir_cli.errors import CommandError
from kvasir_cli.fleet.part import Part
from kvasir_cli.fleet.plan import FleetOptions, PartPlan
from kvasir_cli.fleet.report import Report
from kvasir_cli.fleet.state import FleetState, write_state

STOP_TIMEOUT_S = 8.0
REFUSED_STATUS = 2
"""A part that ends with it before it was ever ready refused its settings: no restart can help."""
REPORT_INTERVAL_S = 0.25


class Supervisor:
    """One fleet, from its start to its end."""

    def __init__(
        self,
        options: FleetOptions,
        plan: Sequence[PartPlan],
        *,
        run_folder: Path,
        report: Report,
        tls_dir: Path | None = None,
    ) -> None:
        self._options = options
        self._run_folder = run_folder
        self._tls_dir = tls_dir
        self._report = report
        self._parts = [Part(part, run_folder) for part in plan]
        self._stop = asyncio.Event()
        self._phase = "starting"
        self._problem = ""
        self._started_s = time.monotonic()

    async def run(self) -> None:
        """Run until SIGINT or SIGTERM.

        Raises:
            CommandError: a part could not be started or died too often.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop.set)
        self._save()
        try:
            # 1. Start all; each task starts its part again when it dies.
            async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
                watchers = [group.create_task(self._watch(part, session)) for part in self._parts]
                watchers.append(group.create_task(self._say_progress()))
                # 2. Wait for a signal, then leave restarting and go on to stopping.
                await self._stop.wait()
                for watcher in watchers:
                    watcher.cancel()
        except ExceptionGroup as group_error:
            # 3. A part that cannot run ends the fleet.
            self._phase, self._problem = "failed", str(group_error.exceptions[0])
            raise group_error.exceptions[0] from None
        finally:
            await self._stop_all()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    async def _watch(self, part: Part, session: aiohttp.ClientSession) -> None:
        while True:
            process = await part.spawn()
            self._save()
            async with asyncio.TaskGroup() as group:
                ready = group.create_task(self._announce(part, session))
                status = await process.wait()
                ready.cancel()
            part.is_ready = False
            await self._hold_back(part, status)

    async def _hold_back(self, part: Part, status: int) -> None:
        """Say that a part ended and wait before its restart, or give up."""
        said = part.last_words()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended ({status})"
        why = f": {said}" if said and status >= 0 else ""
        if status == REFUSED_STATUS and not part.was_ready:
            raise CommandError(f"{part.plan.name}{why or ' refused to start'}")
        backoff_s = part.next_backoff_s()
        if backoff_s is None:
            raise CommandError(f"{part.plan.name} died too often; its log is {part.log}{why}")
        self._report.line(
            f"  {part.plan.name:<10} {how}{why}; restart {part.num_restarts} in {backoff_s:g} s"
        )
        part.problem = "restarting"
        self._save()
        await asyncio.sleep(backoff_s)

    async def _announce(self, part: Part, session: aiohttp.ClientSession) -> None:
        await part.wait_ready(session)
        seconds = time.monotonic() - self._started_s
        where = f"http :{part.plan.http_port}  grpc :{part.plan.grpc_port}"
        again = " again" if part.num_restarts else f" after {seconds:.1f} s"
        self._report.line(f"  {part.plan.name:<10} ready{again:<14} {where}")
        if self._phase == "starting" and all(other.is_ready for other in self._parts):
            self._phase = "ready"
            self._report.waiting("")
            self._report.line(self._how_to_use())
        self._save()

    async def _say_progress(self) -> None:
        while True:
            missing = [part for part in self._parts if not part.is_ready]
            others = [part for part in missing if part.plan.role != "router"]
            self._report.waiting(", ".join(part.what_is_missing() for part in others or missing))
            await asyncio.sleep(REPORT_INTERVAL_S)

    async def _stop_all(self) -> None:
        self._phase = "stopping" if self._phase != "failed" else self._phase
        self._report.waiting("")
        self._report.line("stopping")
        self._save()
        for stage in sorted({part.plan.stop_stage for part in self._parts}):
            parts = [part for part in self._parts if part.plan.stop_stage == stage]
            await asyncio.gather(*(part.stop(STOP_TIMEOUT_S) for part in parts))
        self._report.line("stopped")

    def _how_to_use(self) -> str:
        url, port = self._options.url, self._options.port
        flag = "" if port == 8080 else f" --url {url}"
        return (
            f"ready: {url}/v1  model {self._options.model_name}\n"
            f"  kvasir chat{flag}\n"
            f"  kvasir status{flag and f' --port {port}'}\n"
            f"  curl {url}/v1/chat/completions -H 'content-type: application/json' -d "
            f'\'{{"model": "{self._options.model_name}", "messages": '
            '[{"role": "user", "content": "Hello"}]}\'\n'
            f"  logs: {self._run_folder / 'logs'}"
        )

    def _save(self) -> None:
        write_state(
            FleetState(
                pid=os.getpid(),
                phase=self._phase,
                url=self._options.url,
                model=str(self._options.model),
                model_name=self._options.model_name,
                run_folder=str(self._run_folder),
                problem=self._problem,
                parts=tuple(part.state() for part in self._parts),
                tls_dir=str(self._tls_dir) if self._tls_dir else None,
            )
        )
