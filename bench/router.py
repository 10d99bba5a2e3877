"""How long a routing decision takes: `python bench/router.py --json bench/results/router.json`.

The prompt is 32 KB of text, already tokenised and named: 8,192 tokens, 256 blocks. A decision is
all that the router does per request between having the names and sending it off: count the key,
pick, enter the request into the ledger. Fleets of 64 and 1,024 workers and one with 10,000 requests
queued take turns in one process, so that a busy machine disturbs all alike. Times: of whole
decisions this thread's CPU and the wall clock, of the pick within them the same, and the least of
nine repetitions of it. Bars, on the pick's wall clock: p50 <= 50 us and p99 <= 150 us at 64
workers; 1,024 workers within 1.5x of that; p99 <= 150 us with 10,000 queued.
"""

import argparse
import gc
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from kvasir_cli.load.machine import machine
from kvasir_kvstore.core import block
from kvasir_router.core.choose import Route, pick
from kvasir_router.core.fleet import FleetView, Request, WorkerState
from kvasir_router.core.keys import KeyTree
from kvasir_router.core.ledger import Ledger
from kvasir_router.core.prefix import PrefixView
from kvasir_router.core.rebalance import Queued, rebalance

PROMPT_TOKENS = 8_192
PROMPT_BLOCKS = PROMPT_TOKENS // block.BLOCK_TOKENS
SYSTEM_BLOCKS = 32
NUM_CONVERSATIONS = 400
BLOCKS_KNOWN = 1_000_000
REPETITIONS = 9
ROUND = 200
"""Decisions of one fleet before it is the next one's turn."""


@dataclass(slots=True)
class Times:
    """Microseconds of each decision."""

    cpu_us: list[float] = field(default_factory=list)
    wall_us: list[float] = field(default_factory=list)
    best_us: list[float] = field(default_factory=list)
    """Of `pick` alone, which changes nothing: the least CPU time of some repetitions each."""

    def measure(self, call: Callable[[], Any]) -> Any:
        """Calls and notes how long it took."""
        wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
        result = call()
        cpu_end, wall_end = time.thread_time_ns(), time.perf_counter_ns()
        self.cpu_us.append((cpu_end - cpu) / 1_000)
        self.wall_us.append((wall_end - wall) / 1_000)
        return result

    def repeat(self, call: Callable[[], Any]) -> None:
        """Notes the least of some repetitions: what the work takes when nobody disturbs it."""
        least_ns = 1 << 62
        for _ in range(REPETITIONS):
            start = time.thread_time_ns()
            call()
            least_ns = min(least_ns, time.thread_time_ns() - start)
        self.best_us.append(least_ns / 1_000)

    def summary(self) -> dict[str, float]:
        """p50 and p99 of all that was measured."""
        return {
            f"{kind}_us_p{percent}": round(float(np.percentile(values, percent)), 1)
            for kind, values in (
                ("cpu", self.cpu_us),
                ("wall", self.wall_us),
                ("best_pick", self.best_us),
            )
            for percent in (50, 99)
            if values
        }


def make_names(seed: str, count: int) -> tuple[bytes, ...]:
    """Names as good as a prompt's."""
    return tuple(
        hashlib.blake2b(f"{seed}/{i}".encode(), digest_size=16).digest() for i in range(count)
    )


