"""What loading a model takes: `python bench/load.py --model DIR --json bench/results/load.json`.

Each load runs in a process of its own: the first, which packs the weights and keeps them, and later
ones, which map what was kept, with the file in the page cache (warm) and out of it (cold). Reading
is `pread` through a small buffer, as `cat` does, of the file that the load needs (the source where
it packs), in turn with the loads; medians. Memory is the largest resident set, with a KV pool that
is written whole, beside 1.25 times the packed weights and the pool.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from kvasir_cli.load.machine import machine
from kvasir_engine.formats import WeightFormat
from kvasir_engine.model import WEIGHT_FORMATS, load_model, new_kv_arrays
from kvasir_engine.packed import FOLDER

KV_BYTES = 256 << 20
READ_BYTES = 1 << 20
BOUND = 1.25
STATES = ("first", "warm", "cold")
CHILD_TIMEOUT_S = 600


def main() -> None:
    """Measures in child processes, or is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="its folder must be writable")
    parser.add_argument("--weights", nargs="*", default=WEIGHT_FORMATS, choices=WEIGHT_FORMATS)
    parser.add_argument("--states", nargs="*", default=STATES, choices=STATES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5, help="of loads that map")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=WEIGHT_FORMATS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(load_once(asked.model, asked.child, asked.threads)))
        return
    rows = [measure(asked, weights, state) for weights in asked.weights for state in asked.states]
    if asked.json:
        asked.json.write_text(json.dumps({"machine": machine(), "loads": rows}, indent=1) + "\n")


def load_once(model: Path, weights: WeightFormat, num_threads: int) -> dict[str, Any]:
    """Seconds of one load, and this process's memory after it."""
    started = time.perf_counter()
    loaded = load_model(model, weights=weights, num_threads=num_threads, keeps_packed=True)
    seconds = time.perf_counter() - started
    arrays = new_kv_arrays(loaded, KV_BYTES // loaded.layout.block_bytes)
    arrays.data[:] = 1
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    bound = BOUND * (loaded.weights_bytes + arrays.data.nbytes)
    return {
        "seconds": seconds,
        "peak_rss_mb": int(peak) >> 10,
        "bound_mb": round(bound / (1 << 20)),
    }


def measure(asked: argparse.Namespace, weights: WeightFormat, state: str) -> dict[str, Any]:
    """Loads in one state of what was kept, each beside a read."""
    kept = asked.model / FOLDER / f"{weights}.packed"
    sources = sorted(asked.model.glob("*.safetensors"))
    loads, reads = [], []
    for _ in range(1 if state == "first" else asked.repetitions):
        if state == "first":
            shutil.rmtree(asked.model / FOLDER, ignore_errors=True)
        files = sources if state == "first" else [kept]
        if state == "cold":
            drop(files)
        reads.append(read_seconds(files))
        if state == "cold":
            drop(files)
        command = [sys.executable, __file__, "--model", asked.model, "--child", weights]
        command += ["--threads", str(asked.threads)]
        ended = subprocess.run(command, capture_output=True, check=True, timeout=CHILD_TIMEOUT_S)
        loads.append(json.loads(ended.stdout))
    seconds, read = median(load["seconds"] for load in loads), median(reads)
    row = {
        "weights": weights,
        "state": state,
        "seconds": round(seconds, 3),
        "read_seconds": round(read, 3),
        "ratio": round(seconds / read, 2),
        "peak_rss_mb": max(load["peak_rss_mb"] for load in loads),
        "bound_mb": loads[0]["bound_mb"],
    }
    print(json.dumps(row), flush=True)
    return row


def read_seconds(files: list[Path]) -> float:
    """Reads them through a small buffer."""
    buffer = bytearray(READ_BYTES)
    started = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def drop(files: list[Path]) -> None:
    """Out of the page cache, as far as nobody else maps them."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
