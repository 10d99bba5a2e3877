"""`kvasir up` with real processes: it serves, survives a death, and leaves nothing behind."""

import os
import random
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from fleet_process import FleetProcess, fleet_process, kvasir, wait_gone
from kvasir_cli.fleet.ports import free_ports
from kvasir_cli.models.making import make_model

WORDS = " ".join(["cab", "dab", "fab", "gab"] * 40)
STATUS_CALLS_MAX = 20
SMALL = ("--kv-cache-mb", "8", "--kv-node-mb", "8", "--threads", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model("tiny", folder)
    return folder


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runtime")


def free_port() -> int:
    return free_ports("127.0.0.1", 1, avoid=frozenset(), source=random.Random())[0]


@pytest.fixture(scope="module")
def fleet(model: Path, runtime: Path) -> Iterator[FleetProcess]:
    """Two prefill workers, one decode worker, one KV node, ready."""
    args = ("--model", str(model), "--prefill", "2", "--decode", "1", "--kv-nodes", "1", *SMALL)
    with fleet_process(runtime, free_port(), *args) as running:
        running.wait_line(r"^ready: http")
        yield running


@pytest.fixture
def small_fleet(model: Path, runtime: Path) -> Iterator[FleetProcess]:
    """One prefill worker and one decode worker, ready; the test ends it."""
    args = ("--model", str(model), "--kv-nodes", "0", *SMALL)
    with fleet_process(runtime, free_port(), *args) as running:
        running.wait_line(r"^ready: http")
        yield running


def test_one_line_per_part_as_it_becomes_ready(fleet: FleetProcess) -> None:
    ready = [line.split()[0] for line in fleet.lines if re.search(r" ready after \d", line)]
    assert sorted(ready) == ["decode-0", "kv-0", "prefill-0", "prefill-1", "router"]


def test_chat_is_answered_and_handed_off(fleet: FleetProcess) -> None:
    messages = [{"role": "user", "content": WORDS}]
    body = fleet.post(
        "/v1/chat/completions", model="tiny", messages=messages, max_tokens=5, ignore_eos=True
    )
    assert body["usage"]["completion_tokens"] == 5
    stats = body["kvasir"]
    assert stats["prefill_worker"].startswith("prefill-")
    assert stats["decode_worker"] == "decode-0"
    assert stats["kv_bytes_moved"] > 0
    decoder = next(part for part in fleet.state()["parts"] if part["name"] == "decode-0")
    with urlopen(f"http://127.0.0.1:{decoder['http_port']}/metrics", timeout=10) as answer:
        lines = [line for line in answer.read().decode().splitlines() if "handoff_bytes" in line]
    moved = [line for line in lines if 'transport="shm"' in line and not line.endswith(" 0.0")]
    assert moved, f"KV did not go through shared memory: {lines}"


def test_killed_prefill_worker_is_restarted_and_requests_go_on(fleet: FleetProcess) -> None:
    for name in ("prefill-0", "prefill-1"):
        old = fleet.part_pid(name)
        os.kill(old, signal.SIGKILL)
        text = f"{name} {WORDS}"
        body = fleet.post(
            "/v1/completions", model="tiny", prompt=text, max_tokens=3, ignore_eos=True
        )
        assert body["usage"]["completion_tokens"] == 3
        fleet.wait_line(rf"{name} .*was killed by SIGKILL; restart 1")
        fleet.wait_line(rf"{name} .*ready again")
        assert fleet.part_pid(name) != old
    body = fleet.post(
        "/v1/completions", model="tiny", prompt=f"after {WORDS}", max_tokens=3, ignore_eos=True
    )
    assert body["usage"]["completion_tokens"] == 3


def test_status_shows_every_part(fleet: FleetProcess) -> None:
    names = ("router", "prefill-0", "prefill-1", "decode-0", "kv-0")
    ready: list[str] = []
    for _ in range(STATUS_CALLS_MAX):  # the router finds restarted workers again in a moment
        result = kvasir(fleet.runtime, "status", "--port", str(fleet.port))
        assert result.returncode == 0, result.stderr
        ready = re.findall(r"^([\w-]+) +\w+ +ready", result.stdout, re.MULTILINE)
        if sorted(ready) == sorted(names):
            break
    assert sorted(ready) == sorted(names), result.stdout


def test_generate_and_chat_find_the_running_fleet(fleet: FleetProcess) -> None:
    url = f"http://127.0.0.1:{fleet.port}"
    args = ("--url", url, "--max-tokens", "4", "--temperature", "0")
    streamed = kvasir(fleet.runtime, "generate", "--prompt", " cab dab", *args)
    whole = kvasir(fleet.runtime, "generate", "--prompt", " cab dab", "--no-stream", *args)
    assert streamed.returncode == 0, streamed.stderr
    assert streamed.stdout == whole.stdout
    assert len(streamed.stdout.strip()) > 3
    chat = kvasir(fleet.runtime, "chat", *args, stdin="cab\n/reset\ndab\n/exit\nnot sent\n")
    assert chat.returncode == 0, chat.stderr
    assert len(chat.stdout.splitlines()) >= 2


def test_refused_request_shows_the_field(fleet: FleetProcess) -> None:
    url = f"http://127.0.0.1:{fleet.port}"
    args = ("--url", url, "--temperature", "-1")
    result = kvasir(fleet.runtime, "generate", "--prompt", "a", *args)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "temperature" in result.stderr


def test_second_fleet_on_the_port_is_refused(fleet: FleetProcess, model: Path) -> None:
    result = kvasir(fleet.runtime, "up", "--model", str(model), "--port", str(fleet.port))
    assert result.returncode == 2
    assert f"already running on port {fleet.port}" in result.stderr


def test_bench_serve_measures_it(fleet: FleetProcess, tmp_path: Path) -> None:
    args = ("--url", f"http://127.0.0.1:{fleet.port}", "--json", str(tmp_path / "r" / "b.json"))
    load = ("--requests", "4", "--concurrency", "2", "--input-tokens", "40", "--output-tokens", "3")
    result = kvasir(fleet.runtime, "bench", "serve", *args, *load)
    assert result.returncode == 0, result.stderr
    assert "4 of 4 requests" in result.stdout
    assert '"ttft_ms"' in (tmp_path / "r" / "b.json").read_text()


def test_ctrl_c_stops_all(small_fleet: FleetProcess) -> None:
    pids = small_fleet.pids()
    assert len(pids) == 4
    assert small_fleet.end(signal.SIGINT) == 0
    assert wait_gone(pids) == []
    assert small_fleet.lines[-1] == "stopped"


def test_parts_die_with_a_killed_supervisor(small_fleet: FleetProcess) -> None:
    pids = small_fleet.pids()
    assert small_fleet.end(signal.SIGKILL) == -signal.SIGKILL
    assert wait_gone(pids) == []


def test_detached_fleet_runs_on_until_it_is_stopped(model: Path, runtime: Path) -> None:
    port = str(free_port())
    up = kvasir(runtime, "up", "--detach", "--model", str(model), "--port", port, *SMALL)
    assert up.returncode == 0, up.stderr
    assert f"kvasir down --port {port}" in up.stdout
    down = kvasir(runtime, "down", "--port", port)
    assert down.returncode == 0, down.stderr
    again = kvasir(runtime, "down", "--port", port)
    assert again.returncode == 2
    assert "no fleet is running" in again.stderr


def test_taken_port_is_refused(model: Path, runtime: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        result = kvasir(runtime, "up", "--model", str(model), "--port", port)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: --port: port {port} is taken")


def test_missing_model_is_refused(runtime: Path, tmp_path: Path) -> None:
    result = kvasir(runtime, "up", "--model", str(tmp_path / "none"), "--port", str(free_port()))
    assert result.returncode == 2
    assert "no such folder" in result.stderr


def test_unsupported_architecture_is_refused(model: Path, runtime: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(model, folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"mamba"'))
    result = kvasir(runtime, "up", "--model", str(folder), "--port", str(free_port()))
    assert result.returncode != 0
    assert "mamba" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_too_little_memory_is_refused_with_what_is_needed(model: Path, runtime: Path) -> None:
    size = ("--kv-cache-mb", "900000")
    result = kvasir(runtime, "up", "--model", str(model), "--port", str(free_port()), *size)
    assert result.returncode == 2
    assert "not enough memory" in result.stderr
    assert "GB are needed" in result.stderr
