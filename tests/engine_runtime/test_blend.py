"""A blended prompt: exact where it is computed or exact already, close to it elsewhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_builders import MODELS, VOCAB_SIZE, golden_model
from family_models import make_family_model
from kvasir_engine.blend import Blend, Part, run_blend
from kvasir_engine.model import LoadedModel, load_model, new_kv_arrays

RNG = np.random.default_rng(5)
HEAD, FIRST, SECOND = (RNG.integers(1, 512, size).astype(np.int32) for size in (20, 64, 96))
GAP = RNG.integers(1, 512, 12).astype(np.int32)
PROMPT = np.concatenate([HEAD, FIRST, GAP, SECOND])
"""192 tokens: the chunks stand at 20 and 96."""
TARGET = np.arange(10, 16, dtype=np.int32)
EXACT = np.arange(20, 26, dtype=np.int32)
REST = RNG.integers(1, 512, 24).astype(np.int32)


def compute(
    model: LoadedModel, ids: np.ndarray, table: np.ndarray, *, start: int = 0
) -> np.ndarray:
    """Logits of tokens [start, ...), computed in one step."""
    count = len(ids) - start
    logits = np.empty((count, model.config.vocab_size), np.float32)
    model.native.forward(
        token_ids=np.ascontiguousarray(ids[start:]),
        positions=np.arange(start, len(ids), dtype=np.int32),
        seq_token_counts=np.array([count], np.int32),
        block_tables=table[None],
        output_rows=np.arange(count, dtype=np.int32),
        logits=logits,
        completes=np.empty(0, np.int32),
        arrived=np.empty(0, np.int32),
    )
    return logits


class Blended:
    """A model whose pool holds the chunks computed alone, in blocks 0 to 4."""

    def __init__(self, model: LoadedModel | None = None) -> None:
        self.model = model or golden_model()
        self.arrays = new_kv_arrays(self.model, 40)
        compute(self.model, FIRST, np.arange(2, dtype=np.int32))
        compute(self.model, SECOND, np.arange(2, 5, dtype=np.int32))
        self.parts = (Part(20, 64, (0, 1), 0, False), Part(96, 96, (2, 3, 4), 0, False))

    def rest_logits(self, permille: int, *, tokens_max: int = 64, start: int = 0) -> np.ndarray:
        """Logits of what follows the blended prompt."""
        blend = Blend(PROMPT, TARGET, start, self.parts, permille)
        for _ in run_blend(self.model.native, self.model.config, blend, tokens_max=tokens_max):
            pass
        return self._rest(TARGET)

    def exact_logits(self) -> np.ndarray:
        """The same, all computed."""
        compute(self.model, PROMPT, EXACT)
        return self._rest(EXACT)

    def _rest(self, table: np.ndarray) -> np.ndarray:
        table = np.append(table, [30]).astype(np.int32)
        return compute(self.model, np.concatenate([PROMPT, REST]), table, start=len(PROMPT))


@pytest.mark.parametrize("tokens_max", [5, 64, 512])
@pytest.mark.parametrize("name", MODELS)
def test_all_tokens_recomputed_give_every_bit(name: str, tokens_max: int) -> None:
    blended = Blended(golden_model(name))
    logits = blended.rest_logits(1000, tokens_max=tokens_max)
    np.testing.assert_array_equal(logits, blended.exact_logits())
    np.testing.assert_array_equal(blended.arrays.data[TARGET], blended.arrays.data[EXACT])


@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize("family", ["mistral", "gemma3-capped", "phi3", "llama-odd-sizes"])
def test_windows_several_rotations_and_odd_heads_are_blended(
    family: str, kv: Any, tmp_path: Path
) -> None:
    folder = make_family_model(family, tmp_path / family, vocab_size=VOCAB_SIZE)
    blended = Blended(load_model(folder, num_threads=1, kv=kv))
    exact = blended.exact_logits()
    np.testing.assert_array_equal(blended.rest_logits(1000), exact)
    spread = exact.std()
    assert np.abs(blended.rest_logits(150) - exact).mean() < spread / 2


def test_blocks_are_whole_afterwards_and_not_before() -> None:
    blended = Blended()
    blend = Blend(PROMPT, TARGET, 0, blended.parts, 150)
    pieces = run_blend(blended.model.native, blended.model.config, blend, tokens_max=64)
    whole = [blended.arrays.ready[TARGET].all() for _ in pieces]
    assert whole[-1]
    assert not any(whole[:-1])


def test_results_do_not_depend_on_the_size_of_pieces() -> None:
    few, many = (Blended().rest_logits(150, tokens_max=size) for size in (512, 7))
    np.testing.assert_array_equal(few, many)


def test_the_more_is_recomputed_the_closer_it_comes() -> None:
    blended = Blended()
    exact = blended.exact_logits()
    errors = [np.abs(blended.rest_logits(permille) - exact).mean() for permille in (1, 300, 1000)]
    assert errors[0] > errors[1] > errors[2] == 0


def test_blended_output_agrees_with_exact_output() -> None:
    """Weights are random and tokens 512: by chance one in 512 agrees."""
    agreements = []
    for name in MODELS:
        blended = Blended(golden_model(name))
        logits, exact = blended.rest_logits(150), blended.exact_logits()
        agreements.append((logits.argmax(1) == exact.argmax(1)).mean())
    assert np.mean(agreements) > 0.4


def test_exact_parts_stay_as_they_are() -> None:
    """A chunk at its own position after its own prefix: here the prompt's first 64 tokens."""
    blended = Blended()
    compute(blended.model, PROMPT[:64], np.arange(5, 7, dtype=np.int32))
    blended.parts = (Part(0, 64, (5, 6), 0, True), Part(96, 96, (2, 3, 4), 0, False))
    blend = Blend(PROMPT, TARGET, 0, blended.parts, 1000)
    assert blend.tokens_reused == 64
    np.testing.assert_array_equal(blended.rest_logits(1000), blended.exact_logits())


def test_nothing_before_the_start_is_written() -> None:
    blended = Blended()
    blended.arrays.data[TARGET[:2]] = 77
    blended.parts = (Part(64, 20, (0, 1), 44, False), blended.parts[1])
    blended.rest_logits(150, start=64)
    assert (blended.arrays.data[TARGET[:2]] == 77).all()


def test_tokens_that_deviate_are_recomputed() -> None:
    """Of a chunk whose KV is right but for a few tokens, those few are chosen."""
    blended = Blended()
    compute(blended.model, PROMPT, EXACT)
    exact = blended.exact_logits()
    compute(blended.model, PROMPT, np.arange(31, 37, dtype=np.int32))
    strange = blended.arrays.data[31:37].view(np.uint16).reshape(6, -1)
    values = strange[4].reshape(3, 2, -1)[:, 1]  # V of positions 128 to 159
    values[:] = np.roll(values, 1, axis=1)
    source = tuple(range(31, 37))
    blended.parts = (Part(0, 96, source, 0, True), Part(96, 96, source, 96, False))
    with_all = np.abs(blended.rest_logits(700) - exact).max()
    with_few = np.abs(blended.rest_logits(10) - exact).max()
    assert with_all < with_few / 10
