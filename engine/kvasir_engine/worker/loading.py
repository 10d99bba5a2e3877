"""Loading: from a model folder to an engine that runs, with KV memory and a data plane.

Decides how large the KV pool is, and refuses what cannot fit before it allocates anything.
"""

import asyncio
import json
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

from kvasir_kvstore._native import BlockPool, BlockServer
from kvasir_kvstore.client import KvTier
from kvasir_kvstore.codecs import CodecTerms
from kvasir_kvstore.core.block import KvLayout, fingerprint
from kvasir_kvstore.peers import DataPlane
from kvasir_proto.errors import KvasirError, Reason

from kvasir_engine.codec_probe import RECORD_NAME, allowed_codecs, is_encodable
from kvasir_engine.config import read_config
from kvasir_engine.core.types import EngineLimits
from kvasir_engine.engine import Engine
from kvasir_engine.memory import available_bytes, memory_need
from kvasir_engine.model import LoadedModel, load_model
from kvasir_engine.text import OutputText, Tokenizer
from kvasir_engine.worker.host import Host, Serving
from kvasir_engine.worker.requests import Limits
from kvasir_engine.worker.settings import WorkerSettings
from kvasir_engine.worker.transfer import Puller

log = logging.getLogger(__name__)

BLOCKS_MIN = 8
"""A short prompt, its output and the canary need somewhere to be."""
PROGRESS_STEP = 0.1
_THREAD_NAME = "kvasir-load"

T = TypeVar("T")


@asynccontextmanager
async def serving(host: Host) -> AsyncIterator[Serving]:
    """The loaded model, its engine running and its data plane listening.

    Raises:
        KvasirError: the folder is not a model this engine serves, or memory does not suffice.
        OSError: a file cannot be read, or the data port is taken.
    """
    settings = host.settings
    num_threads = settings.threads or len(os.sched_getaffinity(0))
    # 1. Weights, in a thread of their own: sockets answer meanwhile.
    _check_memory(settings, num_threads)
    model, tokenizer = await _in_thread(
        lambda: (_load_model(host, num_threads), _load_tokenizer(settings))
    )
    model, codecs = _with_codecs(settings, model)
    # 2. KV memory and data plane, then the engine, then the tier: closed in reverse order.
    pool = _new_pool(settings, model.layout)
    plane = replace(settings.data_plane, codecs=codecs).bound_to(pool)
    async with AsyncExitStack() as stack:
        block_server = _new_block_server(host, pool, plane)
        stack.callback(block_server.stop)
        puller = Puller(
            pool,
            health=host.health,
            metrics=host.metrics,
            max_pulls=settings.max_running + 1,
            plane=plane,
        )
        stack.callback(puller.close)
        eos_token_ids = _eos_token_ids(settings, tokenizer)
        engine = Engine(
            model, pool, limits=_limits(settings, model, pool), eos_token_ids=eos_token_ids
        )
        engine.start()
        stack.push_async_callback(engine.stop)
        yield Serving(
            engine=engine,
            model=model,
            pool=pool,
            block_server=block_server,
            puller=puller,
            tier=await _start_tier(host, pool, plane, stack),
            tokenizer=tokenizer,
            layout=model.layout,
            fingerprint=model.fingerprint,
            limits=Limits(
                vocab_size=model.config.vocab_size,
                context_length=model.config.max_position,
                has_tokenizer=tokenizer is not None,
                moves_kv=model.native.isa != "cuda",
            ),
            eos_token_ids=frozenset(eos_token_ids),
            isa=model.native.isa,
            num_threads=num_threads,
        )


def is_loading() -> bool:
    """Whether a model is still being loaded, perhaps for nobody."""
    return any(thread.name == _THREAD_NAME for thread in threading.enumerate())


