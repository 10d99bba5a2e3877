"""What `kvasir up` starts, refuses and writes down."""

import itertools
import random
import socket
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from kvasir_cli.commands.fleet import up
from kvasir_cli.errors import RefusedError
from kvasir_cli.fleet.checks import check_memory, check_model, check_redis
from kvasir_cli.fleet.plan import FleetOptions, plan_fleet
from kvasir_cli.fleet.ports import free_ports, refuse_taken
from kvasir_cli.fleet.state import (
    FleetState,
    PartState,
    held_run_folder,
    read_state,
    running_fleets,
    write_state,
)
from kvasir_cli.models.making import make_model


def make_options(**changes: object) -> FleetOptions:
    values: dict = {
        "model": Path("m"),
        "model_name": "m",
        "num_prefill": 2,
        "num_decode": 1,
        "num_kv_nodes": 1,
        "host": "127.0.0.1",
        "port": 8080,
        "grpc_port": 0,
        "redis": None,
        "num_threads": 1,
        "kv_cache_mb": 100,
        "kv_node_mb": 50,
    }
    return FleetOptions(**(values | changes))


def test_kv_that_is_to_be_encoded_does_not_go_through_shared_memory() -> None:
    for codec, has_sockets in (("raw", True), ("auto", False)):
        options = make_options(kv_codec=codec)
        plan = plan_fleet(options, range(1, 1 + options.num_ports))
        for part in plan:
            if part.role != "router":
                assert bool(flag_values(part.arguments, "--kv-socket-dir")) is has_sockets
            if part.role in ("prefill", "decode"):
                assert flag_values(part.arguments, "--kv-codec") == [codec]


def flag_values(arguments: tuple[str, ...], flag: str) -> list[str]:
    return [value for name, value in itertools.pairwise(arguments) if name == flag]


def test_router_knows_every_worker_and_workers_know_every_kv_node() -> None:
    options = make_options(num_kv_nodes=2, redis="redis://r")
    plan = plan_fleet(options, range(1, 1 + options.num_ports))
    by_role = {role: [p for p in plan if p.role == role] for role in ("kvnode", "prefill")}
    workers = [part for part in plan if part.role in ("prefill", "decode")]
    assert [part.name for part in workers] == ["prefill-0", "prefill-1", "decode-0"]
    kv_addresses = [part.grpc_address for part in by_role["kvnode"]]
    for part in workers:
        assert flag_values(part.arguments, "--kv-node") == kv_addresses
        assert flag_values(part.arguments, "--role") == [part.role]
        assert flag_values(part.arguments, "--redis") == ["redis://r"]
    for part in [*workers, *by_role["kvnode"]]:
        assert len(flag_values(part.arguments, "--kv-socket-dir")) == 1
    router = plan[-1]
    assert flag_values(router.arguments, "--ttft-slo-ms") == ["30000"]
    for flag in ("--weights", "--kv"):
        assert all(flag_values(worker.arguments, flag) == ["bf16"] for worker in workers)
    assert router.role == "router"
    assert flag_values(router.arguments, "--kv-node") == kv_addresses
    assert flag_values(router.arguments, "--worker") == [part.grpc_address for part in workers]


def test_no_two_parts_share_a_port_and_the_router_stops_first() -> None:
    options = make_options()
    plan = plan_fleet(options, range(1, 1 + options.num_ports))
    ports = [port for part in plan for port in (part.http_port, part.grpc_port, part.data_port)]
    used = [port for port in ports if port]
    assert len(set(used)) == len(used) == options.num_ports + 1
    stages = {part.role: part.stop_stage for part in plan}
    assert stages["router"] < stages["prefill"] == stages["decode"] < stages["kvnode"]


def test_memory_that_is_not_there_is_named(tmp_path: Path) -> None:
    make_model("tiny", tmp_path / "m")
    options = make_options(model=tmp_path / "m")
    check_memory(options, 4_000_000_000)
    with pytest.raises(RefusedError, match=r"not enough memory: .*500.0 MB are avail"):
        check_memory(options, 500_000_000)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_folder_that_is_no_model_is_refused(missing: str, tmp_path: Path) -> None:
    make_model("tiny", tmp_path / "m")
    check_model(tmp_path / "m")
    (tmp_path / "m" / missing).unlink()
    with pytest.raises(RefusedError, match="not a Hugging Face folder"):
        check_model(tmp_path / "m")


def test_model_whose_weights_do_not_fit_its_config_is_refused(tmp_path: Path) -> None:
    make_model("tiny", tmp_path / "m")
    config = (tmp_path / "m" / "config.json").read_text()
    (tmp_path / "m" / "config.json").write_text(
        config.replace('"vocab_size": 512', '"vocab_size": 500')
    )
    with pytest.raises(RefusedError, match=r"model\.embed_tokens\.weight has shape \[512, 64\]"):
        check_model(tmp_path / "m")


def test_missing_folder_and_gguf_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no such folder"):
        check_model(tmp_path / "none")
    (tmp_path / "m.gguf").touch()
    with pytest.raises(RefusedError, match="kvasir model import"):
        check_model(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("url", "message"),
    [("redis://127.0.0.1:1", "does not answer"), ("nonsense", "is not a URL of Redis")],
)
def test_redis_that_cannot_be_used_is_refused(url: str, message: str) -> None:
    with pytest.raises(RefusedError, match=f"--redis: .*{message}"):
        check_redis(url)


def test_taken_port_is_refused_with_its_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(RefusedError, match=f"--port: port {port} is taken on 127.0.0.1"):
            refuse_taken("127.0.0.1", port, flag="--port")


def test_address_of_another_machine_is_refused() -> None:
    with pytest.raises(RefusedError, match="no address of this machine"):
        refuse_taken("192.0.2.1", 8080, flag="--port")


def test_free_ports_differ_and_avoid() -> None:
    source = random.Random(1)
    first = free_ports("127.0.0.1", 5, avoid=frozenset(), source=random.Random(1))
    second = free_ports("127.0.0.1", 5, avoid=frozenset(first[:2]), source=source)
    assert len(set(first)) == 5
    assert not set(first[:2]) & set(second)


@pytest.mark.parametrize("flag", ["--prefill", "--decode", "--port", "--kv-cache-mb"])
def test_count_below_one_is_refused_with_its_flag(flag: str) -> None:
    result = CliRunner().invoke(up, ["--model", "m", flag, "0"])
    assert result.exit_code == 2
    assert f"Invalid value for '{flag}': 0 is not in the range" in result.output


def make_state(folder: Path) -> FleetState:
    part = PartState("router", "router", 7, "127.0.0.1", 8080, 1, 0, 0, is_ready=True)
    return FleetState(7, "ready", "http://127.0.0.1:8080", "m", "m", str(folder), "", (part,))


@pytest.fixture
def _own_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.mark.usefixtures("_own_runs_folder")
def test_running_fleet_is_found_and_a_dead_one_is_not() -> None:
    assert running_fleets() == []
    with held_run_folder(8080) as folder:
        state = make_state(folder)
        write_state(state)
        assert running_fleets() == [state]
    write_state(state)  # as left behind by a supervisor that was killed
    assert read_state(folder) is None
    assert running_fleets() == []


@pytest.mark.usefixtures("_own_runs_folder")
def test_second_fleet_on_a_port_is_refused() -> None:
    with (
        held_run_folder(8080),
        pytest.raises(RefusedError, match="already running on port 8080"),
        held_run_folder(8080),
    ):
        pass


def test_up_fills_in_the_name_and_the_threads() -> None:
    from kvasir_cli.commands.fleet import fleet_options

    shape = {"num_prefill": 100, "num_decode": 100, "num_kv_nodes": 0, "num_threads": 0}
    addresses = {"host": "::", "port": 1, "grpc_port": 0, "redis": None}
    sizes = {"kv_cache_mb": 1, "kv_node_mb": 1}
    options = fleet_options(model=Path("a/b"), model_name=None, **shape, **addresses, **sizes)
    assert (options.model_name, options.num_threads) == ("b", 1)
    assert options.url == "http://127.0.0.1:1"
    assert isinstance(up, click.Command)
