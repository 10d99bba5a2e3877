"""One request for tokens, from message to outputs: the same for HTTP and gRPC.

    Generator          events to text, text to outputs, up to a stop string
      EngineGenerator  events of the bundled engine: who prefills, a peer or this worker
      VllmGenerator    events of vLLM (remote.py)

Invariant: an `opened` request holds nothing once it is closed, however it ends.
"""

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from kvasir_proto.v1 import common_pb2, worker_pb2

from kvasir_engine.core.types import EngineRequest, FinishReason, TokenEvent
from kvasir_engine.text import OutputText, TextChunk, Tokenizer
from kvasir_engine.worker import requests
from kvasir_engine.worker.chunks import chunks_of, names_salt
from kvasir_engine.worker.compute import Compute
from kvasir_engine.worker.handoff import Handoff
from kvasir_engine.worker.host import Host, Serving
from kvasir_engine.worker.inflight import Scope
from kvasir_engine.worker.offers import Offers
from kvasir_engine.worker.sampling import engine_sampling, stop_token_ids
from kvasir_engine.worker.state import Work
from kvasir_engine.worker.stream import FINISH_NAMES
from kvasir_engine.worker.trace import Trace

log = logging.getLogger(__name__)

_PROTO_FINISH = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
}


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens and the text that they make final."""

    text: str
    token_ids: tuple[int, ...]
    text_chars: int
    """Characters of the output sent so far, these included."""


@dataclass(frozen=True, slots=True)
class Done:
    """The output is complete."""

    finish_reason: common_pb2.FinishReason.ValueType
    usage: common_pb2.Usage
    stats: common_pb2.RequestStats

    def chunk(self) -> worker_pb2.GenerateChunk:
        """The last chunk of a stream."""
        return worker_pb2.GenerateChunk(
            finish_reason=self.finish_reason, usage=self.usage, stats=self.stats
        )


class Output:
    """One request's text, as far as it goes; without a tokenizer there are tokens only."""

    def __init__(self, message: worker_pb2.GenerateRequest, tokenizer: Tokenizer | None) -> None:
        self._text: OutputText | None = None
        self.finish: FinishReason | None = None
        if tokenizer is not None:
            self._text = OutputText(
                tokenizer,
                stop=message.sampling.stop,
                resume_tokens=message.resume_token_ids,
                resume_text_chars=message.resume_text_chars,
            )
            if self._text.is_stopped:
                self.finish = FinishReason.STOP

    def feed(self, event: TokenEvent) -> Delta:
        """The delta for an event; `finish` is set if it is the last one."""
        self.finish = event.finish_reason
        if self._text is None:
            return Delta("", event.token_ids, 0)
        chunk: TextChunk = self._text.feed(
            event.token_ids,
            is_last=event.finish_reason is not None,
            ends_with_stop_token=event.finish_reason is FinishReason.STOP,
        )
        if chunk.is_stopped:
            self.finish = FinishReason.STOP
        return Delta(chunk.text, chunk.token_ids, self._text.num_chars)


class Text(Protocol):
    """What turns a request's tokens into text, and bounds it."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None: token ids alone are served."""

    @property
    def limits(self) -> requests.Limits:
        """What the model can take."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an output."""


