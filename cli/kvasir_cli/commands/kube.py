"""kvasir kube: what the operator would do, without a cluster."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml
from kvasir_operator.core.planner.facts import Demand
from kvasir_operator.offline import (
    ManifestError,
    OfflinePlan,
    has_planner,
    plan_offline,
    read_resources,
)

from kvasir_cli.errors import RefusedError

if TYPE_CHECKING:
    from kvasir_engine.formats import WeightFormat

MIB = 1 << 20


@click.group()
def kube() -> None:
    """Kubernetes: what the operator would do, without a cluster."""


@kube.command("plan")
@click.option(
    "-f",
    "--file",
    "path",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="YAML file with ModelServices and pools.",
)
@click.option(
    "--model",
    "model_dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The model's folder: its memory is counted and checked against the limits.",
)
@click.option("--image", default="kvasir:dev", show_default=True, help="The operator's image.")
@click.option("--rate", type=click.FloatRange(min=0), help="Plan for this many requests a second.")
@click.option("--prompt", default=1000.0, show_default=True, help="Mean tokens of a prompt.")
@click.option(
    "--uncached",
    type=click.FloatRange(min=0),
    help="Mean tokens of a prompt that are computed. [default: all]",
)
@click.option("--output", default=200.0, show_default=True, help="Mean tokens of an output.")
@click.option("--yaml", "as_yaml", is_flag=True, help="Print the objects instead of a summary.")
def plan(
    path: Path,
    model_dir: Path | None,
    image: str,
    rate: float | None,
    prompt: float,
    uncached: float | None,
    output: float,
    as_yaml: bool,
) -> None:
    """Show the objects that the operator would make of a file, and the planner's numbers."""
    demand = None
    if rate is not None:
        computed = prompt if uncached is None else uncached
        demand = Demand(rate, computed, 1.0, prompt, output)
    try:
        resources = read_resources(path)
        if demand is not None and not any(map(has_planner, resources)):
            raise RefusedError(f"--rate: {path} holds no ModelService with a planner")
        memory = None if model_dir is None else partial(_memory_mb, model_dir)
        found = plan_offline(resources, image=image, model_memory_mb=memory, demand=demand)
    except ManifestError as error:
        raise RefusedError(str(error)) from error
    for one in found:
        _show_yaml(one) if as_yaml else _show(one)
    if any(one.problems for one in found):
        raise SystemExit(1)


def _memory_mb(model_dir: Path, weights: "WeightFormat") -> int:
    """Weights and one step of a worker; KV blocks and the process are counted apart."""
    from kvasir_engine.config import read_config
    from kvasir_engine.memory import memory_need
    from kvasir_engine.worker.settings import WorkerSettings

    defaults = WorkerSettings.model_fields
    need = memory_need(
        read_config(model_dir),
        kv_cache_bytes=0,
        max_batch_tokens=defaults["max_batch_tokens"].default,
        max_running=defaults["max_running"].default,
        num_threads=1,
        weights=weights,
    )
    return -(-(need.weights_bytes + need.step_bytes) // MIB)


def _show_yaml(one: OfflinePlan) -> None:
    for name, kind in one.secrets:
        click.echo(f"# Secret {name} ({kind}): the operator makes what it holds")
    click.echo(yaml.safe_dump_all(one.children, sort_keys=False).rstrip())
    click.echo("---")


def _show(one: OfflinePlan) -> None:
    click.secho(f"{one.resource['kind']} {one.resource['metadata']['name']}", bold=True)
    memory = one.resource["spec"].get("model", {}).get("memoryMb")
    if memory:
        click.echo(f"  a worker's model takes {memory} MiB (spec.model.memoryMb)")
    for child in one.children:
        replicas = child.get("spec", {}).get("replicas")
        count = "" if replicas is None else f" x {replicas}"
        click.echo(f"  {child['kind']} {child['metadata']['name']}{count}")
    for name, kind in one.secrets:
        click.echo(f"  Secret {name} ({kind})")
    for problem in one.problems:
        click.secho(f"  problem: {problem}", fg="red")
    if one.fleet:
        _show_fleet(one.fleet)


def _show_fleet(fleet: dict[str, Any]) -> None:
    click.echo(f"  plan: {fleet['reason']}: {fleet['message']}")
    for pool in fleet.get("pools", ()):
        click.echo(f"    {pool['name']}: {pool['replicas']} -> {pool['target']} workers")
    predicted = fleet.get("predicted", {})
    for name, unit in (("ttftMs", "ms"), ("tpotMs", "ms"), ("attainmentPercent", "%")):
        click.echo(f"    predicted {name}: {predicted.get(name, 'without end')} {unit}")
    for rejection in fleet.get("rejected", ()):
        click.echo(f"    not planned: {rejection['what']}: {rejection['why']}")
