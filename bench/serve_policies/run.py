"""Replays a scaled-down trace against a real local fleet, policy by policy, and in the simulator.

    python bench/serve_policies/run.py --trace mooncake_conversation.jsonl --json FILE

Shows attainment of the TTFT SLO live beside simulated, and how far both agree on the order of the
policies (Spearman's rank correlation). Workers are real processes on an emulated accelerator (see
paced_worker.py); requests go through prefill and decode workers and the data plane.
"""

import json
import logging
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import uvloop
from kvasir_cli.fleet.ports import free_ports
from kvasir_cli.load.machine import machine
from kvasir_cli.progress import count_progress
from kvasir_sim.readers import load_trace
from live import LiveSettings, Outcome, replay
from policies import POLICIES

SYNC_MS = 200
"""How often workers report to routers."""


@click.command()
@click.option("--trace", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--policy", "policies", multiple=True, type=click.Choice(list(POLICIES)))
@click.option("--prefill", "num_prefill", type=int, default=4, show_default=True)
@click.option("--decode", "num_decode", type=int, default=1, show_default=True)
@click.option("--replicas", "num_replicas", type=int, default=2, show_default=True)
@click.option("--rate", type=float, default=4.5, show_default=True, help="In the trace's time.")
@click.option("--slo-ttft-ms", type=int, default=5_000, show_default=True)
@click.option("--prefill-us-per-token", "us_per_token", type=float, default=160, show_default=True)
@click.option("--cache-tokens", type=int, default=1_198_372, show_default=True)
@click.option("--max-input", type=int, default=20_480, show_default=True)
@click.option("--requests", "num_requests", type=int, default=400, show_default=True)
@click.option("--warmup", type=int, default=50, show_default=True)
@click.option("--speedup", type=float, default=2.0, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(
    trace: Path,
    policies: tuple[str, ...],
    max_input: int,
    num_requests: int,
    json_file: Path | None,
    **values: Any,
) -> None:
    """Compare policies live and simulated."""
    logging.basicConfig(level=logging.ERROR)  # each refusal is a warning
    requests = load_trace(trace, max_input=max_input, count=num_requests)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        subprocess.run(
            [sys.executable, "-m", "kvasir_cli", "model", "make", "tiny", str(model)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        settings = LiveSettings(model=model, **values)
        for policy in policies or tuple(POLICIES):
            ports = free_ports(
                "127.0.0.1",
                settings.num_prefill + settings.num_decode,
                avoid=frozenset(),
                source=random.Random(),
            )
            with count_progress(policy, num_requests) as advance:
                outcomes = uvloop.run(replay(settings, policy, requests, ports, advance))
            live = summary(outcomes, settings.slo_ttft_ms)
            simulated = simulate(trace, policy, settings, max_input, num_requests)
            rows.append({"policy": policy, "live": live, "simulated": simulated})
            click.echo(
                f"{policy:<14} attainment live {live['attainment']:.3f}"
                f"  simulated {simulated['attainment']:.3f}"
                f"  TTFT p50 {live['ttft_p50_ms']:.0f} / {simulated['ttft_p50_ms']:.0f} ms"
            )
    agreement = spearman(
        [row["live"]["attainment"] for row in rows],
        [row["simulated"]["attainment"] for row in rows],
    )
    click.echo(f"rank correlation of live and simulated attainment: {agreement:.2f}")
    if json_file is not None:
        asked = {k: v for k, v in asdict(settings).items() if k != "model"}
        result = {
            "bench": "serve_policies",
            "machine": machine(),
            "settings": {**asked, "requests": num_requests, "max_input": max_input},
            "rank_correlation": round(agreement, 3),
            "policies": rows,
        }
        json_file.write_text(json.dumps(result, indent=2) + "\n")


def summary(outcomes: Sequence[Outcome], slo_ttft_ms: int) -> dict[str, float]:
    """Figures of one replay, by the simulator's names."""
    served = sorted(o.ttft_ms for o in outcomes if o.ttft_ms is not None)
    attained = sum(ttft_ms <= slo_ttft_ms for ttft_ms in served)
    cached, total = (
        sum(getattr(o, f) for o in outcomes) for f in ("cached_tokens", "prompt_tokens")
    )
    return {
        "attainment": attained / len(outcomes),
        "refused": len(outcomes) - len(served),
        "hit_rate": cached / total if total else 0.0,
        "ttft_p50_ms": served[len(served) // 2],
        "ttft_p90_ms": served[len(served) * 9 // 10],
    }


def simulate(
    trace: Path, policy: str, settings: LiveSettings, max_input: int, num_requests: int
) -> dict[str, float]:
    """The same run by `kvasir sim run`."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        arguments = {
            "trace": trace,
            "policy": policy,
            "workers": settings.num_prefill,
            "rate": settings.rate,
            "slo-ttft-ms": settings.slo_ttft_ms,
            "prefill-us-per-token": settings.us_per_token,
            "cache-tokens": settings.cache_tokens,
            "max-input": max_input,
            "requests": num_requests,
            "warmup": settings.warmup,
            "seed": settings.seed,
            "replicas": settings.num_replicas,
            "sync-ms": SYNC_MS * settings.speedup,
            "json": file.name,
        }
        options = [f"--{name}={value}" for name, value in arguments.items()]
        command = [sys.executable, "-m", "kvasir_cli", "sim", "run", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        result = json.loads(Path(file.name).read_text())
    names = ("attainment", "refused", "hit_rate", "ttft_p50_ms", "ttft_p90_ms")
    return {name: result[name] for name in names}


def spearman(one: Sequence[float], two: Sequence[float]) -> float:
    """Rank correlation; ties share their mean rank."""
    ranks = [_ranks(values) for values in (one, two)]
    mean = (len(one) - 1) / 2
    product = sum((a - mean) * (b - mean) for a, b in zip(*ranks, strict=True))
    norms = [sum((r - mean) ** 2 for r in each) ** 0.5 for each in ranks]
    return product / (norms[0] * norms[1]) if all(norms) else 1.0


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [(ordered.index(v) + len(ordered) - 1 - ordered[::-1].index(v)) / 2 for v in values]


if __name__ == "__main__":
    main()
