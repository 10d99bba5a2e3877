"""Prompts of a wanted length in tokens, a wanted part of which all of them share.

Equal seeds give equal prompts. With the model's tokenizer the length is exact; without it words
are assumed to be one token each, and the server's own count is what the result shows.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TEXT = """
time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work government
number night point home water room mother area money story fact month lot right study book
eye job word business issue side kind head house service friend father power hour game line
"""
WORDS = _TEXT.split()
"""One token each in most vocabularies of English."""
WORDS_MAX = 4096
TRIES_MAX = 50


@dataclass(frozen=True, slots=True)
class PromptShape:
    """What prompts are wanted."""

    num_prompts: int
    num_tokens: int
    shared_ratio: float  # 0..1: leading part that all prompts share
    seed: int


class TokenCounter:
    """Counts tokens as the model does, and knows words that are one token."""

    def __init__(self, model: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        found = [
            token[1:] for token in self._tokenizer.get_vocab() if re.fullmatch("Ġ[a-z]{2,6}", token)
        ]
        self.words: Sequence[str] = sorted(found)[:WORDS_MAX] or WORDS

    def count(self, text: str) -> int:
        """Tokens of the text, with what the server adds in front."""
        return len(self._tokenizer.encode(text).ids)


def make_prompts(shape: PromptShape, counter: TokenCounter | None) -> list[str]:
    """The prompts, in the order in which they are sent."""
    source = random.Random(shape.seed)
    words = counter.words if counter else WORDS
    num_shared = round(shape.num_tokens * shape.shared_ratio)
    shared = [source.choice(words) for _ in range(num_shared)]
    prompts = []
    for _ in range(shape.num_prompts):
        own = [source.choice(words) for _ in range(shape.num_tokens - num_shared)]
        prompts.append(_fit(shared, own, shape.num_tokens, counter))
    return prompts


def _fit(shared: list[str], own: list[str], num_tokens: int, counter: TokenCounter | None) -> str:
    """The words as text; words are dropped or repeated at the end until the length is right."""
    text = " " + " ".join([*shared, *own])
    for _ in range(TRIES_MAX if counter else 0):
        assert counter is not None
        excess = counter.count(text) - num_tokens
        if excess == 0 or (excess > 0 and not own):
            break
        own = own[:-excess] if excess > 0 else own + (own or shared)[:-excess]
        text = " " + " ".join([*shared, *own])
    return text
