"""What reuse of chunks saves, and what it costs: time to the first token, and agreement.

Prompts are generated: documents about invented buildings, and a question about one of them. Each is
computed whole, and blended of its documents at every share of recomputation, one after the other,
so that a slow second of a shared machine falls on all. Agreement is measured along the whole
prompt's own greedy answer: at each of its tokens, whether the blended prompt would go on likewise,
and how far its distribution is off. Decides what is measured; showing it is left to the caller.
"""

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from kvasir_kvstore.core.block import BLOCK_TOKENS

from kvasir_engine.blend import Blend, Part, run_blend
from kvasir_engine.model import LoadedModel, load_model, new_kv_arrays
from kvasir_engine.text import Tokenizer

SEED = 7
STEP_TOKENS = 512
ANSWER_TOKENS = 32
QUESTION = "Who built the {name}, and when? Answer in one short sentence."
PLACES = ("Harlow", "Calder", "Dunmore", "Eskdale", "Glenrock", "Hythe", "Kelso", "Morpeth")
KINDS = ("lighthouse", "observatory", "library", "bridge", "museum", "theatre", "mill", "tower")
PEOPLE = ("Ada Bennett", "Carl Dietrich", "Elena Fuentes", "George Hale", "Maya Nair")


@dataclass(frozen=True, slots=True)
class ChunkBenchSettings:
    """What to measure."""

    model_dir: Path
    num_threads: int = 2
    num_prompts: int = 6
    num_chunks: int = 8
    permilles: tuple[int, ...] = (50, 150, 300)
    """Shares of a chunk's tokens that are computed again."""


