"""From the body of an OpenAI request to a `Call`: one way for the HTTP API and endpoint pickers."""

import secrets
from collections.abc import Mapping

from kvasir_proto.v1 import common_pb2, worker_pb2

from kvasir_router.chunks import Prompt
from kvasir_router.intake import Caller, Intake, Wanted, random_seed
from kvasir_router.openai.schema import Body, ChatBody, CompletionBody
from kvasir_router.terms import with_headers
from kvasir_router.upstream.call import Call

COMPLETION_TOKENS_DEFAULT = 16
"""OpenAI's default for /v1/completions; chat has none."""


class OpenAiCalls:
    """Bodies to calls."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    async def call_of(self, body: Body, headers: Mapping[str, str], caller: Caller) -> Call:
        """The call that a body asks for; `headers` are looked up in lower case.

        Raises:
            KvasirError: it asks for what the model cannot do.
        """
        self._intake.check_model(body.model)
        if isinstance(body, ChatBody):
            return await self._chat(body, headers, caller)
        assert isinstance(body, CompletionBody), type(body)
        wanted = _wanted(
            body,
            max_tokens=body.max_tokens or COMPLETION_TOKENS_DEFAULT,
            max_tokens_param="max_tokens",
            prompt_param="prompt",
            headers=headers,
        )
        prompt = await self._prompt(body.prompt, separator=wanted.terms.chunk_separator)
        return self._intake.call(prompt, wanted, caller)

    async def _chat(self, body: ChatBody, headers: Mapping[str, str], caller: Caller) -> Call:
        messages = [message.for_template() for message in body.messages]
        asked = body.max_completion_tokens
        wanted = _wanted(
            body,
            max_tokens=body.max_tokens if asked is None else asked,
            max_tokens_param="max_tokens" if asked is None else "max_completion_tokens",
            prompt_param="messages",
            headers=headers,
        )
        prompt = await self._intake.encode_chat(messages, separator=wanted.terms.chunk_separator)
        return self._intake.call(prompt, wanted, caller)

    async def _prompt(self, prompt: str | list[int], *, separator: str | None) -> Prompt:
        if isinstance(prompt, str):
            return await self._intake.encode(prompt, param="prompt", separator=separator)
        return self._intake.ids_prompt(prompt, param="prompt", separator=separator)


def _wanted(
    body: Body,
    *,
    max_tokens: int | None,
    max_tokens_param: str,
    prompt_param: str,
    headers: Mapping[str, str],
) -> Wanted:
    is_chat = isinstance(body, ChatBody)
    streamed = (
        worker_pb2.STREAM_FORMAT_OPENAI_CHAT
        if is_chat
        else worker_pb2.STREAM_FORMAT_OPENAI_COMPLETION
    )
    return Wanted(
        sampling=sampling_of(body),
        max_tokens=max_tokens,
        max_tokens_param=max_tokens_param,
        prompt_param=prompt_param,
        terms=with_headers(body, headers),
        format=streamed if body.stream else worker_pb2.STREAM_FORMAT_TEXT,
        stream_id=f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
    )


def sampling_of(body: Body) -> common_pb2.SamplingParams:
    """Sampling as the engine takes it, OpenAI's defaults filled in."""
    return common_pb2.SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=random_seed() if body.seed is None else body.seed % 2**64,
        stop=body.stop,
        ignore_eos=bool(body.ignore_eos),
    )