class Bench:
    """A fleet, its conversations and the times of its decisions."""

    def __init__(self, num_workers: int, *, num_queued: int = 0, seed: int = 1) -> None:
        self._random = random.Random(seed)
        self.num_prefill = num_workers // 2
        self.times, self.pick_times, self.rebalance_times = Times(), Times(), Times()
        self._system = make_names("system", SYSTEM_BLOCKS)
        self._turns = [
            self._system + make_names(f"chat-{i}", PROMPT_BLOCKS - SYSTEM_BLOCKS)
            for i in range(NUM_CONVERSATIONS)
        ]
        self.view = FleetView(
            prefix=PrefixView(blocks_max=BLOCKS_KNOWN), keys=KeyTree(), ledger=Ledger()
        )
        self._join(num_workers)
        self._fill_caches()
        self.queued: list[Queued] = []
        for number in range(num_queued):
            self._decide(self._request(f"queued-{number}"), now_ms=number // 10)
        self._now_ms, self._number = num_queued // 10, 0
        self.pick_times = Times()

    def _join(self, num_workers: int) -> None:
        for i in range(num_workers):
            decodes = i >= self.num_prefill
            self.view.put(
                WorkerState(
                    f"worker-{i}",
                    can_prefill=not decodes,
                    can_decode=decodes,
                    num_running=i % 20 if decodes else 0,
                    prefill_tokens_queued=0 if decodes else i * 97 % 9_000,
                    blocks_total=20_000,
                    blocks_free=10_000,
                    prefill_us_per_token=160.0,
                    decode_ms_per_step=20.0,
                )
            )

    def _fill_caches(self) -> None:
        """Everybody holds the system prompt; two workers hold parts of each conversation."""
        names = list(self.view.workers)
        for name in names:
            self.view.prefix.stored(name, self._system)
        for i, turn in enumerate(self._turns):
            for worker in (i % self.num_prefill, self.num_prefill + i % self.num_prefill):
                length = self._random.randrange(SYSTEM_BLOCKS, PROMPT_BLOCKS - 8)
                self.view.prefix.stored(names[worker], turn[:length])
        while len(self.view.prefix) < BLOCKS_KNOWN - 10_000:
            others = [self._random.randbytes(16) for _ in range(10_000)]
            self.view.prefix.stored(self._random.choice(names), others)

    def _request(self, name: str) -> Request:
        is_known = self._random.random() < 0.5
        turn = self._random.choice(self._turns)
        names = turn if is_known else turn[:SYSTEM_BLOCKS] + make_names(name, PROMPT_BLOCKS - 32)
        return Request(name, PROMPT_TOKENS + 7, names, short_key=b"\0" * 16)

    def _decide(self, request: Request, *, now_ms: int) -> Route:
        view = self.view
        view.keys.observe(request.names, num_workers=self.num_prefill, now_ms=now_ms)
        route = self.pick_times.measure(lambda: pick(view, request, now_ms=now_ms))
        assert isinstance(route, Route), route
        missing = request.num_tokens - route.hit_tokens
        worker, name = route.computes, request.request_id
        view.ledger.sent(worker, request_id=name, tokens=missing, now_ms=now_ms)
        view.ledger.opened(route.decode)
        return route

    def round(self) -> None:
        """Some decisions, each of which ends before the next so that queues keep their length."""
        requests = [self._request(f"r{self._number + i}") for i in range(ROUND)]
        self._number += ROUND
        for request in requests:
            self._now_ms += 5
            route = self.times.measure(
                lambda request=request: self._decide(request, now_ms=self._now_ms)
            )
            self.view.ledger.prefilled(route.computes, request_id=request.request_id)
            self.view.ledger.closed(route.decode)
        for request in requests[::4]:
            self.times.repeat(lambda request=request: pick(self.view, request, now_ms=self._now_ms))
        queued = [Queued(request, "worker-1", self._now_ms) for request in requests]
        self.rebalance_times.measure(lambda: rebalance(self.view, queued, now_ms=self._now_ms))


def measure_naming(count: int) -> dict[str, float]:
    """Naming the blocks of one prompt, which comes before the decision."""
    times, rnd = Times(), random.Random(2)
    for _ in range(count):
        tokens = [rnd.randrange(150_000) for _ in range(PROMPT_TOKENS)]
        times.measure(lambda tokens=tokens: block.chain(b"\0" * 16, tokens))
    return times.summary()


def measure_join(bench: Bench) -> float:
    """Milliseconds until a view has the rings of one more worker."""
    times = Times()
    for i in range(5):
        joining = WorkerState(f"new-{i}", can_prefill=True, can_decode=False)
        times.measure(lambda joining=joining: (bench.view.put(joining), bench.view.rings))
        bench.view.remove(joining.name)
    return round(min(times.cpu_us) / 1_000, 2)


def run(num_rounds: int) -> dict[str, Any]:
    """All figures."""
    benches = {
        "workers_64": Bench(64),
        "workers_1024": Bench(1_024),
        "workers_64_queued_10000": Bench(64, num_queued=10_000),
    }
    gc.collect()
    gc.freeze()
    for number in range(num_rounds):
        for bench in benches.values():
            bench.round()
        print(f"\rround {number + 1} of {num_rounds}", end="", flush=True)
    print()
    decisions = {name: bench.times.summary() for name, bench in benches.items()}
    for name, bench in benches.items():
        once = bench.pick_times.summary()
        decisions[name] |= {f"pick_{key}": value for key, value in once.items()}
    small, large = decisions["workers_64"], decisions["workers_1024"]
    prefix = benches["workers_64"].view.prefix
    return {
        "decision": decisions,
        "ratio_1024_to_64": {
            key: round(large[key] / small[key], 2)
            for key in ("pick_wall_us_p50", "pick_wall_us_p99", "cpu_us_p50")
        },
        "naming_8192_tokens": measure_naming(100),
        "rebalance_64_queued": {n: b.rebalance_times.summary() for n, b in benches.items()},
        "join_ms": {name: measure_join(bench) for name, bench in benches.items()},
        "prefix_blocks": len(prefix),
        "prefix_mb": round(prefix.num_bytes / 2**20, 1),
    }


def meets_bars(result: dict[str, Any]) -> dict[str, bool]:
    """The bars, by the wall clock of each pick as it comes, in the midst of whole decisions."""
    decision = result["decision"]
    return {
        "64 workers: p50 <= 50 us": decision["workers_64"]["pick_wall_us_p50"] <= 50,
        "64 workers: p99 <= 150 us": decision["workers_64"]["pick_wall_us_p99"] <= 150,
        "1,024 workers: p50 within 1.5x": result["ratio_1024_to_64"]["pick_wall_us_p50"] <= 1.5,
        "10,000 queued: p99 <= 150 us": (
            decision["workers_64_queued_10000"]["pick_wall_us_p99"] <= 150
        ),
        "1 million blocks: <= 200 MB": result["prefix_mb"] <= 200,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the figures and, with --json, writes them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--rounds", type=int, default=25, help="of 200 decisions per fleet")
    options = parser.parse_args(arguments)
    result = run(options.rounds)
    result["bars"] = meets_bars(result)
    for name, figures in result["decision"].items():
        print(f"{name:<26}", *(f"{key} {value:>7}" for key, value in figures.items()))
    print(json.dumps({k: v for k, v in result.items() if k != "decision"}, indent=2))
    load = round(os.getloadavg()[0], 1)
    if options.json is not None:
        report = {"bench": "router", "machine": machine(), "load_average": load, **result}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
