"""One scale run: fill the cluster, let an operator find it, change some, leave it alone."""

import asyncio
import os
import re
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e_shell import CommandError, say
from scale_objects import IMAGE
from scale_world import World

PORT = 18470
URL = f"http://127.0.0.1:{PORT}"
SETTLE_LIMIT_S = 300
START_LIMIT_S = 120
POLL_INTERVAL_S = 0.2
REST_S = 10
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
RECONCILE_SECONDS = "kvasir_operator_reconcile_seconds"
QUEUE_SECONDS = "kvasir_operator_queue_seconds"


@dataclass(frozen=True)
class Size:
    """How much there is of everything."""

    pools: int
    pods: int
    touched: int
    idle_s: int
    changes_per_s: float


class Operator:
    """The operator of this checkout, as a process."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def metrics(self) -> str:
        """What it says of itself."""
        text: str = urllib.request.urlopen(f"{URL}/metrics", timeout=30).read().decode()
        return text

    def total(self, pattern: str) -> float:
        """The sum of the samples that match."""
        found = re.findall(rf"^{pattern} (.+)$", self.metrics(), re.MULTILINE)
        return sum(map(float, found))

    def calls(self) -> float:
        """Calls to the API server, watches aside."""
        return self.total(r'kvasir_operator_api_requests_total{.*verb="(?!watch).*}')

    def writes(self) -> float:
        """Calls that write."""
        return self.total("kvasir_operator_api_writes_total{.*}")

    def reconciles(self) -> float:
        """Reconciles so far."""
        return self.total("kvasir_operator_reconciles_total{.*}")

    def buckets(self, name: str) -> dict[float, float]:
        """A cumulative histogram, over all kinds."""
        found: dict[float, float] = {}
        for match in re.finditer(rf'{name}_bucket{{.*le="(.+?)".*}} (.+)', self.metrics()):
            bound = float(match[1].replace("+Inf", "inf"))
            found[bound] = found.get(bound, 0.0) + float(match[2])
        return found

    def memory_mb(self, field: str) -> float:
        """VmRSS (now) or VmHWM (the most so far)."""
        found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{self._pid}/status").read_text())
        assert found, field
        return round(int(found[1]) / 1024, 1)

    def cpu_s(self) -> float:
        """Processor time so far, in seconds."""
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


@asynccontextmanager
async def operator(folder: Path) -> AsyncIterator[Operator]:
    """Start the operator and wait until its caches are complete; ended with the block."""
    command = (str(Path(sys.executable).parent / "kvasir"), "operator", "--image", IMAGE)
    log = folder / "operator.log"
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *command,
            *("--host", "127.0.0.1", "--http-port", str(PORT)),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        async with asyncio.timeout(START_LIMIT_S):
            while not await asyncio.to_thread(_is_ready):  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.1)
        yield Operator(process.pid)
    except BaseException:
        say(log.read_text(errors="replace")[-4000:])
        raise
    finally:
        process.terminate()
        await process.wait()
    trouble = [line for line in log.read_text().splitlines() if " ERROR " in line]
    assert trouble == [], trouble[:5]


def _is_ready() -> bool:
    try:
        return bool(urllib.request.urlopen(f"{URL}/readyz", timeout=5).status == 200)
    except OSError:
        return False


async def measure(size: Size, folder: Path) -> dict[str, Any]:
    """All figures."""
    async with World() as world:
        figures: dict[str, Any] = {
            "fill": await world.fill(num_pools=size.pools, num_pods=size.pods)
        }
        async with operator(folder) as process:
            figures |= {"first_start": await _settle(size, world, process)}
            figures |= await _change(size, world, process)
            figures |= {"idle": await _idle(size, world, process)}
            figures |= {
                "rss_mb": process.memory_mb("VmRSS"),
                "rss_max_mb": process.memory_mb("VmHWM"),
            }
        figures |= {"start_again": await _start_again(size, folder)}
    return figures


async def _settle(size: Size, world: World, process: Operator) -> dict[str, float]:
    """Until the status of every pool has been written."""
    started_s, told_s = time.monotonic(), 0.0
    while (num := world.num_settled()) < size.pools:
        taken_s = time.monotonic() - started_s
        if taken_s > SETTLE_LIMIT_S:
            raise CommandError(f"{num} of {size.pools} pools after {SETTLE_LIMIT_S} s")
        if taken_s - told_s > REST_S:
            told_s = taken_s
            say(f"  {num} of {size.pools} pools are settled")
        await asyncio.sleep(POLL_INTERVAL_S)
    figures = {
        "seconds": round(time.monotonic() - started_s, 1),
        "reconciles": process.reconciles(),
        "writes": process.writes(),
        "operator_cpu_s": round(process.cpu_s(), 1),
        "rss_mb": process.memory_mb("VmRSS"),
    }
    say(f"the operator has seen to every pool: {figures}")
    await asyncio.sleep(REST_S)
    return figures


async def _change(size: Size, world: World, process: Operator) -> dict[str, Any]:
    before = process.buckets(RECONCILE_SECONDS), process.buckets(QUEUE_SECONDS)
    figures: dict[str, Any] = {}
    for what, change in (
        ("spec_to_status_s", world.change_spec),
        ("pod_to_status_s", world.fail_pod),
        ("drift_to_repair_s", world.spoil_child),
    ):
        taken_s = await world.paced(change, num=size.touched, per_s=size.changes_per_s)
        figures[what] = {"changes": len(taken_s), **_percentiles(taken_s)}
        say(f"{what}: {figures[what]}")
    figures |= {
        "reconcile_s_at_most": _quantiles(before[0], process.buckets(RECONCILE_SECONDS)),
        "queue_s_at_most": _quantiles(before[1], process.buckets(QUEUE_SECONDS)),
    }
    say(f"reconciles: {figures['reconcile_s_at_most']}, queue: {figures['queue_s_at_most']}")
    await asyncio.sleep(REST_S)
    return figures


async def _idle(size: Size, world: World, process: Operator) -> dict[str, Any]:
    """Counted by the operator and by the API server: an own error would not show in the former."""
    say(f"left alone for {size.idle_s} s")
    server_start = await world.server_writes()
    start = process.calls(), process.writes(), process.reconciles(), process.cpu_s()
    await asyncio.sleep(size.idle_s)
    end = process.calls(), process.writes(), process.reconciles(), process.cpu_s()
    server_end = await world.server_writes()
    calls, writes, reconciles, cpu_s = (b - a for a, b in zip(start, end, strict=True))
    counted = {key: num - server_start.get(key, 0.0) for key, num in server_end.items()}
    figures = {
        "seconds": size.idle_s,
        "calls": calls,
        "writes": writes,
        "writes_that_the_api_server_counts": {key: num for key, num in counted.items() if num},
        "reconciles": reconciles,
        "operator_cpu_percent": round(100 * cpu_s / size.idle_s, 1),
    }
    say(f"idle: {figures}")
    return figures


async def _start_again(size: Size, folder: Path) -> dict[str, Any]:
    """A new operator finds everything as it should be: how long until it has seen to all of it."""
    started_s = time.monotonic()
    async with operator(folder) as process:
        ready_s = time.monotonic() - started_s
        async with asyncio.timeout(SETTLE_LIMIT_S):
            while process.reconciles() < size.pools:  # noqa: ASYNC110 (it only tells its sum)
                await asyncio.sleep(POLL_INTERVAL_S)
        figures = {
            "seconds_to_ready": round(ready_s, 1),
            "seconds_to_all_reconciled": round(time.monotonic() - started_s, 1),
            "writes": process.writes(),
            "rss_max_mb": process.memory_mb("VmHWM"),
        }
    say(f"started again: {figures}")
    return figures


def _percentiles(values: list[float]) -> dict[str, float]:
    """The values that half, 99 % and all do not exceed."""
    found = sorted(values)
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {n: round(found[min(len(found) - 1, int(s * len(found)))], 3) for n, s in shares.items()}


def _quantiles(before: dict[float, float], after: dict[float, float]) -> dict[str, float]:
    """The bounds of the buckets that half and 99 % of what was counted in between lie in."""
    counts = {bound: after[bound] - before.get(bound, 0.0) for bound in sorted(after)}
    total = counts[float("inf")]
    return {
        name: next(bound for bound, count in counts.items() if count >= share * total)
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }
