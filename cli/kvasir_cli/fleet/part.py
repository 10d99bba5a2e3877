"""One supervised process: spawned, asked whether it is ready, restarted within limits, stopped."""

import asyncio
import os
import signal
import sys
import time
from collections import deque
from pathlib import Path

import aiohttp

from kvasir_cli.fleet.plan import PartPlan
from kvasir_cli.fleet.state import LOGS, PartState
from kvasir_cli.parent import PARENT_ENV

READY_POLL_S = 0.2
READY_TIMEOUT_S = 2.0
RESTARTS_MAX = 5
RESTART_WINDOW_S = 60.0
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.5, 8.0
LOG_TAIL_BYTES = 4096
LOG_BYTES_MAX = 64 << 20
"""A log that is longer when its part starts is started afresh."""


class Part:
    """A process of the fleet and what is known of it."""

    def __init__(self, plan: PartPlan, run_folder: Path) -> None:
        self.plan = plan
        self.log = run_folder / LOGS / f"{plan.name}.log"
        self.process: asyncio.subprocess.Process | None = None
        self.is_ready = False
        self.was_ready = False
        self.problem = ""
        self.num_restarts = 0
        self._restarts_s: deque[float] = deque(maxlen=RESTARTS_MAX)

    def state(self) -> PartState:
        """What the state file shows."""
        plan = self.plan
        running = self.process is not None and self.process.returncode is None
        return PartState(
            name=plan.name,
            role=plan.role,
            pid=self.process.pid if running and self.process else 0,
            host=plan.host,
            http_port=plan.http_port,
            grpc_port=plan.grpc_port,
            data_port=plan.data_port,
            num_restarts=self.num_restarts,
            is_ready=self.is_ready,
        )

    def what_is_missing(self) -> str:
        """Its name, and what it says it waits for."""
        return self.plan.name + (f" ({self.problem})" if self.problem else "")

    async def spawn(self) -> asyncio.subprocess.Process:
        """Start the process, in a session of its own: Ctrl-C reaches the supervisor alone."""
        too_long = self.log.exists() and self.log.stat().st_size > LOG_BYTES_MAX
        with self.log.open("wb" if too_long else "ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "kvasir_cli",
                *self.plan.arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, PARENT_ENV: str(os.getpid())},
            )
        self.is_ready = False
        self.problem = ""
        return self.process

    async def wait_ready(self, session: aiohttp.ClientSession) -> None:
        """Return when /readyz answers 200; `problem` says what is missing until then."""
        timeout = aiohttp.ClientTimeout(total=READY_TIMEOUT_S)
        while True:
            try:
                async with session.get(self.plan.ready_url, timeout=timeout) as response:
                    if response.status == 200:
                        break
                    answer = await response.json(content_type=None)
                    problems = answer.get("problems", []) if isinstance(answer, dict) else []
                    self.problem = "; ".join(map(str, problems)) or f"status {response.status}"
            except (aiohttp.ClientError, TimeoutError, ValueError):
                pass
            await asyncio.sleep(READY_POLL_S)
        self.is_ready = self.was_ready = True
        self.problem = ""

    def next_backoff_s(self) -> float | None:
        """How long to wait before the next restart; None: it has been restarted too often."""
        now_s = time.monotonic()
        recent = [at for at in self._restarts_s if now_s - at < RESTART_WINDOW_S]
        if len(recent) >= RESTARTS_MAX:
            return None
        self._restarts_s.append(now_s)
        self.num_restarts += 1
        return min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2.0 ** len(recent))

    def last_words(self) -> str:
        """The last line of its log."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, self.log.stat().st_size - LOG_TAIL_BYTES))
                lines = log.read().decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1].strip().removeprefix("error: ") if lines else ""

    async def stop(self, timeout_s: float) -> None:
        """SIGTERM, and after the timeout SIGKILL."""
        process = self.process
        if process is None or process.returncode is not None:
            return
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), timeout_s)
        except TimeoutError:
            self._signal(signal.SIGKILL)
            await process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.returncode is None:
            try:
                self.process.send_signal(number)
            except ProcessLookupError:
                return
