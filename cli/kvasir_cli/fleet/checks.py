"""Whether this machine can run the fleet that was asked for; if not, why not, before it starts."""

import asyncio
from pathlib import Path

from kvasir_engine.config import read_config
from kvasir_engine.memory import MemoryNeed, available_bytes, memory_need
from kvasir_engine.model import open_model
from kvasir_engine.worker.settings import WorkerSettings
from kvasir_kvstore.index import make_index
from kvasir_proto.errors import KvasirError

from kvasir_cli.errors import RefusedError
from kvasir_cli.fleet.plan import FleetOptions
from kvasir_cli.fleet.ports import refuse_taken
from kvasir_cli.progress import size_text

SERVER_BYTES = 120 << 20
"""Interpreter, libraries and buffers of a router or a KV node."""


def check_fleet(options: FleetOptions) -> None:
    """Raises RefusedError if the fleet cannot work on this machine, with the reason."""
    check_model(options.model)
    refuse_taken(options.host, options.port, flag="--port")
    if options.grpc_port:
        refuse_taken(options.host, options.grpc_port, flag="--grpc-port")
    check_memory(options, available_bytes())
    if options.redis:
        check_redis(options.redis)


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
    try:
        open_model(model)
    except KvasirError as error:
        raise RefusedError(f"--model: {model}: {error.message}") from error


def check_memory(options: FleetOptions, num_bytes_available: int) -> None:
    """Raises RefusedError if the parts need more memory than there is; it says how much."""
    worker = worker_need(options)
    per_kv_node = (options.kv_node_mb << 20) + SERVER_BYTES
    needed = options.num_workers * worker.total_bytes
    needed += options.num_kv_nodes * per_kv_node + SERVER_BYTES
    if needed > num_bytes_available:
        raise RefusedError(
            f"not enough memory: {size_text(needed)} are needed, {size_text(num_bytes_available)} "
            f"are available; each of {options.num_workers} workers takes {worker.describe()}, each "
            f"of {options.num_kv_nodes} KV nodes {size_text(per_kv_node)}: use fewer, or a "
            "smaller --kv-cache-mb or --kv-node-mb"
        )


def check_redis(url: str) -> None:
    """Raises RefusedError unless a Redis answers at `url`."""

    async def problem() -> str:
        index = make_index(url)
        try:
            return index.problem if await index.generation() is None else ""
        finally:
            await index.close()

    try:
        found = asyncio.run(problem())
    except ValueError:
        message = f"--redis: {url!r} is not a URL of Redis (redis://HOST:PORT)"
        raise RefusedError(message) from None
    if found:
        raise RefusedError(f"--redis: {url} does not answer: {found}")


def worker_need(options: FleetOptions) -> MemoryNeed:
    """Memory of one worker."""
    defaults = WorkerSettings.model_fields
    return memory_need(
        read_config(options.model),
        kv_cache_bytes=options.kv_cache_mb << 20,
        max_batch_tokens=defaults["max_batch_tokens"].default,
        max_running=defaults["max_running"].default,
        num_threads=options.num_threads,
        weights=options.weights,
    )
