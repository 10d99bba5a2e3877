"""What a decode step costs beside the native forward pass: scheduling, sampling, handing out.

Decides how that is measured: the engine serves a batch of requests whose context counts as
computed, and consumers take their tokens in an event loop, as in a worker. The share is that of the
time from the end of one forward pass to the start of the next, medians over the steps.
"""

import asyncio
import threading
import time
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
from kvasir_kvstore._native import BlockPool
from kvasir_kvstore.core.block import BLOCK_TOKENS

from kvasir_engine.core.types import EngineLimits, EngineRequest, Sampling
from kvasir_engine.engine import Engine
from kvasir_engine.model import LoadedModel
from kvasir_engine.stream import TokenStream

SAMPLINGS = {
    "greedy": Sampling(),
    "top_p_peaked": Sampling(temperature=0.1, top_p=0.9),
    "top_p": Sampling(temperature=1.0, top_p=0.9),
}
"""What requests ask for: the cheapest, and what chat services commonly do, of models as sure of
the next token as trained ones (by a low temperature: logits of random weights are flat) and of
random weights as they are."""

WARM_STEPS = 2
"""More than are asked for: the first and the last may not be full."""


@dataclass(slots=True)
class TimedModel:
    """A model that notes when its full steps began and ended."""

    inner: Any
    fingerprint: bytes
    num_tokens: int
    """Of the steps that are noted."""
    may_begin: threading.Event = field(default_factory=threading.Event)
    spans: list[tuple[float, float]] = field(default_factory=list)

    @property
    def native(self) -> "TimedModel":
        """Itself, as an engine asks for it."""
        return self

    def attach_pool(self, *arrays: np.ndarray) -> None:
        """As the model does."""
        self.inner.attach_pool(*arrays)

    def forward(self, **arrays: Any) -> None:
        """As the model does, noted."""
        self.may_begin.wait()
        started = time.perf_counter()
        self.inner.forward(**arrays)
        if len(arrays["token_ids"]) == self.num_tokens:
            self.spans.append((started, time.perf_counter()))

    def sample(self, **arrays: Any) -> Any:
        """As the model does; no part of the forward pass."""
        return self.inner.sample(**arrays)

    def overhead_share(self) -> float:
        """Of a step, what lies between two forward passes."""
        gaps = [after[0] - before[1] for before, after in pairwise(self.spans)]
        gap, forward = median(gaps), median(end - start for start, end in self.spans)
        return gap / (gap + forward)


def overhead_share(
    model: LoadedModel,
    pool: BlockPool,
    *,
    batch_size: int,
    context_length: int,
    num_steps: int,
    sampling: Sampling,
) -> float:
    """Of decode steps of so many sequences after contexts of so many tokens.

    The pool, which holds blocks for them all, is attached to the model already.
    """
    timed = TimedModel(model.native, model.fingerprint, batch_size)
    num_tokens = num_steps + WARM_STEPS
    wanted = replace(sampling, max_tokens=num_tokens, ignore_eos=True)
    limits = EngineLimits(
        num_blocks=pool.num_blocks,
        context_length=context_length + 1 + num_tokens,
        vocab_size=model.config.vocab_size,
        max_running=batch_size,
    )
    asyncio.run(_serve(timed, pool, limits, wanted, context_length))
    return timed.overhead_share()


async def _serve(
    model: TimedModel,
    pool: BlockPool,
    limits: EngineLimits,
    sampling: Sampling,
    context_length: int,
) -> None:
    """One batch of requests from their first token to their last; the pool is as before then."""
    async with Engine(model, pool, limits=limits, eos_token_ids=()) as engine:
        names = []
        for number in range(limits.max_running):
            prompt = (number, *([0] * context_length))  # a first token each: nothing is shared
            request = EngineRequest(f"bench-{number}", prompt, sampling)
            reservation = await engine.reserve(request)
            pool.ready[list(reservation.blocks)] = pool.num_layers
            names.append(request.request_id)
        num_computed = context_length // BLOCK_TOKENS * BLOCK_TOKENS
        try:
            streams = [engine.activate(name, computed_tokens=num_computed) for name in names]
        finally:
            model.may_begin.set()
        await asyncio.gather(*map(_drain, streams))
        held = await anext(engine.block_events())
    for name in held.stored:
        pool.unpublish(name)


async def _drain(stream: TokenStream) -> None:
    async for _ in stream:
        pass
