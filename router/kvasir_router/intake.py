"""From what a client sent to a `Call`, whatever the protocol: tokens, limits, deadline."""

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import common_pb2, worker_pb2

from kvasir_router.chunks import Prompt, chunks_message, split_prompt
from kvasir_router.core.sessions import SessionTable, Urgency
from kvasir_router.membership.fleet import Fleet
from kvasir_router.settings import RouterSettings
from kvasir_router.tenants import Tenant
from kvasir_router.terms import Terms
from kvasir_router.upstream.call import Call

INLINE_CHARS_MAX = 4_096
"""Longer texts are tokenised in a thread: 4 KB take about 1 ms, and streams must not wait."""

TOKENISER_THREADS = 2
TOKENISER_QUEUE_MAX = 256
"""Long prompts that may wait for a thread: at 8 MiB each they hold 2 GiB."""


class TextModel(Protocol):
    """The model's tokenizer, as far as the router needs it."""

    context_length: int
    vocab_size: int

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant speaks."""

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation; its special tokens are in it."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and since when."""

    request_id: str
    tenant: Tenant
    arrived_ms: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a client asked for beside the prompt, checked field by field."""

    sampling: common_pb2.SamplingParams
    """Without max_tokens: it depends on the prompt."""

    max_tokens: int | None
    max_tokens_param: str
    prompt_param: str
    format: "worker_pb2.StreamFormat.ValueType"
    terms: Terms
    stream_id: str = ""


class Intake:
    """The one place where prompts become tokens."""

    def __init__(self, settings: RouterSettings, text: TextModel, fleet: Fleet) -> None:
        self._settings, self._text, self._fleet = settings, text, fleet
        self._sessions = SessionTable()
        self._num_waiting = 0
        self._pool = ThreadPoolExecutor(TOKENISER_THREADS, thread_name_prefix="tokenise")

    def close(self) -> None:
        """Ends the tokeniser threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def context_length(self) -> int:
        """Tokens, prompt and output together: what the model and every ready worker can hold."""
        return min(self._text.context_length, self._fleet.context_length() or 2**31)

    def check_model(self, name: str) -> None:
        """Raises UNKNOWN_MODEL unless it is the one served here."""
        if name != self._settings.model_name:
            raise KvasirError(
                Reason.UNKNOWN_MODEL, f"the model {name!r} does not exist", param="model"
            )

    async def encode(self, text: str, *, param: str, separator: str | None = None) -> Prompt:
        """A prompt's tokens; a separator sets its chunks apart."""
        _check_text(text, param=param)

        def encode() -> Prompt:
            if separator is None:
                return Prompt(tuple(self._text.encode(text)))
            return split_prompt(text, separator, self._part)

        return await self._off_loop(len(text), encode)

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, separator: str | None = None
    ) -> Prompt:
        """A conversation's tokens; a separator sets its chunks apart."""
        for index, message in enumerate(messages):
            _check_text(message["content"], param=f"messages[{index}].content")
        chars = sum(len(message["content"]) for message in messages)

        def encode() -> Prompt:
            if separator is None:
                return Prompt(tuple(self._text.encode_chat(messages)))
            text = self._text.apply_chat_template(messages)
            return split_prompt(text, separator, lambda part, _: self._part(part, False))

        return await self._off_loop(chars, encode)

    def _part(self, text: str, is_first: bool) -> list[int]:
        return self._text.encode(text, add_special_tokens=is_first)

    async def _off_loop(self, chars: int, encode: Callable[[], Prompt]) -> Prompt:
        if chars <= INLINE_CHARS_MAX:
            return encode()
        if self._num_waiting >= TOKENISER_QUEUE_MAX:
            message = "the router has too many long prompts to tokenise"
            raise KvasirError(Reason.OVERLOADED, message, retry_after_ms=1_000)
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, encode)
        finally:
            self._num_waiting -= 1

    def ids_prompt(self, token_ids: Sequence[int], *, param: str, separator: str | None) -> Prompt:
        """A prompt of ids.

        Raises:
            KvasirError: INVALID_REQUEST: the model does not have them, or chunks are to be in them.
        """
        self.check_ids(token_ids, param=param)
        if separator is not None:
            message = "chunk_separator needs a prompt of text, not of token ids"
            raise KvasirError(Reason.INVALID_REQUEST, message, param="chunk_separator")
        return Prompt(tuple(token_ids))

    def check_ids(self, token_ids: Sequence[int], *, param: str) -> None:
        """Raises INVALID_REQUEST for ids that the model does not have."""
        if any(not 0 <= token < self._text.vocab_size for token in token_ids):
            message = f"token ids must be from 0 to {self._text.vocab_size - 1}"
            raise KvasirError(Reason.INVALID_REQUEST, message, param=param)

    def call(self, prompt: Prompt, wanted: Wanted, caller: Caller) -> Call:
        """The request as the dispatcher takes it.

        Raises:
            KvasirError: CONTEXT_LENGTH, or an empty prompt.
        """
        sampling = common_pb2.SamplingParams()
        sampling.CopyFrom(wanted.sampling)
        sampling.max_tokens = self._max_tokens(len(prompt.token_ids), wanted)
        terms, timeout_ms_max = wanted.terms, self._settings.request_timeout_ms
        urgency = self._urgency(terms, caller)
        return Call(
            request_id=caller.request_id,
            token_ids=prompt.token_ids,
            chunks=chunks_message(prompt, terms.chunk_recompute),
            sampling=sampling,
            tenant_salt=caller.tenant.salt,
            tenant_weight=caller.tenant.weight,
            priority=(terms.priority or 0) + urgency.priority,
            format=wanted.format,
            stream_id=wanted.stream_id,
            created_s=int(time.time()),
            model=self._settings.model_name,
            ttft_slo_ms=urgency.ttft_slo_ms,
            tpot_slo_ms=terms.tpot_slo_ms or 0,
            arrived_ms=caller.arrived_ms,
            deadline_ms=caller.arrived_ms + min(terms.timeout_ms or timeout_ms_max, timeout_ms_max),
        )

    def _urgency(self, terms: Terms, caller: Caller) -> Urgency:
        """What the request's session makes of its SLO; a deadline alone is a session of one."""
        session_id = terms.session_id or caller.request_id
        slo_ms = terms.ttft_slo_ms or self._settings.ttft_slo_ms
        if terms.session_id is None and terms.deadline_ms is None:
            return Urgency(step=1, priority=0, ttft_slo_ms=slo_ms)
        return self._sessions.arrived(
            caller.tenant.salt + session_id.encode(),
            deadline_ms=terms.deadline_ms,
            ttft_slo_ms=slo_ms,
            now_ms=caller.arrived_ms,
        )

    def _max_tokens(self, num_prompt: int, wanted: Wanted) -> int:
        if num_prompt == 0:
            message = "the prompt is empty"
            raise KvasirError(Reason.INVALID_REQUEST, message, param=wanted.prompt_param)
        left = self.context_length - num_prompt
        if left < 1:
            raise KvasirError(
                Reason.CONTEXT_LENGTH,
                f"this model's maximum context length is {self.context_length} tokens; "
                f"the prompt has {num_prompt}",
                param=wanted.prompt_param,
            )
        if wanted.max_tokens is not None and wanted.max_tokens > left:
            raise KvasirError(
                Reason.CONTEXT_LENGTH,
                f"this model's maximum context length is {self.context_length} tokens; you asked "
                f"for {num_prompt + wanted.max_tokens}: {num_prompt} in the prompt and "
                f"{wanted.max_tokens} in the output",
                param=wanted.max_tokens_param,
            )
        return left if wanted.max_tokens is None else wanted.max_tokens


def random_seed() -> int:
    """A seed for a request that names none: a continuation must draw from the same one."""
    return secrets.randbits(64)


def _check_text(text: str, *, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = "the text holds half a surrogate pair"
        raise KvasirError(Reason.INVALID_REQUEST, message, param=param) from error