async def _in_thread(work: Callable[[], T]) -> T:
    """Runs `work` in a daemon thread: a worker told to stop does not wait for a model to load."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]  # None is T's own then

    def run() -> None:
        try:
            result, error = work(), None
        except BaseException as raised:  # noqa: BLE001  # handed to whoever waits
            result, error = None, raised
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:
            log.info("the model was loaded for nobody: the worker has stopped")

    threading.Thread(target=run, name=_THREAD_NAME, daemon=True).start()
    return await done


def _check_memory(settings: WorkerSettings, num_threads: int) -> None:
    need = memory_need(
        read_config(settings.model),
        kv_cache_bytes=settings.kv_cache_mb << 20,
        max_batch_tokens=settings.max_batch_tokens,
        max_running=settings.max_running,
        num_threads=num_threads,
        weights=settings.weights,
    )
    available = available_bytes()
    if need.total_bytes > available:
        raise KvasirError(
            Reason.INVALID_REQUEST,
            f"not enough memory: {need.describe()} are needed, {available >> 20:,} MiB are"
            " available; a smaller KV cache needs less",
            param="kv_cache_mb",
        )
    log.info("memory: %s", need.describe())


def _load_model(host: Host, num_threads: int) -> LoadedModel:
    settings = host.settings
    shown = {"": 0.0}

    def progress(stage: str, done: int, total: int) -> None:
        part = done / total if total else 1.0
        host.state.loading = f"loading the model: {stage} {part:.0%}"
        if part >= shown.get(stage, 0.0) + PROGRESS_STEP or (part == 1.0 != shown.get(stage)):
            shown[stage] = part
            log.info("loading %s: %s %.0f %%", settings.model, stage, 100 * part)

    return load_model(
        settings.model,
        isa=settings.isa,
        weights=settings.weights,
        kv=settings.kv,
        keeps_packed=settings.keep_packed,
        before_packing=partial(_codecs, settings),
        num_threads=num_threads,
        progress=progress,
    )


def _with_codecs(settings: WorkerSettings, model: LoadedModel) -> tuple[LoadedModel, CodecTerms]:
    """The model and what its KV may go through; one whose KV may lose something has another name.

    Raises:
        KvasirError: as _codecs.
    """
    terms = _codecs(settings, model.layout, model.fingerprint)
    if settings.kv_codec == "raw":
        return model, terms
    log.info("KV over TCP: %s, of %s", settings.kv_codec, ", ".join(("raw", *terms.allowed)))
    layout = replace(model.layout, exact=False)
    return replace(model, layout=layout, fingerprint=fingerprint(model.fingerprint, layout)), terms


def _codecs(settings: WorkerSettings, layout: KvLayout, model_fingerprint: bytes) -> CodecTerms:
    """What KV of the model may go through.

    Raises:
        KvasirError: the codec has not passed the model's probe.
    """
    mode = settings.kv_codec
    if mode == "raw":
        return CodecTerms()
    allowed: tuple[str, ...] = ()
    if is_encodable(layout):
        allowed = allowed_codecs(settings.model / RECORD_NAME, model_fingerprint)
    if mode not in ("auto", *allowed):
        raise KvasirError(
            Reason.UNSUPPORTED,
            f"{mode} has not passed for this model: run `kvasir kv probe --model {settings.model}`",
            param="--kv-codec",
        )
    return CodecTerms(mode, allowed, num_heads=layout.num_kv_heads, head_dim=layout.head_dim)


def _load_tokenizer(settings: WorkerSettings) -> Tokenizer | None:
    try:
        tokenizer = Tokenizer.load(settings.model)
    except FileNotFoundError as error:
        log.warning("%s; only token ids are served", error)
        return None
    OutputText(tokenizer).feed((0,))  # what it builds at first use would delay a request
    return tokenizer


def _eos_token_ids(settings: WorkerSettings, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """As the tokenizer says; without one, as the model's own files do."""
    if tokenizer is not None:
        return tokenizer.eos_token_ids
    for name in ("generation_config.json", "config.json"):
        file = settings.model / name
        ids = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (int(ids),)
    return ()


def _new_pool(settings: WorkerSettings, layout: KvLayout) -> BlockPool:
    num_bytes = settings.kv_cache_mb << 20
    num_blocks = num_bytes // layout.block_bytes
    if num_blocks < BLOCKS_MIN:
        needed_mb = -(-BLOCKS_MIN * layout.block_bytes // (1 << 20))
        raise KvasirError(
            Reason.INVALID_REQUEST,
            f"{settings.kv_cache_mb} MB hold {num_blocks} KV blocks of {layout.block_bytes} bytes;"
            f" at least {needed_mb} MB are needed",
            param="kv_cache_mb",
        )
    log.info("KV cache: %d blocks of %d bytes", num_blocks, layout.block_bytes)
    return BlockPool(
        num_blocks=num_blocks,
        num_layers=layout.num_layers,
        layer_bytes=layout.layer_bytes,
        layout_digest=layout.digest,
        shared=bool(settings.data_plane.socket_dir),
    )


def _new_block_server(host: Host, pool: BlockPool, plane: DataPlane) -> BlockServer:
    settings = host.settings
    server = BlockServer(
        pool,
        host=settings.host,
        port=settings.data_port,
        uid=host.address.uid,
        epoch=host.address.epoch,
        connections_max=settings.max_requests,
        socket_dir=plane.socket_dir,
        key=plane.key,
        remote_agent=plane.remote_agent,
    )
    host.address.data_port = server.port
    return server


def _limits(settings: WorkerSettings, model: LoadedModel, pool: BlockPool) -> EngineLimits:
    return EngineLimits(
        num_blocks=pool.num_blocks,
        context_length=model.config.max_position,
        vocab_size=model.config.vocab_size,
        max_batch_tokens=settings.max_batch_tokens,
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
    )


async def _start_tier(
    host: Host, pool: BlockPool, plane: DataPlane, stack: AsyncExitStack
) -> KvTier | None:
    settings = host.settings
    if not settings.kv_nodes:
        return None
    tier = KvTier(
        pool,
        nodes=settings.kv_nodes,
        redis_url=settings.redis,
        links=host.links,
        plane=plane,
        registry=host.metrics.registry,
        offer_names_waiting_max=settings.offer_blocks_max,
        replicas=settings.kv_replicas,
    )
    await tier.start()
    stack.push_async_callback(tier.close)
    return tier
