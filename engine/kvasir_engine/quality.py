"""What quantisation costs: perplexity of one text under formats of weights and KV.

Decides how a text is cut and scored. Invariant: every format scores the same tokens after the same
contexts, so that differences are the format's. Texts and how results are shown are the caller's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from kvasir_proto.errors import KvasirError, Reason

from kvasir_engine.config import read_config
from kvasir_engine.formats import KvFormat, WeightFormat
from kvasir_engine.logits import sequence_logits
from kvasir_engine.model import LoadedModel, load_model
from kvasir_engine.text import Tokenizer
from kvasir_engine.weights import Progress

WINDOW_TOKENS = 512
"""Each window is a sequence of its own; its first token is not scored."""
LICENCES = Path("/usr/share/common-licenses")
"""English text that every Debian carries."""


@dataclass(frozen=True, slots=True)
class Formats:
    """How weights and KV are kept."""

    weights: WeightFormat = "bf16"
    kv: KvFormat = "bf16"


@dataclass(frozen=True, slots=True)
class QualityRow:
    """Perplexity under one pair of formats, and its change against bf16 for both."""

    weights: WeightFormat
    kv: KvFormat
    perplexity: float
    change: float
    """0.01: one per cent more than bf16."""


PLAIN = Formats()
ALL_FORMATS = (
    PLAIN,
    Formats(kv="int8"),
    Formats(weights="int8"),
    Formats(weights="int4"),
    Formats(weights="int8", kv="int8"),
    Formats(weights="int4", kv="int8"),
)


def run_quality(
    model_dir: Path,
    ids: np.ndarray,
    *,
    formats: Sequence[Formats] = ALL_FORMATS,
    num_threads: int,
    progress: Progress | None = None,
) -> list[QualityRow]:
    """A row for bf16, then one for each of the other formats.

    `progress` is called with ("measure", tokens done, tokens in all). Raises KvasirError for a
    model that cannot be loaded.
    """
    others = [one for one in formats if one != PLAIN]
    total, values = (1 + len(others)) * len(ids), []
    for index, one in enumerate((PLAIN, *others)):
        model = load_model(model_dir, num_threads=num_threads, weights=one.weights, kv=one.kv)

        def report(done: int, start: int = index * len(ids)) -> None:
            if progress is not None:
                progress("measure", start + done, total)

        values.append(perplexity(model, ids, report))
    return [
        QualityRow(one.weights, one.kv, value, value / values[0] - 1)
        for one, value in zip((PLAIN, *others), values, strict=True)
    ]


def whole_window(model: LoadedModel, window: np.ndarray) -> np.ndarray:
    """Logits of one window, in one step."""
    return sequence_logits(model, window, chunk=len(window))


def perplexity(
    model: LoadedModel,
    ids: np.ndarray,
    progress: Callable[[int], None] = lambda _: None,
    logits_of: Callable[[LoadedModel, np.ndarray], np.ndarray] = whole_window,
) -> float:
    """exp of the mean negative log-likelihood of all tokens but the first of each window."""
    loss, num_scored = 0.0, 0
    for start in range(0, len(ids), WINDOW_TOKENS):
        window = ids[start : start + WINDOW_TOKENS]
        logits = logits_of(model, window)[:-1]
        top = logits.max(axis=1)
        totals = np.log(np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64)) + top
        loss += float((totals - logits[np.arange(len(window) - 1), window[1:]]).sum())
        num_scored += len(window) - 1
        progress(start + len(window))
    return float(np.exp(loss / num_scored))


def text_ids(model_dir: Path, files: Sequence[Path], num_tokens: int) -> np.ndarray:
    """Whole windows from everywhere in the files, `num_tokens` of them or all there are.

    Raises KvasirError if there is no model, or one whose context is shorter than a window.
    """
    context_length = read_config(model_dir).max_position
    if context_length < WINDOW_TOKENS:
        text = f"a window has {WINDOW_TOKENS} tokens; this model's context is {context_length}"
        raise KvasirError(Reason.CONTEXT_LENGTH, text, param="model")
    tokenizer = Tokenizer.load(model_dir)
    ids = [i for path in files for i in tokenizer.encode_corpus(path.read_text(errors="replace"))]
    windows = np.array(ids[: len(ids) // WINDOW_TOKENS * WINDOW_TOKENS], np.int32)
    windows = windows.reshape(-1, WINDOW_TOKENS)
    count = min(len(windows), -(-num_tokens // WINDOW_TOKENS))
    chosen = np.linspace(0, len(windows) - 1, count).astype(int)
    return np.concatenate([windows[:0].ravel(), *windows[chosen]])


def licence_files() -> list[Path]:
    """Debian's licences, each once."""
    return sorted({path.resolve() for path in LICENCES.glob("*") if path.is_file()})
