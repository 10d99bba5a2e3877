"""One scale run: fill the cluster, change some of it, leave it alone, start the operator again."""

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
from scale_world import World

PORT = 18470
URL = f"http://127.0.0.1:{PORT}"
SETTLE_LIMIT_S = 1800
START_LIMIT_S = 120
REST_S = 10
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
RECONCILE_SECONDS = "kvasir_operator_reconcile_seconds"
QUEUE_SECONDS = "kvasir_operator_queue_seconds"


@dataclass(frozen=True)
class Size:
    """How much there is of everything."""

    pools: int
    pods_per_pool: int
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
    command = (str(Path(sys.executable).parent / "kvasir"), "operator", "--image", "kvasir:none")
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
        async with operator(folder) as process:
            figures = await _fill(size, world, process)
            figures |= await _change(size, world, process)
            figures |= {"idle": await _idle(size, process)}
            figures |= {
                "rss_mb": process.memory_mb("VmRSS"),
                "rss_max_mb": process.memory_mb("VmHWM"),
            }
        figures |= {"start_again": await _start_again(size, folder)}
    return figures


async def _fill(size: Size, world: World, process: Operator) -> dict[str, Any]:
    started_s, told_s = time.monotonic(), 0.0
    await world.create_pools(size.pools, size.pods_per_pool)
    say(f"{size.pools} pools created in {time.monotonic() - started_s:.0f} s")
    while (num := world.num_settled()) < size.pools:
        taken_s = time.monotonic() - started_s
        if taken_s > SETTLE_LIMIT_S:
            raise CommandError(f"{num} of {size.pools} pools after {SETTLE_LIMIT_S} s")
        if taken_s - told_s > 15:
            told_s = taken_s
            say(f"  {num} of {size.pools} pools are settled")
        await asyncio.sleep(1)
    settled_s = time.monotonic() - started_s
    say(f"all settled after {settled_s:.0f} s; RSS {process.memory_mb('VmRSS')} MB")
    await asyncio.sleep(REST_S)
    return {
        "settle": {
            "seconds": round(settled_s, 1),
            "reconciles": process.reconciles(),
            "writes": process.writes(),
            "operator_cpu_s": round(process.cpu_s(), 1),
        }
    }


async def _change(size: Size, world: World, process: Operator) -> dict[str, Any]:
    before = process.buckets(RECONCILE_SECONDS), process.buckets(QUEUE_SECONDS)
    spec_s = await world.paced(world.change, size.pools, size.changes_per_s)
    pods_s = await world.paced(world.fail_pod, size.pools, size.changes_per_s)
    after = process.buckets(RECONCILE_SECONDS), process.buckets(QUEUE_SECONDS)
    figures: dict[str, Any] = {
        "change_to_status_s": _percentiles(spec_s),
        "pod_to_status_s": _percentiles(pods_s),
        "queue_s_at_most": _quantiles(before[1], after[1]),
        "reconcile_s_at_most": _quantiles(before[0], after[0]),
    }
    say(f"{len(spec_s)} changes of pools: {figures['change_to_status_s']}")
    say(f"{len(pods_s)} changes of pods: {figures['pod_to_status_s']}")
    await asyncio.sleep(REST_S)
    return figures


async def _idle(size: Size, process: Operator) -> dict[str, Any]:
    say(f"left alone for {size.idle_s} s")
    start = process.calls(), process.writes(), process.reconciles(), process.cpu_s()
    await asyncio.sleep(size.idle_s)
    end = process.calls(), process.writes(), process.reconciles(), process.cpu_s()
    calls, writes, reconciles, cpu_s = (b - a for a, b in zip(start, end, strict=True))
    return {
        "seconds": size.idle_s,
        "calls": calls,
        "writes": writes,
        "reconciles": reconciles,
        "operator_cpu_percent": round(100 * cpu_s / size.idle_s, 1),
    }


async def _start_again(size: Size, folder: Path) -> dict[str, Any]:
    """A new operator finds everything as it should be: how long until it has seen to all of it."""
    started_s = time.monotonic()
    async with operator(folder) as process:
        ready_s = time.monotonic() - started_s
        while process.reconciles() < size.pools:  # noqa: ASYNC110 (it only tells its sum)
            await asyncio.sleep(0.1)
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
