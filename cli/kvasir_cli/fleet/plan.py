"""Which processes make up a local fleet, and the command line of each.

Pure: options and ports in, a plan out. Whether the machine can carry it is checks.py's matter,
and running it the supervisor's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvasir_engine.formats import KvFormat, WeightFormat
from kvasir_kvstore.core.codecs import RAW

from kvasir_cli.fleet.state import run_folder_for

LOOPBACK = "127.0.0.1"
TTFT_SLO_MS = 30_000
"""Above what the router assumes in a cluster: all parts share a few cores, and an answer that comes
late is worth more at a terminal than a 429."""
DRAIN_MS = 3000
"""On Ctrl-C running requests get this long; a person at a terminal waits no longer."""


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """What `kvasir up` was asked for."""

    model: Path
    model_name: str
    num_prefill: int
    num_decode: int
    num_kv_nodes: int
    host: str
    port: int
    grpc_port: int  # of the router; 0: any free one
    redis: str | None
    num_threads: int  # of each worker's engine
    kv_cache_mb: int  # of each worker
    kv_node_mb: int  # of each KV node
    ttft_slo_ms: int = TTFT_SLO_MS
    tls: bool = False  # links between the parts
    weights: WeightFormat = "bf16"
    kv: KvFormat = "bf16"
    kv_codec: str = RAW  # of KV between the parts

    @property
    def num_workers(self) -> int:
        """Prefill and decode workers together."""
        return self.num_prefill + self.num_decode

    @property
    def num_ports(self) -> int:
        """Ports needed besides the router's HTTP port."""
        return 1 + 3 * (self.num_workers + self.num_kv_nodes)

    @property
    def url(self) -> str:
        """Where clients on this machine reach the fleet."""
        host = LOOPBACK if self.host in ("0.0.0.0", "::", "") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


@dataclass(frozen=True, slots=True)
class PartPlan:
    """One process: what runs, where it listens, when it stops."""

    name: str
    role: str  # router, prefill, decode or kvnode
    host: str
    http_port: int
    grpc_port: int
    data_port: int  # 0: it has none
    arguments: tuple[str, ...]  # after `kvasir`
    stop_stage: int  # parts of a lower stage stop first

    @property
    def ready_url(self) -> str:
        """Answers 200 when the part can serve."""
        return f"http://{self.host}:{self.http_port}/readyz"

    @property
    def grpc_address(self) -> str:
        """HOST:PORT of its gRPC server."""
        return f"{self.host}:{self.grpc_port}"


def plan_fleet(
    options: FleetOptions, ports: Sequence[int], *, tls_dir: Path | None = None
) -> list[PartPlan]:
    """The parts in the order in which they start: KV nodes, workers, router.

    Args:
        ports: `options.num_ports` free ports; the router's gRPC port takes the first.
        tls_dir: the certificate of every part, where links are secure.
    """
    assert len(ports) == options.num_ports, (len(ports), options.num_ports)
    router_grpc_port, *rest = ports
    triples: Iterator[tuple[int, int, int]] = zip(rest[::3], rest[1::3], rest[2::3], strict=True)
    kv_nodes = [_kv_node(options, i, next(triples)) for i in range(options.num_kv_nodes)]
    peers = tuple(node.grpc_address for node in kv_nodes)
    workers = [
        _worker(options, f"{role}-{i}", role, next(triples), peers)
        for role, count in (("prefill", options.num_prefill), ("decode", options.num_decode))
        for i in range(count)
    ]
    parts = [*kv_nodes, *workers, _router(options, router_grpc_port, workers, peers)]
    if tls_dir is None:
        return parts
    secure = ("--tls-dir", str(tls_dir))
    return [replace(part, arguments=(*part.arguments, *secure)) for part in parts]


def _listen(host: str, grpc_port: int, http_port: int) -> list[str]:
    return ["--host", host, "--grpc-port", str(grpc_port), "--http-port", str(http_port)]


def _redis(options: FleetOptions) -> list[str]:
    return ["--redis", options.redis] if options.redis else []


def _socket_dir(options: FleetOptions) -> list[str]:
    """All parts are on this machine: KV goes through shared memory, unless it is to be encoded."""
    if options.kv_codec != RAW:
        return []
    return ["--kv-socket-dir", str(run_folder_for(options.port))]


def _kv_node(options: FleetOptions, index: int, ports: tuple[int, int, int]) -> PartPlan:
    name = f"kv-{index}"
    grpc_port, http_port, data_port = ports
    arguments = ["kvnode", "--name", name, "--memory-mb", str(options.kv_node_mb)]
    arguments += _listen(LOOPBACK, grpc_port, http_port)
    arguments += ["--data-port", str(data_port), *_redis(options), *_socket_dir(options)]
    return PartPlan(
        name, "kvnode", LOOPBACK, http_port, grpc_port, data_port, tuple(arguments), stop_stage=2
    )


def _worker(
    options: FleetOptions,
    name: str,
    role: str,
    ports: tuple[int, int, int],
    kv_nodes: tuple[str, ...],
) -> PartPlan:
    grpc_port, http_port, data_port = ports
    arguments = ["worker", "--model", str(options.model), "--model-name", options.model_name]
    arguments += ["--name", name, "--role", role, "--data-port", str(data_port)]
    arguments += _listen(LOOPBACK, grpc_port, http_port)
    arguments += ["--kv-cache-mb", str(options.kv_cache_mb), "--kv", options.kv]
    arguments += ["--weights", options.weights, "--kv-codec", options.kv_codec]
    arguments += ["--threads", str(options.num_threads), "--drain-timeout-ms", str(DRAIN_MS)]
    for address in kv_nodes:
        arguments += ["--kv-node", address]
    arguments += [*_redis(options), *_socket_dir(options)]
    return PartPlan(
        name, role, LOOPBACK, http_port, grpc_port, data_port, tuple(arguments), stop_stage=1
    )


def _router(
    options: FleetOptions, grpc_port: int, workers: Sequence[PartPlan], kv_nodes: tuple[str, ...]
) -> PartPlan:
    arguments = ["router", "--model", str(options.model), "--model-name", options.model_name]
    arguments += _listen(options.host, grpc_port, options.port)
    arguments += ["--drain-timeout-ms", str(DRAIN_MS), "--ttft-slo-ms", str(options.ttft_slo_ms)]
    for worker in workers:
        arguments += ["--worker", worker.grpc_address]
    for address in kv_nodes:
        arguments += ["--kv-node", address]
    host = options.url.removeprefix("http://").rpartition(":")[0]
    return PartPlan(
        "router", "router", host, options.port, grpc_port, 0, tuple(arguments), stop_stage=0
    )
