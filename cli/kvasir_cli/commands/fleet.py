"""kvasir up and down: a fleet on this machine."""

import asyncio
import os
import random
from pathlib import Path
from typing import Any, get_args

import click
from kvasir_engine.formats import KvFormat, WeightFormat
from kvasir_kvstore.core.codecs import CODECS, RAW

from kvasir_cli.fleet.plan import TTFT_SLO_MS, FleetOptions

COUNT = click.IntRange(min=1)
WEIGHT_FORMAT = click.Choice(get_args(WeightFormat))
KV_FORMAT = click.Choice(get_args(KvFormat))
KV_CODEC = click.Choice([RAW, "auto", *CODECS])
PORT = click.IntRange(min=1, max=65535)


@click.command()
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    required=True,
    envvar="KVASIR_MODEL",
    help="Hugging Face folder.",
)
@click.option("--model-name", help="The name that clients use.  [default: the folder's name]")
@click.option("--prefill", "num_prefill", type=COUNT, default=1, show_default=True)
@click.option("--decode", "num_decode", type=COUNT, default=1, show_default=True)
@click.option(
    "--kv-nodes", "num_kv_nodes", type=click.IntRange(min=0), default=1, show_default=True
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where the router listens.")
@click.option("--port", type=PORT, default=8080, show_default=True, help="Of the OpenAI HTTP API.")
@click.option(
    "--grpc-port",
    type=click.IntRange(min=0, max=65535),
    default=0,
    help="Of the router's gRPC.  [default: any free one]",
)
@click.option("--redis", metavar="URL", help="Keep the block index there.  [default: in process]")
@click.option(
    "--threads",
    "num_threads",
    type=click.IntRange(min=0),
    default=0,
    help="Of each worker.  [default: the cores, shared out]",
)
@click.option(
    "--kv-cache-mb", type=COUNT, default=512, show_default=True, help="KV memory of each worker."
)
@click.option(
    "--weights",
    type=WEIGHT_FORMAT,
    default="bf16",
    show_default=True,
    help="How weights are computed with.",
)
@click.option("--kv", type=KV_FORMAT, default="bf16", show_default=True, help="How KV is kept.")
@click.option(
    "--kv-codec",
    type=KV_CODEC,
    default=RAW,
    show_default=True,
    help="Other than raw: KV goes by TCP, encoded so; kvasir kv probe allows it for the model.",
)
@click.option(
    "--kv-node-mb", type=COUNT, default=512, show_default=True, help="Memory of each KV node."
)
@click.option(
    "--ttft-slo-ms",
    type=COUNT,
    default=TTFT_SLO_MS,
    show_default=True,
    help="Time to first token to aim at; a request that cannot meet it is refused with 429.",
)
@click.option(
    "--tls", is_flag=True, help="The parts talk over TLS and show one another certificates."
)
@click.option("--detach", is_flag=True, help="Return when the fleet serves; it runs on.")
def up(*, detach: bool, **values: Any) -> None:
    """Start a fleet: one router, prefill and decode workers, KV nodes.

    Each part is a process of its own; one that dies is started again. Ctrl-C stops all.

    \b
    kvasir up --model ~/models/smollm2 --prefill 2 --decode 2 --kv-nodes 1
    """
    from kvasir_cli.parent import die_with_parent

    die_with_parent()
    options = fleet_options(**values)
    if detach:
        from kvasir_cli.fleet.launch import start_detached

        start_detached(options, echo=click.echo, dies_with_us=False)
        click.echo(f"  stop it with: kvasir down --port {options.port}")
    else:
        run_fleet(options)


def fleet_options(**values: Any) -> FleetOptions:
    """The options with what was left open filled in: the model's name, threads by worker."""
    num_workers = values["num_prefill"] + values["num_decode"]
    num_cores = len(os.sched_getaffinity(0))
    values["model_name"] = values["model_name"] or values["model"].absolute().name
    values["num_threads"] = values["num_threads"] or max(1, num_cores // num_workers)
    return FleetOptions(**values)


def run_fleet(options: FleetOptions) -> None:
    """Check, plan, start and supervise a fleet until it is told to stop."""
    from kvasir_cli.fleet.checks import check_fleet
    from kvasir_cli.fleet.plan import LOOPBACK, plan_fleet
    from kvasir_cli.fleet.ports import free_ports
    from kvasir_cli.fleet.report import make_report
    from kvasir_cli.fleet.state import held_run_folder
    from kvasir_cli.fleet.supervisor import Supervisor
    from kvasir_cli.fleet.tls import make_tls_dir

    with held_run_folder(options.port) as folder:
        check_fleet(options)
        taken = frozenset({options.port, options.grpc_port})
        ports = free_ports(LOOPBACK, options.num_ports, avoid=taken, source=random.Random())
        if options.grpc_port:
            ports[0] = options.grpc_port
        tls_dir = make_tls_dir(folder) if options.tls else None
        plan = plan_fleet(options, ports, tls_dir=tls_dir)
        click.echo(
            f"{options.model_name}: {options.num_prefill} prefill, {options.num_decode} decode, "
            f"{options.num_kv_nodes} KV nodes, 1 router"
        )
        supervisor = Supervisor(
            options, plan, run_folder=folder, report=make_report(), tls_dir=tls_dir
        )
        asyncio.run(supervisor.run())


@click.command()
@click.option("--port", type=PORT, help="Of the fleet's router, if several fleets run.")
def down(port: int | None) -> None:
    """Stop a fleet that runs in the background."""
    from kvasir_cli.fleet.launch import find_fleet, stop_fleet

    fleet = find_fleet(port)
    stop_fleet(fleet)
    click.echo(f"stopped {fleet.url}")
