"""Starts and stops a fleet from another process: `kvasir up --detach`, `down`, the demo.

The fleet is always run by `kvasir up` in a process of its own; this module starts that process,
shows what it says until it serves, and ends it.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from kvasir_cli.errors import CommandError, RefusedError
from kvasir_cli.fleet.plan import FleetOptions
from kvasir_cli.fleet.state import (
    FleetState,
    read_state,
    refuse_running,
    run_folder_for,
    running_fleets,
)
from kvasir_cli.parent import PARENT_ENV

POLL_S = 0.1
START_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 40.0
UP_LOG = "up.log"


def up_arguments(options: FleetOptions) -> list[str]:
    """The command line of `kvasir up` for these options."""
    arguments = ["up", "--model", str(options.model), "--model-name", options.model_name]
    for flag, value in (
        ("--prefill", options.num_prefill),
        ("--decode", options.num_decode),
        ("--kv-nodes", options.num_kv_nodes),
        ("--host", options.host),
        ("--port", options.port),
        ("--grpc-port", options.grpc_port),
        ("--threads", options.num_threads),
        ("--kv-cache-mb", options.kv_cache_mb),
        ("--weights", options.weights),
        ("--kv", options.kv),
        ("--kv-codec", options.kv_codec),
        ("--kv-node-mb", options.kv_node_mb),
        ("--ttft-slo-ms", options.ttft_slo_ms),
    ):
        arguments += [flag, str(value)]
    arguments += ["--redis", options.redis] if options.redis else []
    return arguments + (["--tls"] if options.tls else [])


def start_detached(
    options: FleetOptions, *, echo: Callable[[str], None], dies_with_us: bool
) -> FleetState:
    """Start a fleet in the background and return when it serves.

    Args:
        echo: takes each line that the fleet says while it starts.
        dies_with_us: kill the fleet if this process ends before it stops it.

    Raises:
        CommandError: it did not start.
    """
    folder = run_folder_for(options.port)
    refuse_running(folder, options.port)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / UP_LOG
    env = dict(os.environ)
    if dies_with_us:
        env[PARENT_ENV] = str(os.getpid())
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvasir_cli", *up_arguments(options)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=env,
        )
    try:
        return _wait_ready(process, folder, log, echo)
    except BaseException:
        _end(process.pid, lambda: process.poll() is not None)
        raise


@contextmanager
def temporary_fleet(options: FleetOptions) -> Iterator[FleetState]:
    """A fleet for the length of a block."""
    state = start_detached(options, echo=echo_parts, dies_with_us=True)
    try:
        yield state
    finally:
        stop_fleet(state)


def echo_parts(line: str) -> None:
    """Print what a starting fleet says of its parts, and leave out how to use it."""
    if " ready " in line or line.startswith("  waiting"):
        click.echo(line)


def stop_fleet(state: FleetState) -> None:
    """Stop a running fleet and return when it is gone."""
    folder = Path(state.run_folder)
    _end(state.pid, lambda: read_state(folder) is None)


def find_fleet(port: int | None) -> FleetState:
    """The running fleet on that port, or the only one.

    Raises:
        RefusedError: none runs, or several and no port was given.
    """
    fleets = [f for f in running_fleets() if port is None or f.url.endswith(f":{port}")]
    if not fleets:
        where = f" on port {port}" if port else ""
        raise RefusedError(f"no fleet is running{where}: start one with kvasir up")
    if len(fleets) > 1:
        urls = ", ".join(fleet.url for fleet in fleets)
        raise RefusedError(f"several fleets are running ({urls}): choose one with --port")
    return fleets[0]


def _wait_ready(
    process: "subprocess.Popen[bytes]", folder: Path, log: Path, echo: Callable[[str], None]
) -> FleetState:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    said = 0
    while time.monotonic() < deadline_s:
        status = process.poll()
        lines = _whole_lines(log)
        state = read_state(folder)
        is_ready = state is not None and state.phase == "ready" and state.pid == process.pid
        for line in lines[said:]:
            if status is None or not line.startswith("error: "):
                echo(line)
        said = len(lines)
        if state is not None and is_ready:
            return state
        if status is not None:
            raise CommandError(_why(lines) or f"the fleet did not start; its log is {log}")
        time.sleep(POLL_S)
    raise CommandError(f"the fleet did not start in {START_TIMEOUT_S:.0f} s; its log is {log}")


def _whole_lines(log: Path) -> list[str]:
    text = log.read_text(errors="replace")
    return text[: text.rfind("\n") + 1].splitlines()


def _why(lines: Sequence[str]) -> str:
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else ""


def _end(pid: int, is_gone: Callable[[], bool]) -> None:
    """Ask the supervisor to stop and wait; kill it, and with it its parts, if it does not."""
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    try:
        os.kill(pid, signal.SIGTERM)
        while not is_gone():
            if time.monotonic() > deadline_s:
                os.kill(pid, signal.SIGKILL)
                return
            time.sleep(POLL_S)
    except ProcessLookupError:
        return
