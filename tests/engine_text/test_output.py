"""Streamed text: detokenizing, stop strings, resuming."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from kvasir_engine.text import Detokenizer, OutputText, StopChecker
from kvasir_engine.text.detokenizer import WindowDecoding
from text_builders import byte_level, make_tokenizer, sentencepiece_like

BYTE_LEVEL = make_tokenizer(byte_level())
SENTENCEPIECE = make_tokenizer(sentencepiece_like())
TOKENIZERS = {"byte level": BYTE_LEVEL, "sentencepiece": SENTENCEPIECE}
STOPS = st.lists(st.text(alphabet="helo é😀", max_size=3), max_size=2)
TEXTS = st.text(alphabet="helo wrdé😀中\n", max_size=40)


def reference_cut(text: str, stops: list[str]) -> str:
    """Up to the stop string that ends first; of those the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@given(ids=st.lists(st.integers(0, 270), max_size=40))
def test_any_byte_level_tokens_give_the_decoded_text(ids: list[int]) -> None:
    detokenizer = Detokenizer(BYTE_LEVEL)
    pieces = [detokenizer.feed([token_id]) for token_id in ids]
    assert "".join([*pieces, detokenizer.flush()]) == BYTE_LEVEL.decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS)
def test_pieces_join_to_the_decoded_text_and_never_hold_half_a_character(
    name: str, text: str
) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.feed([token_id]) for token_id in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join([*pieces, detokenizer.flush()]) == tokenizer.decode(ids)


@given(
    words=st.lists(
        st.sampled_from(["▁hello", "▁w", "or", "ld", "▁", "</s>", "<0x41>"]), max_size=30
    )
)
def test_sentencepiece_keeps_spaces_across_special_tokens_and_bytes(words: list[str]) -> None:
    ids = [SENTENCEPIECE._inner.token_to_id(word) for word in words]
    detokenizer = Detokenizer(SENTENCEPIECE)
    pieces = [detokenizer.feed([token_id]) for token_id in ids]
    assert "".join([*pieces, detokenizer.flush()]) == SENTENCEPIECE.decode(ids)


def test_a_broken_byte_spoils_no_complete_character() -> None:
    ids = [3 + byte for byte in "中".encode()] + [3 + 0xE4] + SENTENCEPIECE.encode("hello")
    detokenizer = Detokenizer(SENTENCEPIECE)
    assert [detokenizer.feed([i]) for i in ids[:4]] == ["", "", "中", ""]
    assert detokenizer.feed(ids[4:]) == "\ufffd hello"


def test_broken_text_is_not_held_back_for_ever() -> None:
    """A decoder that is neither byte-level nor sentencepiece-like."""
    decoded: list[int] = []

    def decode(ids: list[int]) -> str:
        decoded.append(len(ids))
        return "\ufffd" * len(ids)

    decoding = WindowDecoding(decode, skipped=(), fallback_bytes={})
    assert len(decoding.feed([1] * 500) + decoding.flush()) == 500
    assert max(decoded) < 40


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS, data=st.data())
def test_a_detokenizer_resumes_anywhere(name: str, text: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    whole = Detokenizer(tokenizer)
    before = whole.feed(ids[:cut])
    resumed = Detokenizer(tokenizer, ids[:cut])
    rest = resumed.feed(ids[cut:]) + resumed.flush()
    assert before + rest == tokenizer.decode(ids)


@given(
    text=st.text(alphabet="abc", max_size=30),
    stops=st.lists(st.text(alphabet="abc", max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
@example(text="abc", stops=["abc", "b"], cuts=[])
@example(text="aab", stops=["ab", "aab"], cuts=[1, 2])
def test_stop_strings_cut_alike_however_the_text_arrives(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    checker = StopChecker(stops)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    out = [checker.feed(text[a:b]) for a, b in pairwise(bounds)]
    result = "".join([*out, checker.flush()])
    assert result == reference_cut(text, stops)
    assert checker.num_chars_emitted == len(result)
    assert checker.is_stopped == (len(result) < len(text))


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    checker = StopChecker(["\n\nUser:", "END"])
    assert checker.feed("one\n") == "one"
    assert checker.feed("two E") == "\ntwo "
    assert checker.feed("N") == ""
    assert checker.feed("T") == "ENT"
    assert checker.feed("\n\nUser") == ""
    assert checker.feed(":x") == ""
    assert checker.is_stopped
    assert checker.feed("more") == checker.flush() == ""


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS, stops=STOPS)
def test_streamed_text_is_the_decoded_text_up_to_the_stop(
    name: str, text: str, stops: list[str]
) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    output = OutputText(tokenizer, stop=stops)
    pieces, taken = [], []
    for index, token_id in enumerate(ids):
        chunk = output.feed([token_id], is_last=index == len(ids) - 1)
        pieces.append(chunk.text)
        taken += chunk.token_ids
        assert output.num_chars == len("".join(pieces))
        if chunk.is_stopped:
            break
    expected = reference_cut(tokenizer.decode(ids), stops)
    assert "".join(pieces) == expected
    assert taken == ids[: len(taken)]
    assert output.is_stopped == (expected != tokenizer.decode(ids))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    text=TEXTS, stops=st.lists(st.text(alphabet="helo é", max_size=3), max_size=2), data=st.data()
)
def test_another_worker_continues_the_text_exactly(
    name: str, text: str, stops: list[str], data: st.DataObject
) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    first = OutputText(tokenizer, stop=stops)
    head = first.feed(ids[:cut])
    if head.is_stopped:
        return
    second = OutputText(
        tokenizer, stop=stops, resume_tokens=ids[:cut], resume_text_chars=len(head.text)
    )
    tail = second.feed(ids[cut:], is_last=True)
    assert head.text + tail.text == reference_cut(tokenizer.decode(ids), stops)
    assert second.num_chars == len(head.text + tail.text)


def test_text_that_the_client_lacks_is_made_up_for() -> None:
    """The worker died with text of its last tokens unsent."""
    ids = BYTE_LEVEL.encode("hello wor")
    output = OutputText(BYTE_LEVEL, resume_tokens=ids, resume_text_chars=3)
    assert output.num_chars == 3
    assert output.feed(BYTE_LEVEL.encode("ld"), is_last=True).text == "lo world"
    assert output.num_chars == len("hello world")


def test_tokens_behind_the_stop_are_left_out() -> None:
    ids = BYTE_LEVEL.encode("hello world")
    chunk = OutputText(BYTE_LEVEL, stop=["w"]).feed(ids)
    assert (chunk.text, chunk.is_stopped) == ("hello ", True)
    assert BYTE_LEVEL.decode(chunk.token_ids) == "hello w"


def test_a_stop_token_counts_but_has_no_text() -> None:
    ids = BYTE_LEVEL.encode("hello") + BYTE_LEVEL.encode("x")
    chunk = OutputText(BYTE_LEVEL).feed(ids, is_last=True, ends_with_stop_token=True)
    assert (chunk.text, chunk.token_ids) == ("hello", tuple(ids))


def test_special_tokens_have_no_text_and_added_words_have() -> None:
    ids = BYTE_LEVEL.encode("<|begin|>hello<|end|>added word")
    assert 262 in ids
    assert OutputText(BYTE_LEVEL).feed(ids, is_last=True).text == "helloadded word"


def test_ids_of_a_padded_vocabulary_have_no_text() -> None:
    assert Detokenizer(BYTE_LEVEL).feed([9999, 260]) == "hello"