class Generator(ABC):
    """Serves requests for tokens."""

    def __init__(self, host: Host) -> None:
        self._host = host

    @abstractmethod
    def _served(self) -> Text:
        """The model, for a request that was admitted."""

    @abstractmethod
    def _events(
        self, message: worker_pb2.GenerateRequest, scope: Scope, trace: Trace
    ) -> AsyncGenerator[TokenEvent, None]:
        """The request's tokens.

        Raises:
            KvasirError: it is refused or fails.
        """

    @abstractmethod
    async def _ended(self, message: worker_pb2.GenerateRequest, produced: Sequence[int]) -> None:
        """All tokens are out, and the engine has let go."""

    @asynccontextmanager
    async def opened(
        self, message: worker_pb2.GenerateRequest
    ) -> AsyncIterator[AsyncIterator[Delta | Done]]:
        """Admits a request; its outputs are deltas, then one Done.

        Raises:
            KvasirError: it is refused, fails, or is ended by its deadline or by a drain.
        """
        async with self._host.in_flight.scope(
            Work.GENERATE, request_id=message.request_id, timeout_ms=message.timeout_ms
        ) as scope:
            text = self._served()
            requests.check_generate(message, text.limits)
            async with aclosing(self._outputs(message, text, scope)) as outputs:
                yield outputs

    async def _outputs(
        self, message: worker_pb2.GenerateRequest, text: Text, scope: Scope
    ) -> AsyncGenerator[Delta | Done, None]:
        trace = Trace(
            prompt_tokens=len(message.token_ids),
            decode_worker=self._host.settings.name,
            num_resumed=len(message.resume_token_ids),
        )
        output = Output(message, text.tokenizer)
        produced = list(message.resume_token_ids)
        # 1. Resumed tokens may already be all there is.
        finish = output.finish or _finish_of_resumed(message, text.eos_token_ids)
        if finish is not None:
            yield output.feed(TokenEvent((), finish))
        else:
            # 2. Tokens, until the engine or a stop string ends them.
            async with aclosing(self._events(message, scope, trace)) as events:
                async for event in events:
                    delta = output.feed(event)
                    produced += delta.token_ids
                    trace.tokens_out(len(delta.token_ids))
                    yield delta
                    if output.finish is not None:
                        break
            finish = output.finish
            # 3. What is worth keeping goes to the KV tier.
            await self._ended(message, produced)
        assert finish is not None, "the engine ends every stream with a reason or an error"
        reason = _PROTO_FINISH[finish]
        scope.outcome = FINISH_NAMES[reason]
        trace.observe(self._host.metrics)
        yield Done(reason, trace.usage(), trace.stats())


class EngineGenerator(Generator):
    """Tokens of the bundled engine."""

    def __init__(self, host: Host, compute: Compute, handoff: Handoff, offers: Offers) -> None:
        super().__init__(host)
        self._compute = compute
        self._handoff = handoff
        self._offers = offers
        self._count = itertools.count(1)

    def _served(self) -> Serving:
        return self._host.served()

    async def _ended(self, message: worker_pb2.GenerateRequest, produced: Sequence[int]) -> None:
        await self._offers.ended(message, produced)

    def _is_prefilled_elsewhere(self, message: worker_pb2.GenerateRequest) -> bool:
        own_uid = self._host.address.uid
        return message.HasField("prefill_peer") and message.prefill_peer.uid != own_uid

    def _events(
        self, message: worker_pb2.GenerateRequest, scope: Scope, trace: Trace
    ) -> AsyncGenerator[TokenEvent, None]:
        self._offers.begun(message)
        request = self._engine_request(message, scope)
        if self._is_prefilled_elsewhere(message):
            return self._handoff.events(message, request, scope=scope, trace=trace)
        trace.prefill_worker = self._host.settings.name
        return self._computed_here(message, request, trace)

    async def _computed_here(
        self, message: worker_pb2.GenerateRequest, request: EngineRequest, trace: Trace
    ) -> AsyncGenerator[TokenEvent, None]:
        """Its events, once its turn has come."""
        async with (
            self._host.admission.turn(self._host.asked(message)) as turn,
            aclosing(
                self._compute.events(request, turn=turn, trace=trace, chunks=chunks_of(message))
            ) as events,
        ):
            async for event in events:
                yield event

    def _engine_request(self, message: worker_pb2.GenerateRequest, scope: Scope) -> EngineRequest:
        return EngineRequest(
            # unique here even if a router sends a request again before its first try is over
            request_id=f"{message.request_id}#{next(self._count)}",
            prompt=tuple(message.token_ids),
            sampling=engine_sampling(message.sampling),
            tenant_salt=names_salt(message),
            deadline_ms=scope.deadline_ms,
            resume_tokens=tuple(message.resume_token_ids),
        )


def _finish_of_resumed(
    message: worker_pb2.GenerateRequest, eos_token_ids: frozenset[int]
) -> FinishReason | None:
    resumed = message.resume_token_ids
    if resumed and resumed[-1] in stop_token_ids(message.sampling, eos_token_ids):
        return FinishReason.STOP
    return FinishReason.LENGTH if len(resumed) >= message.sampling.max_tokens else None
