"""A worker whose engine is a vLLM server beside it: routers see a worker like any other.

Decides when vLLM can serve, and what routers are told of it. Its KV stays in vLLM: nothing is
handed off, fetched or offered, so every prompt is computed where it is decoded. Routers hear what
vLLM has cached from its KV events (vllm_events.py); without those they go by what they sent here.
Prompts wait in vLLM's queue, not in this process.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from kvasir_kvstore.core.block import NAME_BYTES
from kvasir_proto.errors import KvasirError
from kvasir_proto.v1 import worker_pb2

from kvasir_engine.core.types import EngineLoad, FinishReason, TokenEvent
from kvasir_engine.core.vllm_blocks import VllmBlocks
from kvasir_engine.text import Tokenizer
from kvasir_engine.worker.generate import Delta, Done, Generator
from kvasir_engine.worker.host import Host, Outside
from kvasir_engine.worker.inflight import Scope
from kvasir_engine.worker.requests import Limits
from kvasir_engine.worker.sampling import stop_token_ids
from kvasir_engine.worker.settings import WorkerSettings
from kvasir_engine.worker.trace import Trace
from kvasir_engine.worker.vllm import Vllm, VllmUsage

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 0.5
CHECK_FAILURES_MAX = 3
"""In a row: a busy server may be slow to answer once."""
SMOOTHING = 0.2
"""Weight of a new measurement in the rates."""
FINGERPRINTED = ("config.json", "tokenizer.json")


@dataclass(frozen=True, slots=True)
class Served:
    """The model that vLLM serves, as routers and requests need it."""

    vllm: Vllm
    tokenizer: Tokenizer
    limits: Limits
    eos_token_ids: frozenset[int]
    fingerprint: bytes
    blocks: VllmBlocks


class Rates:
    """How fast vLLM is, seen from here: its queue is in it."""

    def __init__(self) -> None:
        self.prefill_us_per_token = 0.0
        self.decode_ms_per_step = 0.0

    def first_token(self, elapsed_s: float, *, num_tokens: int) -> None:
        """A prompt was computed."""
        measured = elapsed_s * 1e6 / max(num_tokens, 1)
        self.prefill_us_per_token = _smoothed(self.prefill_us_per_token, measured)

    def next_tokens(self, elapsed_s: float, *, num_tokens: int) -> None:
        """Tokens after the first have come."""
        measured = elapsed_s * 1e3 / max(num_tokens, 1)
        self.decode_ms_per_step = _smoothed(self.decode_ms_per_step, measured)


def _smoothed(before: float, measured: float) -> float:
    return measured if not before else before + SMOOTHING * (measured - before)


class VllmGenerator(Generator):
    """Tokens of vLLM."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.served: Served | None = None
        self.rates = Rates()
        self._tokens_waiting = 0

    @asynccontextmanager
    async def opened(
        self, message: worker_pb2.GenerateRequest
    ) -> AsyncIterator[AsyncIterator[Delta | Done]]:
        """See Generator; a peer that could prefill is not asked."""
        message.ClearField("prefill_peer")
        async with super().opened(message) as outputs:
            yield outputs

    def _served(self) -> Served:
        assert self.served is not None, "requests are admitted only once vLLM serves"
        return self.served

    async def _events(
        self, message: worker_pb2.GenerateRequest, scope: Scope, trace: Trace
    ) -> AsyncGenerator[TokenEvent, None]:
        served = self._served()
        stops = stop_token_ids(message.sampling, served.eos_token_ids)
        num_tokens = len(message.token_ids) + len(message.resume_token_ids)
        trace.prefill_worker = self._host.settings.name
        served.blocks.salted(message.tenant_salt)
        usage, is_first, before_s = VllmUsage(), True, time.monotonic()
        self._tokens_waiting += num_tokens
        try:
            async with aclosing(served.vllm.events(message, usage)) as events:
                async for event in events:
                    now_s = time.monotonic()
                    if is_first and event.token_ids:
                        self._tokens_waiting -= num_tokens
                        is_first = False
                        self.rates.first_token(now_s - before_s, num_tokens=num_tokens)
                        trace.prefill_ms = (now_s - before_s) * 1000
                    elif event.token_ids:
                        self.rates.next_tokens(now_s - before_s, num_tokens=len(event.token_ids))
                    before_s = now_s
                    if event.finish_reason is not None:
                        trace.tokens_cached_local = min(usage.cached_tokens, num_tokens)
                        trace.tokens_computed = num_tokens - trace.tokens_cached_local
                        prompt_tokens = self._host.metrics.prompt_tokens
                        prompt_tokens.add("computed", trace.tokens_computed)
                        prompt_tokens.add("cached", trace.tokens_cached_local)
                    for part in _with_stop_last(event, stops):
                        yield part
        finally:
            if is_first:
                self._tokens_waiting -= num_tokens

    async def _ended(self, message: worker_pb2.GenerateRequest, produced: Sequence[int]) -> None:
        """Its blocks stay in vLLM's cache."""

    async def load(self) -> EngineLoad:
        """How busy vLLM is.

        Raises:
            KvasirError: it does not answer.
        """
        found = await self._served().vllm.load()
        return EngineLoad(
            num_waiting=found.num_waiting,
            num_running=found.num_running,
            num_reserved=0,
            num_handoffs=0,
            prefill_tokens_queued=self._tokens_waiting,
            blocks_total=found.blocks_total,
            blocks_free=found.blocks_free,
            prefill_us_per_token=self.rates.prefill_us_per_token,
            decode_ms_per_step=self.rates.decode_ms_per_step,
        )


