"""Whether this machine can run the fleet that was asked for; if not, why not, before it starts."""

from pathlib import Path

from kvasir_cli.errors import RefusedError
from kvasir_cli.fleet.plan import FleetOptions
from kvasir_cli.fleet.ports import refuse_taken
from kvasir_cli.progress import size_text

PROCESS_BYTES = 120 << 20
"""Interpreter, libraries and buffers of one part."""
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


def check_fleet(options: FleetOptions) -> None:
    """Raises RefusedError if the fleet cannot work on this machine, with the reason."""
    check_model(options.model)
    refuse_taken(options.host, options.port, flag="--port")
    if options.grpc_port:
        refuse_taken(options.host, options.grpc_port, flag="--grpc-port")
    check_memory(options, available_bytes())


def check_model(model: Path) -> None:
    """Raises RefusedError unless `model` is a folder that the engine can load."""
    if not model.exists():
        raise RefusedError(f"--model: no such folder: {model}")
    if model.suffix == ".gguf":
        raise RefusedError(f"--model: {model} is a GGUF file: kvasir model import {model} DIR")
    if not model.is_dir():
        raise RefusedError(f"--model: {model} is not a folder")
    for pattern in ("config.json", "tokenizer.json", "*.safetensors"):
        if not any(model.glob(pattern)):
            raise RefusedError(f"--model: {model} has no {pattern}: not a Hugging Face folder")


def check_memory(options: FleetOptions, num_bytes_available: int) -> None:
    """Raises RefusedError if the parts need more memory than there is; it says how much."""
    per_worker = worker_bytes(options)
    per_kv_node = options.kv_node_mb * 1_000_000 + PROCESS_BYTES
    needed = options.num_workers * per_worker + options.num_kv_nodes * per_kv_node + PROCESS_BYTES
    if needed > num_bytes_available:
        raise RefusedError(
            f"not enough memory: {size_text(needed)} are needed ({options.num_workers} workers "
            f"of {size_text(per_worker)}, {options.num_kv_nodes} KV nodes of "
            f"{size_text(per_kv_node)}), {size_text(num_bytes_available)} are available; use "
            "fewer workers or a smaller --kv-cache-mb"
        )


def worker_bytes(options: FleetOptions) -> int:
    """Memory of one worker: weights, KV cache and the process itself."""
    weights = sum(path.stat().st_size for path in options.model.glob("*.safetensors"))
    return weights + options.kv_cache_mb * 1_000_000 + PROCESS_BYTES


def available_bytes() -> int:
    """Memory that new processes can take, by the machine and by the cgroup's limit."""
    values = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    found = 1024 * int(values["MemAvailable"].split()[0])
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return found
    return min(found, limit - used)
