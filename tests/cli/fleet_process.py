"""A `kvasir up` of real processes, for tests."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GONE_TIMEOUT_S = 20


def environment(runtime: Path) -> dict[str, str]:
    """One in which no other fleet of this machine is seen, and a proxy that leads nowhere is."""
    proxy = dict.fromkeys(("http_proxy", "grpc_proxy"), "http://127.0.0.1:9")
    return {**os.environ, **proxy, "no_proxy": "", "XDG_RUNTIME_DIR": str(runtime)}


def kvasir(runtime: Path, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvasir_cli", *args],
        capture_output=True,
        text=True,
        input=stdin,
        timeout=90,
        check=False,
        env=environment(runtime),
    )


class FleetProcess:
    """A supervisor and what it printed."""

    def __init__(self, runtime: Path, port: int, *args: str) -> None:
        self.port = port
        self.runtime = runtime
        self.lines: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvasir_cli", "up", "--port", str(port), *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(runtime),
        )

    def wait_line(self, pattern: str) -> str:
        """The next printed line that matches; fails with all lines if the output ends first."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip())
            if re.search(pattern, line):
                return line
        raise AssertionError(f"no line {pattern!r} in:\n" + "\n".join(self.lines) + self.logs())

    def logs(self) -> str:
        """The ends of the parts' logs, for a failure's message."""
        files = sorted(self.folder.glob("logs/*.log"))
        return "".join(f"\n--- {file.name}\n{file.read_text()[-1500:]}" for file in files)

    @property
    def folder(self) -> Path:
        return self.runtime / "kvasir" / f"fleet-{self.port}"

    def state(self) -> dict[str, Any]:
        return json.loads((self.folder / "state.json").read_text())

    def part_pid(self, name: str) -> int:
        return next(part["pid"] for part in self.state()["parts"] if part["name"] == name)

    def pids(self) -> list[int]:
        """The supervisor and every part."""
        state = self.state()
        return [state["pid"], *(part["pid"] for part in state["parts"])]

    def end(self, number: signal.Signals) -> int:
        """Send a signal to the supervisor alone and wait for its exit status."""
        self._process.send_signal(number)
        rest, _ = self._process.communicate(timeout=60)
        self.lines += (rest or "").splitlines()
        return self._process.returncode

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """A request to the router; the answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=60) as response:
            return json.load(response)

    def close(self) -> None:
        if self._process.poll() is None:
            self.end(signal.SIGTERM)
        if self._process.stdout is not None:
            self._process.stdout.close()


@contextmanager
def fleet_process(runtime: Path, port: int, *args: str) -> Iterator[FleetProcess]:
    fleet = FleetProcess(runtime, port, *args)
    try:
        yield fleet
    finally:
        fleet.close()


def wait_gone(pids: list[int]) -> list[int]:
    """The processes that are still there after GONE_TIMEOUT_S."""
    left = []
    for pid in pids:
        try:
            watched = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        with os.fdopen(watched):
            if not select.select([watched], [], [], GONE_TIMEOUT_S)[0]:
                left.append(pid)
    return left