@dataclass(frozen=True, slots=True)
class RagPrompt:
    """Token ids of what stands before the documents, of each of them, and of the question."""

    head: list[int]
    chunks: list[list[int]]
    question: list[int]

    @property
    def blended(self) -> list[int]:
        """Up to the end of the last document."""
        return [*self.head, *(token for chunk in self.chunks for token in chunk)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One prompt, blended at one share."""

    ttft_s: float
    agreement: float
    """Of the tokens of the exact answer."""
    divergence: float
    """Mean Kullback-Leibler divergence from the exact distributions, in nats."""


def run_bench_chunks(
    settings: ChunkBenchSettings, progress: Callable[[str, int, int], None] | None = None
) -> dict[str, Any]:
    """Measure and return a JSON-ready result. Raises KvasirError for a model that does not load.

    `progress` is called with ("measure", prompts done, prompts).
    """
    model = load_model(settings.model_dir, num_threads=settings.num_threads)
    tokenizer = Tokenizer.load(settings.model_dir)
    source = random.Random(SEED)
    outcomes: dict[int, list[Outcome]] = {permille: [] for permille in settings.permilles}
    exact_s, alone_s, lengths = [], [], []
    for done in range(settings.num_prompts):
        prompt = make_prompt(tokenizer, source, num_chunks=settings.num_chunks)
        measured = _Measured(model, prompt)
        exact_s.append(measured.exact())
        alone_s.append(measured.chunks_alone())
        lengths.append(len(measured.token_ids))
        for permille in settings.permilles:
            outcomes[permille].append(measured.blended(permille))
        if progress is not None:
            progress("measure", done + 1, settings.num_prompts)
    return {
        "bench": "chunks",
        "settings": {**asdict(settings), "model_dir": str(settings.model_dir)},
        "isa": model.native.isa,
        "prompt_tokens": round(mean(lengths)),
        "exact_ttft_s": round(median(exact_s), 4),
        "chunks_alone_s": round(median(alone_s), 4),
        "rows": [_row(permille, outcomes[permille], exact_s) for permille in outcomes],
    }


def _row(permille: int, outcomes: Sequence[Outcome], exact_s: Sequence[float]) -> dict[str, Any]:
    ratios = [own / o.ttft_s for own, o in zip(exact_s, outcomes, strict=True)]
    return {
        "recompute": permille / 1000,
        "ttft_s": round(median(o.ttft_s for o in outcomes), 4),
        "times_faster": round(median(ratios), 2),
        "agreement": round(mean(o.agreement for o in outcomes), 4),
        "divergence": round(mean(o.divergence for o in outcomes), 4),
    }


def make_prompt(tokenizer: Tokenizer, source: random.Random, *, num_chunks: int) -> RagPrompt:
    """Documents of about 140 tokens, and a question about one of them."""
    names = [f"{place} {kind}" for place in PLACES for kind in KINDS]
    chosen = source.sample(names, num_chunks)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    question = QUESTION.format(name=source.choice(chosen))
    messages = [{"role": "user", "content": f"Documents:\n\n|Question: {question}"}]
    head, rest = tokenizer.apply_chat_template(messages).split("|Question:")
    return RagPrompt(
        encode(head),
        [encode(_document(name, source)) for name in chosen],
        encode("Question:" + rest),
    )


def _document(name: str, source: random.Random) -> str:
    year = source.randint(1720, 1935)
    facts = [
        f"It is {source.randint(11, 99)} metres high with {source.choice(['red', 'blue'])} walls.",
        f"Every year about {source.randint(20, 900)} thousand people visit it.",
        f"In {year + source.randint(5, 40)} a storm damaged its roof, and the town paid for it.",
        f"Its first keeper was {source.choice(PEOPLE)}, who lived there for many years.",
        f"A small garden with {source.choice(['roses', 'tulips', 'oaks'])} surrounds the building.",
        f"Today the {name} belongs to the {source.choice(['county', 'state', 'university'])}.",
        f"{source.choice(PEOPLE)} wrote a famous poem here in {year + source.randint(41, 60)}.",
        f"Its bell weighs {source.randint(200, 4000)} kilograms and rings at noon.",
    ]
    source.shuffle(facts)
    return f"The {name} was built in {year} by {source.choice(PEOPLE)}. {' '.join(facts)}\n\n"


class _Measured:
    """One prompt in KV memory of its own: exact, blended, and its chunks."""

    def __init__(self, model: LoadedModel, prompt: RagPrompt) -> None:
        self._model = model
        self._prompt = prompt
        self.token_ids = [*prompt.blended, *prompt.question]
        width = -(-(len(self.token_ids) + ANSWER_TOKENS) // BLOCK_TOKENS)
        sizes = [len(chunk) // BLOCK_TOKENS for chunk in prompt.chunks]
        bounds = np.cumsum([0, width, width, *sizes])
        new_kv_arrays(model, int(bounds[-1]))
        self._exact, self._target, *self._sources = (
            np.arange(start, end, dtype=np.int32) for start, end in itertools.pairwise(bounds)
        )
        self._answer: list[int] = []
        self._expected = np.empty(0, np.float32)

    def exact(self) -> float:
        """Computes the prompt whole, and its answer; seconds to the first token."""
        started_s = time.perf_counter()
        logits = self._compute(self.token_ids, 0, self._exact)
        elapsed_s = time.perf_counter() - started_s
        while len(self._answer) < ANSWER_TOKENS - 1:
            self._answer.append(int(logits[-1].argmax()))
            known = [*self.token_ids, *self._answer]
            logits = self._compute(known, len(known) - 1, self._exact)
        self._expected = self._follow(self._exact)
        return elapsed_s

    def chunks_alone(self) -> float:
        """Computes every chunk by itself; seconds."""
        started_s = time.perf_counter()
        for chunk, blocks in zip(self._prompt.chunks, self._sources, strict=True):
            self._compute(chunk[: len(blocks) * BLOCK_TOKENS], 0, blocks)
        return time.perf_counter() - started_s

    def blended(self, permille: int) -> Outcome:
        """Blends the prompt of chunks that are here."""
        started_s = time.perf_counter()
        end = len(self._prompt.blended) // BLOCK_TOKENS * BLOCK_TOKENS
        blend = Blend(
            np.array(self.token_ids[:end], np.int32),
            self._target[: end // BLOCK_TOKENS],
            0,
            self._parts(end),
            permille,
        )
        for _ in run_blend(self._model.native, self._model.config, blend, tokens_max=STEP_TOKENS):
            pass
        self._compute(self.token_ids, end, self._target)
        elapsed_s = time.perf_counter() - started_s
        logits = self._follow(self._target)
        agreement = (logits.argmax(axis=1) == self._expected.argmax(axis=1)).mean()
        return Outcome(elapsed_s, float(agreement), divergence(self._expected, logits))

    def _parts(self, end: int) -> tuple[Part, ...]:
        parts, first = [], len(self._prompt.head)
        for chunk, blocks in zip(self._prompt.chunks, self._sources, strict=True):
            count = min(len(blocks) * BLOCK_TOKENS, end - first)
            if count > 0:
                parts.append(Part(first, count, tuple(blocks.tolist()), 0, is_exact=False))
            first += len(chunk)
        return tuple(parts)

    def _follow(self, table: np.ndarray) -> np.ndarray:
        """Logits after the prompt and after each token of the answer."""
        known = [*self.token_ids, *self._answer]
        return self._compute(known, len(self.token_ids) - 1, table, wants_all=True)

    def _compute(
        self, token_ids: Sequence[int], start: int, table: np.ndarray, *, wants_all: bool = False
    ) -> np.ndarray:
        """Logits after the last token, or after each, from `start` on."""
        vocab_size = self._model.config.vocab_size
        for first in range(start, len(token_ids), STEP_TOKENS):
            ids = np.array(token_ids[first : first + STEP_TOKENS], np.int32)
            rows = np.arange(len(ids), dtype=np.int32)[0 if wants_all else -1 :]
            logits = np.empty((len(rows), vocab_size), np.float32)
            self._model.native.forward(
                token_ids=ids,
                positions=np.arange(first, first + len(ids), dtype=np.int32),
                seq_token_counts=np.array([len(ids)], np.int32),
                block_tables=table[None],
                output_rows=rows,
                logits=logits,
                completes=np.empty(0, np.int32),
                arrived=np.empty(0, np.int32),
            )
        return logits


def divergence(expected: np.ndarray, logits: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of rows of logits from those expected, in nats."""
    p, q = _log_softmax(expected), _log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    totals = np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return np.asarray(shifted - totals)
