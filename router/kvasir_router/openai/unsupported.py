"""Parameters of the OpenAI API that Kvasir does not serve: refused by name, never ignored.

Each has the values that ask for nothing and are therefore accepted.
"""

from typing import Any

from kvasir_proto.errors import KvasirError, Reason

NOTHING: tuple[Any, ...] = (None,)

NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none"),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "response_format": (None, {"type": "text"}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
    "echo": (None, False),
    "modalities": (None, ["text"]),
    "audio": NOTHING,
    "prediction": NOTHING,
    "reasoning_effort": NOTHING,
    "verbosity": NOTHING,
    "web_search_options": NOTHING,
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "metadata": (None, {}),
}


def strip_neutral(body: dict[str, Any]) -> dict[str, Any]:
    """The body without parameters that ask for nothing.

    Raises:
        KvasirError: UNSUPPORTED, naming the first parameter that asks for something.
    """
    for param in body.keys() & NEUTRAL_VALUES.keys():
        if not any(_same(body[param], neutral) for neutral in NEUTRAL_VALUES[param]):
            raise KvasirError(Reason.UNSUPPORTED, _message(param), param=param)
    return {param: value for param, value in body.items() if param not in NEUTRAL_VALUES}


def _message(param: str) -> str:
    if param == "n":
        return "only n=1 is supported"
    return f"the parameter {param!r} is not supported, or not with this value"


def _same(value: Any, neutral: Any) -> bool:
    """Equality that tells 0 from false, as JSON does."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)
