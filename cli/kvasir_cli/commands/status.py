"""kvasir status: the parts of a running fleet, as they describe themselves."""

import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from kvasir_proto.v1 import common_pb2, inference_pb2, kvnode_pb2, worker_pb2

from kvasir_cli.fleet.state import FleetState, PartState
from kvasir_cli.progress import size_text

ROLES = {
    common_pb2.ROLE_PREFILL: "prefill",
    common_pb2.ROLE_DECODE: "decode",
    common_pb2.ROLE_BOTH: "both",
}
LEFT = ("part", "role", "state", "transfers")
COLUMNS = (*LEFT, "running", "waiting", "KV blocks", "reusable", "pid", "restarts")
GOOD, BAD = "green", "red"
WIDTH_WITHOUT_TERMINAL = 160


@click.command()
@click.option("--port", type=int, help="Of the fleet's router, if several fleets run here.")
@click.option("--router", metavar="HOST:PORT", help="gRPC of a router elsewhere.")
@click.option(
    "--kv-node", "kv_nodes", metavar="HOST:PORT", multiple=True, help="gRPC of a KV node elsewhere."
)
@click.option(
    "--tls-dir",
    type=click.Path(path_type=Path),
    help="Certificate to show to KV nodes elsewhere.  [default: none, links are plain]",
)
@click.option("--json", "as_json", is_flag=True, help="All that is known, as JSON.")
def status(
    port: int | None,
    router: str | None,
    kv_nodes: tuple[str, ...],
    tls_dir: Path | None,
    *,
    as_json: bool,
) -> None:
    """Show the parts of a running fleet: role, readiness, load, cache.

    Finds a fleet that kvasir up started here; --router asks any other.
    """
    from kvasir_proto.links import Links

    from kvasir_cli.fleet.launch import find_fleet
    from kvasir_cli.fleet.view import KvNodeView, ask_kv_nodes, ask_router

    fleet = None if router else find_fleet(port)
    if fleet is not None:
        part = fleet.part("router")[0]
        router = f"{part.host}:{part.grpc_port}"
        tls_dir = Path(fleet.tls_dir) if fleet.tls_dir else None
        kv_nodes = tuple(f"{kv.host}:{kv.grpc_port}" for kv in fleet.part("kvnode"))

    async def ask() -> tuple[inference_pb2.FleetView, list[KvNodeView]]:
        return await ask_router(router or ""), await ask_kv_nodes(kv_nodes, Links(tls_dir))

    view, nodes = asyncio.run(ask())
    if as_json:
        click.echo(json.dumps(_as_json(fleet, view, nodes), indent=2))
        return
    if fleet is not None:
        click.echo(f"{fleet.url}/v1  model {fleet.model_name}  {fleet.phase}")
    _print_table(fleet, view, nodes)


def _as_json(fleet: FleetState | None, view: inference_pb2.FleetView, nodes: list[Any]) -> Any:
    from google.protobuf.json_format import MessageToDict

    def plain(message: Any) -> Any:
        return MessageToDict(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )

    return {
        "fleet": asdict(fleet) if fleet else None,
        "router": plain(view),
        "kv_nodes": [
            {"address": node.address, "description": node.description and plain(node.description)}
            for node in nodes
        ],
    }


def _print_table(fleet: FleetState | None, view: inference_pb2.FleetView, nodes: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    parts = {part.name: part for part in fleet.parts} if fleet else {}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in LEFT else "right", no_wrap=True)
    if router := parts.get("router"):
        table.add_row("router", "router", _readiness(router), *[""] * 5, *_process(router))
    for member in view.members:
        name = member.description.address.name
        table.add_row(*_worker_cells(member), *_process(parts.get(name)))
    for node in nodes:
        table.add_row(*_kv_node_cells(node), *_process(_by_address(parts, node.address)))
    Console(width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL).print(table)
    for member in view.members:
        for problem in _problems(member):
            if problem:
                click.echo(f"{member.description.address.name}: {problem}")
        for line in _reuse_lines(member.description.kv_reuse):
            click.echo(f"{member.description.address.name}: {line}")
    for node in nodes:
        if node.description is not None:
            for line in _tier_lines(node.description):
                click.echo(f"{node.description.address.name}: {line}")


def _problems(member: inference_pb2.FleetMember) -> list[str]:
    known = (member.problem, member.description.kv_transfer_error, member.canary_error)
    return list(dict.fromkeys(problem for problem in known if problem))


