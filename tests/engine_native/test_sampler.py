"""The sampler against a slow reference, and its limits."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from kvasir_engine import _native

WORD = 0xFFFFFFFF
VOCAB = 1000


@dataclass(frozen=True, slots=True)
class Options:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1
    position: int = 0


def philox(seed: int, position: int) -> list[int]:
    """Philox4x32-10 as in its paper, one block of four words."""
    c = [position & WORD, position >> 32, 0, 0]
    k = [seed & WORD, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & WORD, (p0 >> 32) ^ c[3] ^ k[1], p0 & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c


def reference(logits: np.ndarray, o: Options) -> int:
    """One row, by sorting everything."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if o.temperature == 0:
        return order[0]
    largest = float(logits[order[0]])
    weights = [math.exp((float(x) - largest) / float(np.float32(o.temperature))) for x in logits]
    words = philox(o.seed, o.position)
    uniform = ((words[1] << 32 | words[0]) >> 11) / 2**53
    kept = order[: o.top_k] if 0 < o.top_k < len(logits) else order
    if o.top_p == 1 and len(kept) == len(logits):
        kept = list(range(len(logits)))
    elif o.top_p <= 1:
        total, limit, count = sum(weights[i] for i in kept), 0.0, 0
        while count < len(kept) and (count == 0 or limit < float(np.float32(o.top_p)) * total):
            limit += weights[kept[count]]
            count += 1
        kept = kept[:count]
    target = uniform * sum(weights[i] for i in kept)
    running = 0.0
    for i in kept:
        running += weights[i]
        if running > target:
            return i
    return kept[-1]


def draw(logits: np.ndarray, *options: Options) -> list[int]:
    """The native sampler, one row of logits per set of options."""
    return _native.sample(
        logits=np.ascontiguousarray(logits, np.float32),
        temperature=np.array([o.temperature for o in options], np.float32),
        top_k=np.array([o.top_k for o in options], np.int32),
        top_p=np.array([o.top_p for o in options], np.float32),
        seed=np.array([o.seed for o in options], np.uint64),
        position=np.array([o.position for o in options], np.int64),
    ).tolist()


def random_logits(rows: int, vocab: int = VOCAB) -> np.ndarray:
    return (np.random.default_rng(5).standard_normal((rows, vocab)) * 3).astype(np.float32)


def test_philox_gives_the_published_vector() -> None:
    # Random123's kat_vectors: philox 4x32 10, counter 0, key 0.
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert _native.philox_uniform(0, 0) == (0xE169C58D6627E8D5 >> 11) / 2**53


@pytest.mark.parametrize(
    "options",
    [
        Options(temperature=0),
        Options(),
        Options(temperature=0.3),
        Options(temperature=2.5),
        Options(top_k=1),
        Options(top_k=40),
        Options(top_k=VOCAB + 5),
        Options(top_p=0.9),
        Options(top_p=0.01),
        Options(temperature=5.0, top_p=0.999),
        Options(temperature=0.7, top_k=20, top_p=0.8),
        Options(temperature=3.0, top_k=700, top_p=0.95),
    ],
    ids=str,
)
def test_draws_equal_the_reference(options: Options) -> None:
    rows = 60
    logits = random_logits(rows)
    cases = [replace(options, seed=2**63 + 977 * i, position=i**5) for i in range(rows)]
    expected = [reference(row, case) for row, case in zip(logits, cases, strict=True)]
    assert draw(logits, *cases) == expected


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = random_logits(8)
    cases = [Options(temperature=0.5 * i, seed=i, position=i) for i in range(8)]
    together = draw(logits, *cases)
    assert together == [draw(logits[i : i + 1], cases[i])[0] for i in range(8)]


def test_seed_and_position_both_matter() -> None:
    logits = np.zeros((64, VOCAB), np.float32)
    by_position = draw(logits, *[Options(position=i) for i in range(64)])
    by_seed = draw(logits, *[Options(seed=i) for i in range(64)])
    assert len(set(by_position)) > 50
    assert len(set(by_seed)) > 50


def test_frequencies_follow_the_softmax() -> None:
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    count = 4000
    logits = np.tile(np.log(probabilities), (count, 1))
    drawn = draw(logits, *[Options(position=i) for i in range(count)])
    frequencies = np.bincount(drawn, minlength=4) / count
    assert np.abs(frequencies - probabilities).max() < 0.03


def test_greedy_takes_the_lowest_id_on_ties() -> None:
    logits = np.array([[1, 7, 3, 7]], np.float32)
    assert draw(logits, Options(temperature=0)) == [1]


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = np.full((200, VOCAB), -np.inf, np.float32)
    logits[:, [3, 900]] = 0
    for options in (Options(), Options(top_p=0.99), Options(top_k=500)):
        drawn = draw(logits, *[replace(options, position=i) for i in range(200)])
        assert set(drawn) == {3, 900}


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 3e38], ids=str)
def test_extreme_temperatures_are_finite_arithmetic(temperature: float) -> None:
    logits = random_logits(1)
    (drawn,) = draw(logits, Options(temperature=temperature))
    assert 0 <= drawn < VOCAB
    if temperature < 1:
        assert drawn == logits[0].argmax()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (Options(temperature=-1), "temperature"),
        (Options(temperature=math.nan), "temperature"),
        (Options(temperature=math.inf), "temperature"),
        (Options(top_p=0), "top_p"),
        (Options(top_p=1.5), "top_p"),
        (Options(top_p=math.nan), "top_p"),
        (Options(top_k=-1), "top_k"),
        (Options(position=-1), "position"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: Options, text: str) -> None:
    with pytest.raises(ValueError, match=f"row 1: .*{text}"):
        draw(random_logits(2), Options(), options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_logits_that_are_no_numbers_are_refused(value: float, temperature: float) -> None:
    logits = random_logits(3)
    logits[2, 77] = value
    with pytest.raises(ValueError, match="row 2: "):
        draw(logits, *[Options(temperature=temperature)] * 3)


def test_a_row_without_any_finite_logit_is_refused() -> None:
    with pytest.raises(ValueError, match="no finite largest logit"):
        draw(np.full((1, 5), -np.inf), Options())


def test_options_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="one entry per row"):
        draw(random_logits(2), Options())
