"""Bodies of the OpenAI API as far as Kvasir serves them: types and ranges of every field.

Parameters that exist there but are not served are refused in `unsupported`, before these models
see the body. Source: platform.openai.com/docs/api-reference.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from kvasir_router.terms import Terms

STOP_MAX = 4
STOP_CHARS_MAX = 256
MESSAGES_MAX = 4_096

Role = Literal["system", "developer", "user", "assistant"]


def _text_of(content: Any) -> str:
    """A message's content: a string, or parts of type text."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list):
        raise PydanticCustomError("content", "must be a string or a list of content parts")
    return "".join(_text_of_part(part) for part in content)


def _text_of_part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise PydanticCustomError(
            "content_part", "content parts of type {kind} are not supported", {"kind": repr(kind)}
        )
    if not isinstance(part.get("text"), str):
        raise PydanticCustomError("content_part", "a text part needs a string `text`")
    return str(part["text"])


def _stops_of(stop: Any) -> Any:
    if stop is None:
        return []
    return [stop] if isinstance(stop, str) else stop


def _prompt_of(prompt: Any) -> Any:
    """A string or token ids; a list of one prompt is that prompt."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise PydanticCustomError("prompt", "must be a string or a list of token ids")
    if any(isinstance(part, str | list) for part in prompt):
        raise PydanticCustomError("prompt", "only one prompt per request is supported")
    if any(type(part) is not int for part in prompt):
        raise PydanticCustomError("prompt", "must be a string or a list of token ids")
    return prompt


Stop = Annotated[str, Field(min_length=1, max_length=STOP_CHARS_MAX)]


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Role
    content: Annotated[str, BeforeValidator(_text_of)]

    def for_template(self) -> dict[str, str]:
        """What chat templates know: `developer` is the newer name of `system`."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content}


class StreamOptions(BaseModel):
    """Options that need `stream`."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None


class Body(Terms):
    """What both kinds of completion share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: Annotated[list[Stop], BeforeValidator(_stops_of)] = Field(
        default_factory=list, max_length=STOP_MAX
    )
    user: str | None = None
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    """Extension: 0 and -1 mean all."""

    ignore_eos: bool | None = None
    """Extension: go on to max_tokens."""

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MESSAGES_MAX)
    max_completion_tokens: int | None = Field(default=None, ge=1)


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: Annotated[str | list[int], BeforeValidator(_prompt_of)]
