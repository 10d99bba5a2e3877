"""What a running fleet writes down, so that other commands find it without being told.

Each fleet has a run folder with state.json, a lock that its supervisor holds for as long as it
lives, and the logs of its parts. A state file whose lock is free belongs to a fleet that is gone.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from kvasir_cli.errors import RefusedError

STATE, LOCK, LOGS, TLS = "state.json", "lock", "logs", "tls"


@dataclass(frozen=True, slots=True)
class PartState:
    """One part as its supervisor sees it."""

    name: str
    role: str
    pid: int  # 0: it is not running at the moment
    host: str
    http_port: int
    grpc_port: int
    data_port: int
    num_restarts: int
    is_ready: bool


@dataclass(frozen=True, slots=True)
class FleetState:
    """One fleet as its supervisor sees it."""

    pid: int  # of the supervisor
    phase: str  # starting, ready, stopping or failed
    url: str
    model: str
    model_name: str
    run_folder: str
    problem: str
    parts: tuple[PartState, ...]
    tls_dir: str | None = None  # the certificate of its parts, where links are secure

    def part(self, role: str) -> list[PartState]:
        """The parts of one role."""
        return [part for part in self.parts if part.role == role]


def runs_folder() -> Path:
    """Where run folders lie: XDG_RUNTIME_DIR if there is one, else ~/.cache/kvasir/run."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and os.access(runtime, os.W_OK):
        return Path(runtime) / "kvasir"
    return Path.home() / ".cache" / "kvasir" / "run"


def run_folder_for(port: int) -> Path:
    """The run folder of the fleet on that port."""
    return runs_folder() / f"fleet-{port}"


@contextmanager
def held_run_folder(port: int) -> Iterator[Path]:
    """The run folder of a fleet on `port`, locked; its state is removed at the end.

    Raises:
        RefusedError: another fleet holds it.
    """
    folder = run_folder_for(port)
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            refuse_running(folder, port)
            raise
        try:
            yield folder
        finally:
            (folder / STATE).unlink(missing_ok=True)


def refuse_running(folder: Path, port: int) -> None:
    """Raises RefusedError if a fleet holds that run folder."""
    if _is_locked(folder / LOCK):
        raise RefusedError(
            f"a fleet is already running on port {port}: see kvasir status, stop it with "
            f"kvasir down --port {port}"
        )


def write_state(state: FleetState) -> None:
    """Replace the fleet's state file in one step."""
    target = Path(state.run_folder) / STATE
    partial = target.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(state), indent=2) + "\n")
    partial.rename(target)


def read_state(folder: Path) -> FleetState | None:
    """The state of the fleet in that run folder; None: none runs there."""
    if not _is_locked(folder / LOCK):
        return None
    try:
        values = json.loads((folder / STATE).read_text())
        parts = tuple(PartState(**part) for part in values.pop("parts"))
        return FleetState(**values, parts=parts)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def running_fleets() -> list[FleetState]:
    """All fleets of this user that run on this machine."""
    folders = sorted(runs_folder().glob("fleet-*"))
    return [state for folder in folders if (state := read_state(folder))]


def _is_locked(path: Path) -> bool:
    try:
        with path.open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