def _kv_cell(member: inference_pb2.FleetMember) -> str:
    """Whether KV crosses: what the worker says of itself, and what the canaries found."""
    failed = member.canary == inference_pb2.CANARY_STATE_FAILED
    if failed or not member.description.kv_transfer_healthy:
        return f"[{BAD}]failing[/]"
    if member.canary == inference_pb2.CANARY_STATE_PENDING:
        return "[yellow]unproven[/]"
    return f"[{GOOD}]ok[/]"


def _worker_cells(member: inference_pb2.FleetMember) -> list[str]:
    worker = member.description
    load = worker.load
    state = f"[{GOOD}]ready[/]"
    if not member.reachable:
        state = f"[{BAD}]unreachable[/]"
    elif worker.draining or member.problem:
        state = f"[yellow]{'draining' if worker.draining else 'not used'}[/]"
    cells = [worker.address.name, ROLES.get(worker.role, "?"), state]
    if not member.reachable:  # what it said last is no longer true
        return [*cells, *[""] * 5]
    return [
        *cells,
        _kv_cell(member),
        str(load.num_running),
        str(load.num_waiting),
        f"{load.blocks_total - load.blocks_free}/{load.blocks_total}",
        str(member.blocks_known),
    ]


def _kv_node_cells(node: Any) -> list[str]:
    found = node.description
    if found is None:
        return [node.address, "kvnode", f"[{BAD}]unreachable[/]", *[""] * 5]
    counts = f"{found.blocks_pulled} in, {found.blocks_served} out"
    if found.frames_quarantined:
        counts += f", [{BAD}]{found.frames_quarantined} bad[/]"
    if not found.index_healthy:
        counts += f", [{BAD}]{found.index} index broken[/]"
    held = f"{found.blocks_used}/{found.blocks_total}"
    state = f"[{GOOD}]ready[/]"
    return [found.address.name, "kvnode", state, counts, "", "", held, str(found.blocks_used)]


def _reuse_lines(reuse: worker_pb2.KvReuse) -> list[str]:
    """What was reused, why other blocks were not, and how KV comes."""
    lines = []
    if reuse.prompt_tokens:
        counts = (f"{count} {source}" for source, count in sorted(reuse.prompt_tokens.items()))
        lines.append(f"prompt tokens: {', '.join(counts)}")
    if reuse.tier_blocks:
        counts = (f"{count} {what}" for what, count in sorted(reuse.tier_blocks.items()))
        lines.append(f"blocks wanted of KV nodes: {', '.join(counts)}")
    for link in reuse.links:
        line = f"KV from {link.peer}: {link.codec} over {link.transport}"
        speed = f", {size_text(int(link.bytes_per_s))}/s" if link.bytes_per_s else ""
        lines.append(line + speed)
    return lines


def _tier_lines(found: kvnode_pb2.KvNodeDescription) -> list[str]:
    """What is where below a KV node's memory, what memory gave up, and what does not work."""
    lines = []
    if found.blocks_trimmed or found.blocks_evicted:
        lines.append(
            f"memory gave up {found.blocks_trimmed} blocks ahead of need, "
            f"{found.blocks_evicted} on demand"
        )
    for tier in found.tiers:
        total = f"/{tier.blocks_total}" if tier.blocks_total else ""
        line = (
            f"{tier.name} {tier.blocks_used}{total} blocks, "
            f"{size_text(tier.bytes_used)}; {tier.blocks_written} written, {tier.blocks_read} read"
        )
        if tier.blocks_bad or tier.blocks_dropped:
            line += f", {tier.blocks_bad} bad, {tier.blocks_dropped} not written"
        if tier.objects_foreign:
            line += f", {tier.objects_foreign} objects that are no blocks"
        lines.append(line)
    return [*lines, *found.degraded]


def _readiness(part: PartState) -> str:
    return f"[{GOOD}]ready[/]" if part.is_ready else f"[{BAD}]not ready[/]"


def _process(part: PartState | None) -> tuple[str, str]:
    if part is None:
        return "", ""
    return str(part.pid or "-"), str(part.num_restarts)


def _by_address(parts: dict[str, PartState], address: str) -> PartState | None:
    return next((p for p in parts.values() if f"{p.host}:{p.grpc_port}" == address), None)
