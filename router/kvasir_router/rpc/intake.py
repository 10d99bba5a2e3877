"""An InferenceRequest to a `Call`: the checks of HTTP, with this message's field names."""

import math
from typing import get_args

from kvasir_proto.errors import KvasirError, Reason
from kvasir_proto.v1 import common_pb2, inference_pb2, worker_pb2
from pydantic import ValidationError

from kvasir_router.chunks import Prompt
from kvasir_router.intake import Caller, Intake, Wanted, random_seed
from kvasir_router.openai.errors import from_validation
from kvasir_router.openai.schema import STOP_CHARS_MAX, STOP_MAX, Message, Role
from kvasir_router.terms import Terms
from kvasir_router.upstream.call import Call

TEMPERATURE_MAX = 2.0


async def call_of(request: inference_pb2.InferenceRequest, intake: Intake, caller: Caller) -> Call:
    """Raises KvasirError naming the field."""
    intake.check_model(request.model)
    kind = request.WhichOneof("input")
    intake.check_ids(request.sampling.stop_token_ids, param="sampling.stop_token_ids")
    terms = _terms(request)
    wanted = Wanted(
        sampling=_sampling(request.sampling),
        max_tokens=request.sampling.max_tokens or None,
        max_tokens_param="sampling.max_tokens",
        prompt_param=kind or "input",
        format=worker_pb2.STREAM_FORMAT_GRPC,
        terms=terms,
    )
    prompt = await _prompt(request, intake, separator=terms.chunk_separator)
    return intake.call(prompt, wanted, caller)


def _terms(request: inference_pb2.InferenceRequest) -> Terms:
    """Protobuf cannot tell 0 from absence, and here both mean the default."""
    values = {field: getattr(request, field) or None for field in Terms.model_fields}
    try:
        return Terms.model_validate(values)
    except ValidationError as error:
        raise from_validation(error) from None


async def _prompt(
    request: inference_pb2.InferenceRequest, intake: Intake, *, separator: str | None
) -> Prompt:
    match request.WhichOneof("input"):
        case "prompt":
            return await intake.encode(request.prompt, param="prompt", separator=separator)
        case "tokens":
            return intake.ids_prompt(request.tokens.ids, param="tokens.ids", separator=separator)
        case "chat":
            return await intake.encode_chat(_messages(request.chat), separator=separator)
        case _:
            message = "one of prompt, tokens and chat is needed"
            raise KvasirError(Reason.INVALID_REQUEST, message, param="input")


def _messages(chat: inference_pb2.ChatMessages) -> list[dict[str, str]]:
    """The conversation as chat templates know it."""
    if not chat.messages:
        raise KvasirError(Reason.INVALID_REQUEST, "no messages", param="chat.messages")
    roles = get_args(Role)
    for index, message in enumerate(chat.messages):
        if message.role not in roles:
            param = f"chat.messages[{index}].role"
            text = f"{param} must be one of {', '.join(roles)}"
            raise KvasirError(Reason.INVALID_REQUEST, text, param=param)
    plain = ({"role": m.role, "content": m.content} for m in chat.messages)
    return [Message.model_validate(message).for_template() for message in plain]


def _sampling(asked: common_pb2.SamplingParams) -> common_pb2.SamplingParams:
    """Checked, with defaults for what protobuf cannot tell from 0: greedy, all of top_p."""
    if not math.isfinite(asked.temperature) or not 0 <= asked.temperature <= TEMPERATURE_MAX:
        raise _out_of_range("temperature", "from 0 to 2")
    if not 0 <= asked.top_p <= 1:
        raise _out_of_range("top_p", "above 0 and at most 1")
    if len(asked.stop) > STOP_MAX or any(not 0 < len(s) <= STOP_CHARS_MAX for s in asked.stop):
        raise _out_of_range("stop", f"at most {STOP_MAX} strings of 1 to {STOP_CHARS_MAX}")
    sampling = common_pb2.SamplingParams()
    sampling.CopyFrom(asked)
    sampling.top_p = asked.top_p or 1.0
    sampling.seed = asked.seed or random_seed()
    return sampling


def _out_of_range(field: str, wanted: str) -> KvasirError:
    param = f"sampling.{field}"
    return KvasirError(Reason.INVALID_REQUEST, f"{param} must be {wanted}", param=param)
