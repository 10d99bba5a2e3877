"""Figures of the data plane beside those of the machine and of peers, all in one run.

Each row is one path and one block size; the paths are those of bench_paths.py and bench_peers.py.
They take turns, round by round, so that a busy machine slows all of them; a row's rate is the
median of its rounds. CPU seconds are of both ends together, which run in one process: this one, or
that of a peer.
"""

import contextlib
import json
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kvasir_kvstore.bench_paths import make_paths
from kvasir_kvstore.bench_peers import Rounds

log = logging.getLogger(__name__)

SIZES_BYTES = (256 << 10, 1 << 20, 4 << 20, 16 << 20)
BYTES_PER_ROW = 512 << 20
REPEATS_MIN = 20
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One measurement. `gb_per_s` counts payload once; GB are 10^9 bytes."""

    path: str
    size_bytes: int
    gb_per_s: float
    p50_us: float
    cpu_s_per_gb: float


@dataclass(slots=True)
class _Samples:
    times_s: list[float] = field(default_factory=list)
    rounds_gb_per_s: list[float] = field(default_factory=list)
    rounds_cpu_s_per_gb: list[float] = field(default_factory=list)


def run_bench_kv(
    json_path: Path | None = None,
    *,
    peers: Sequence[str] | None = None,
    sizes_bytes: Sequence[int] = SIZES_BYTES,
    bytes_per_row: int = BYTES_PER_ROW,
    report: Callable[[str], None] = log.info,
) -> list[BenchRow]:
    """Measures every path at every size; writes the rows to `json_path` if one is given.

    Args:
        peers: which of bench_paths.PEERS are measured too; None: all that can be.
        sizes_bytes: of blocks; multiples of 16.
        bytes_per_row: moved for each measurement.
        report: gets one line per row as it is ready, and one per path that cannot be measured.

    Raises:
        ValueError: one of `peers` cannot be measured.
    """
    paths = make_paths(report, peers=peers)
    rows = []
    for size in sizes_bytes:
        num_moves = max(REPEATS_MIN, bytes_per_row // size) // ROUNDS
        with contextlib.ExitStack() as stack:
            rounds = {name: stack.enter_context(path(size)) for name, path in paths.items()}
            for row in _measure(rounds, size, num_moves):
                rows.append(row)
                report(
                    f"{row.path:13} {row.size_bytes >> 10:6} KiB  {row.gb_per_s:6.2f} GB/s  "
                    f"p50 {row.p50_us:8.0f} us  {row.cpu_s_per_gb:5.2f} CPU s/GB"
                )
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return rows


def _measure(rounds: dict[str, Rounds], size: int, num_moves: int) -> list[BenchRow]:
    """Rounds over all paths; each move in a round moves one block."""
    samples = {name: _Samples() for name in rounds}
    moved_gb = num_moves * size / 1e9
    for _ in range(ROUNDS):
        for name, run in rounds.items():
            times_s, cpu_s = run(num_moves)
            samples[name].times_s += times_s
            samples[name].rounds_gb_per_s.append(moved_gb / sum(times_s))
            samples[name].rounds_cpu_s_per_gb.append(cpu_s / moved_gb)
    return [
        BenchRow(
            path=name,
            size_bytes=size,
            gb_per_s=round(statistics.median(of.rounds_gb_per_s), 3),
            p50_us=round(statistics.median(of.times_s) * 1e6, 1),
            cpu_s_per_gb=round(statistics.median(of.rounds_cpu_s_per_gb), 3),
        )
        for name, of in samples.items()
    ]
