"""Request traces made to measure: conversations, agents, RAG, and a mix of them, with bursts.

A prompt is what a session has seen so far and something new, so that its blocks follow from what
its tokens are: a block is shared by all prompts that agree up to its end. Sessions begin at random
(exponential gaps, more of them in bursts); their later requests follow after the pauses of their
kind. With `lengths`, arrivals and token counts are those of a given trace, and only the sharing is
made up. The same settings give the same trace.

Shapes follow what has been published: turns and reuse of conversations and agents as in Mooncake
(FAST 25, section 4) and "KVCache Cache in the Wild" (ATC 25); document popularity by Zipf's law as
in RAGCache (2404.12457); bursts as in BurstGPT (2401.17644).
"""

import bisect
import heapq
import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from kvasir_sim.readers import load_trace
from kvasir_sim.trace import BLOCK_TOKENS

Kind = Literal["conversations", "agents", "rag", "mixed"]

TURNS_MEAN = 5
"""Of a conversation."""

STEPS_MEAN = 12
"""Of an agent."""

SESSION_IDLE_MS_MAX = 900_000.0
"""With `lengths`: a conversation that was silent this long does not go on."""


class GenerateSettings(BaseModel):
    """What a generated trace is like."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind = "conversations"
    """Conversations (growing history, pauses of a human), agents (many steps over one long prompt,
    short pauses), rag (documents by Zipf's law before a short question), or a third of each."""

    requests: int = Field(default=4_000, ge=1)
    """Requests of the trace."""

    rate: float = Field(default=9.0, gt=0)
    """Mean requests per second."""

    seed: int = 1
    """The same seed gives the same trace."""

    prompts: int = Field(default=16, ge=1)
    """Different system prompts, tool sets or collections, by Zipf's law."""

    documents: int = Field(default=2_000, ge=1)
    """Different documents of rag."""

    zipf: float = Field(default=1.0, ge=0)
    """Exponent of Zipf's law: 0 is uniform."""

    max_input: int = Field(default=20_480, ge=BLOCK_TOKENS)
    """A session ends before its prompt would become longer."""

    burst_factor: float = Field(default=1.0, ge=1)
    """Sessions begin this many times as often in a burst as between bursts; 1: no bursts."""

    burst_s: float = Field(default=10.0, gt=0)
    """Mean length of a burst; bursts take a tenth of the time."""

    lengths: Path | None = None
    """A trace (Azure, BurstGPT, Mooncake) whose arrivals and lengths are taken as they are."""

    continued: float = Field(default=0.6, ge=0, le=1)
    """With lengths: share of the requests that go on with a conversation, where one fits."""


class Blocks:
    """Gives out block ids, each once."""

    def __init__(self) -> None:
        self._next = itertools.count()

    def new(self, count: int) -> tuple[int, ...]:
        """Ids never given before."""
        return tuple(itertools.islice(self._next, count))


@dataclass(frozen=True, slots=True)
class Text:
    """A text, by its length and the ids of its full blocks."""

    tokens: int = 0
    full: tuple[int, ...] = ()

    def then(self, tokens: int, blocks: Blocks) -> "Text":
        """This text and something new after it."""
        length = self.tokens + tokens
        return Text(length, self.full + blocks.new(length // BLOCK_TOKENS - len(self.full)))

    def ids(self, blocks: Blocks) -> list[int]:
        """Those of a prompt with this text: its last block, if not full, is its own."""
        return [*self.full, *blocks.new(1 if self.tokens % BLOCK_TOKENS else 0)]


@dataclass(frozen=True, slots=True)
class Step:
    """One request of a session."""

    pause_ms: float
    """After the session's last request."""
    prompt: Text
    output_tokens: int


Session = Iterator[Step]


class Library:
    """What sessions share: system prompts and documents, and how popular each is."""

    def __init__(self, settings: GenerateSettings, rng: random.Random) -> None:
        self.blocks = Blocks()
        self._rng = rng
        self._prompts = [
            Text().then(_tokens(rng, 1_500, spread=0.6), self.blocks)
            for _ in range(settings.prompts)
        ]
        self._tools = [
            Text().then(_tokens(rng, 4_000, spread=0.5), self.blocks)
            for _ in range(settings.prompts)
        ]
        instructions = Text().then(700, self.blocks)
        self._documents = [
            instructions.then(_tokens(rng, 4_000, spread=0.7), self.blocks)
            for _ in range(settings.documents if settings.kind in ("rag", "mixed") else 1)
        ]
        self._weights = {
            size: list(itertools.accumulate(1 / rank**settings.zipf for rank in range(1, size + 1)))
            for size in (settings.prompts, len(self._documents))
        }

    def prompt(self) -> Text:
        """The system prompt of a conversation."""
        return self._pick(self._prompts)

    def tools(self) -> Text:
        """The system prompt of an agent, with its tools."""
        return self._pick(self._tools)

    def document(self) -> Text:
        """A document, after the instructions that all have."""
        return self._pick(self._documents)

    def _pick(self, texts: list[Text]) -> Text:
        return self._rng.choices(texts, cum_weights=self._weights[len(texts)])[0]


def generate(settings: GenerateSettings) -> list[dict[str, object]]:
    """The rows of a trace in Mooncake's format, in order of arrival.

    Raises:
        OSError: `lengths` cannot be read.
        ValueError: `lengths` is malformed.
    """
    rng = random.Random(settings.seed)
    library = Library(settings, rng)
    if settings.lengths is not None:
        return list(_with_lengths(settings, settings.lengths, library, rng))
    return list(itertools.islice(_from_sessions(settings, library, rng), settings.requests))


def write_trace(rows: list[dict[str, object]], path: Path) -> None:
    """One row per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def conversation(library: Library, rng: random.Random) -> Session:
    """A human asks, reads the answer and asks again."""
    text, pause_ms = library.prompt(), 0.0
    for _ in range(_geometric(rng, mean=TURNS_MEAN)):
        text = text.then(_tokens(rng, 250, spread=1.2), library.blocks)
        output_tokens = _tokens(rng, 250, spread=0.8)
        yield Step(pause_ms, text, output_tokens)
        text = text.then(output_tokens, library.blocks)
        pause_ms = 8_000 + rng.expovariate(1 / 40_000) + 25 * output_tokens


def agent(library: Library, rng: random.Random) -> Session:
    """A model calls a tool, reads its result and calls the next."""
    text, pause_ms = library.tools().then(_tokens(rng, 300, spread=0.8), library.blocks), 0.0
    for _ in range(_geometric(rng, mean=STEPS_MEAN)):
        output_tokens = _tokens(rng, 120, spread=0.7)
        yield Step(pause_ms, text, output_tokens)
        result_tokens = _tokens(rng, 600, spread=1.0)
        text = text.then(output_tokens + result_tokens, library.blocks)
        pause_ms = 500 + rng.expovariate(1 / 2_500) + 25 * output_tokens


def question(library: Library, rng: random.Random) -> Session:
    """A question after a document."""
    prompt = library.document().then(_tokens(rng, 80, spread=0.8), library.blocks)
    yield Step(0.0, prompt, _tokens(rng, 200, spread=0.7))


SessionKind = tuple[Callable[[Library, random.Random], Session], int]

KINDS: dict[str, tuple[SessionKind, ...]] = {
    "conversations": ((conversation, TURNS_MEAN),),
    "agents": ((agent, STEPS_MEAN),),
    "rag": ((question, 1),),
    "mixed": ((conversation, TURNS_MEAN), (agent, STEPS_MEAN), (question, 1)),
}
"""What begins a session, and the mean of its requests: of a mix, each makes an equal share."""


def _from_sessions(
    settings: GenerateSettings, library: Library, rng: random.Random
) -> Iterator[dict[str, object]]:
    kinds = [kind for kind, _ in KINDS[settings.kind]]
    shares = [1 / requests_mean for _, requests_mean in KINDS[settings.kind]]
    sessions_per_s = settings.rate * sum(shares) / len(kinds)
    starts = _starts(settings, sessions_per_s, rng)
    number = itertools.count()
    due: list[tuple[float, int, Session, Step | None]] = []
    heapq.heappush(due, (next(starts), next(number), iter(()), None))
    while True:
        now_ms, key, session, step = heapq.heappop(due)
        if step is None:  # a session begins
            key = next(number)
            session = rng.choices(kinds, shares)[0](library, rng)
            heapq.heappush(due, (next(starts), next(number), iter(()), None))
        else:
            yield _row(now_ms, step.prompt, step.output_tokens, f"s{key}", library.blocks)
        following = next(session, None)
        if following is not None and following.prompt.tokens <= settings.max_input:
            heapq.heappush(due, (now_ms + following.pause_ms, key, session, following))


def _starts(
    settings: GenerateSettings, sessions_per_s: float, rng: random.Random
) -> Iterator[float]:
    """When sessions begin: a Poisson process whose rate is higher in a tenth of the time."""
    calm_per_ms = sessions_per_s / 1_000 / (0.9 + 0.1 * settings.burst_factor)
    now_ms, is_burst, turn_ms = 0.0, False, 0.0
    while True:
        if now_ms >= turn_ms:
            is_burst = not is_burst and settings.burst_factor > 1 and turn_ms > 0
            mean_ms = settings.burst_s * 1_000 * (1 if is_burst else 9)
            turn_ms = now_ms + rng.expovariate(1 / mean_ms)
        gap_ms = rng.expovariate(calm_per_ms * (settings.burst_factor if is_burst else 1))
        if now_ms + gap_ms > turn_ms:  # the rate changes first; gaps have no memory
            now_ms = turn_ms
            continue
        now_ms += gap_ms
        yield now_ms


def _with_lengths(
    settings: GenerateSettings, path: Path, library: Library, rng: random.Random
) -> Iterator[dict[str, object]]:
    """Each request goes on with the longest open conversation that fits into it, or begins one."""
    open_texts: list[tuple[int, float, str, Text]] = []  # by length
    given = load_trace(path, max_input=settings.max_input, count=settings.requests)
    for number, request in enumerate(given):
        session, text = f"s{number}", library.prompt()
        at = bisect.bisect_right(open_texts, (request.input_tokens,))
        if at and rng.random() < settings.continued:
            _, last_ms, found, history = open_texts.pop(at - 1)
            if request.arrival_ms - last_ms <= SESSION_IDLE_MS_MAX:
                session, text = found, history
        prompt = _ending_at(text, request.input_tokens, library.blocks)
        arrival_ms = request.arrival_ms - given[0].arrival_ms
        yield _row(arrival_ms, prompt, request.output_tokens, session, library.blocks)
        after = prompt.then(request.output_tokens, library.blocks)
        bisect.insort(open_texts, (after.tokens, request.arrival_ms, session, after))


def _ending_at(text: Text, tokens: int, blocks: Blocks) -> Text:
    """The text, cut or continued to this length."""
    if text.tokens <= tokens:
        return text.then(tokens - text.tokens, blocks)
    return Text(tokens, text.full[: tokens // BLOCK_TOKENS])


def _row(
    arrival_ms: float, prompt: Text, output_tokens: int, session: str, blocks: Blocks
) -> dict[str, object]:
    return {
        "timestamp": round(arrival_ms, 3),
        "input_length": prompt.tokens,
        "output_length": output_tokens,
        "hash_ids": prompt.ids(blocks),
        "session": session,
    }


def _tokens(rng: random.Random, median: float, *, spread: float) -> int:
    """Log-normal; lengths of texts are."""
    return max(1, round(median * rng.lognormvariate(0.0, spread)))


def _geometric(rng: random.Random, *, mean: float) -> int:
    count = 1
    while rng.random() > 1 / mean:
        count += 1
    return count