def _with_stop_last(event: TokenEvent, stops: frozenset[int]) -> tuple[TokenEvent, ...]:
    """A last event that ends with a stop token, or with no token: its text is not shown."""
    is_stop = event.finish_reason is FinishReason.STOP
    if not is_stop or not event.token_ids or event.token_ids[-1] in stops:
        return (event,)
    return TokenEvent(event.token_ids), TokenEvent((), FinishReason.STOP)


@asynccontextmanager
async def connected(host: Host, generator: VllmGenerator) -> AsyncIterator[None]:
    """Waits until vLLM serves the model; then `generator` serves until the end.

    Raises:
        OSError, ValueError: the model folder lacks what text needs.
    """
    settings = host.settings
    assert settings.vllm_url is not None
    tokenizer = await asyncio.to_thread(Tokenizer.load, settings.model)
    fingerprint = await asyncio.to_thread(fingerprint_of, settings)
    vllm = Vllm(
        settings.vllm_url, model_name=settings.model_name, connections_max=settings.max_requests
    )
    try:
        generator.served = Served(
            vllm=vllm,
            tokenizer=tokenizer,
            limits=Limits(
                vocab_size=tokenizer.vocab_size,
                context_length=await _context_length(host, vllm),
                has_tokenizer=True,
                moves_kv=False,
            ),
            eos_token_ids=frozenset(tokenizer.eos_token_ids),
            fingerprint=fingerprint,
            blocks=VllmBlocks(fingerprint),
        )
        yield
    finally:
        await vllm.close()


async def _context_length(host: Host, vllm: Vllm) -> int:
    """The context that vLLM serves, once it does; until then the worker is loading."""
    while True:
        try:
            return await vllm.context_length()
        except KvasirError as error:
            _loading(host, error.message)
        await asyncio.sleep(CHECK_INTERVAL_S)


async def follow_events(host: Host, generator: VllmGenerator) -> None:
    """Keeps routers informed of vLLM's blocks."""
    from kvasir_engine.worker.vllm_events import VllmEvents  # its libraries are an extra

    assert generator.served is not None
    await VllmEvents(host, generator.served.blocks).run()


async def watch(host: Host, generator: VllmGenerator) -> None:
    """Keeps what routers are told of vLLM fresh; while it does not answer, nothing is taken on."""
    served = generator.served
    assert served is not None
    num_failed = 0
    while True:
        try:
            load = await generator.load()
        except KvasirError as error:
            num_failed += 1
            if num_failed >= CHECK_FAILURES_MAX:
                _loading(host, error.message)
        else:
            num_failed = 0
            host.outside = Outside(served.fingerprint, served.limits.context_length, load)
            if host.state.loading:
                host.state.loading = ""
                log.info("vLLM serves %s", host.settings.model_name)
                host.hub.description_changed()
        await asyncio.sleep(CHECK_INTERVAL_S)


def _loading(host: Host, problem: str) -> None:
    if host.state.loading != problem:
        log.info("%s", problem)
        host.state.loading = problem
        host.outside = None
        host.hub.description_changed()


def fingerprint_of(settings: WorkerSettings) -> bytes:
    """Equal for workers of one model folder; never that of the bundled engine."""
    digest = hashlib.blake2b(digest_size=NAME_BYTES, person=b"kvasir-vllm")
    for name in FINGERPRINTED:
        digest.update((settings.model / name).read_bytes())
    return digest.digest()
