"""What the demo takes for success."""

import pytest
from kvasir_cli.demo import EXPECTED, QUESTIONS, Turn, check, demo_options, print_table
from kvasir_cli.endpoint import Answer
from kvasir_cli.errors import CommandError


def make_turns(first: dict | None = None, **second: object) -> list[Turn]:
    stats = {"prefill_worker": "prefill-1", "decode_worker": "decode-0", "kv_bytes_moved": 1 << 20}
    turns = []
    for question, expected in zip(QUESTIONS, EXPECTED, strict=True):
        answer = Answer(text=f"It is {expected}.", stats=stats | (first or {}))
        answer.usage = {"prompt_tokens": 150, "completion_tokens": 9}
        turns.append(Turn(question, answer))
    turns[1].answer.usage["prompt_tokens_details"] = {"cached_tokens": 128} | second
    return turns


def test_right_answers_with_a_hand_off_pass(capsys: pytest.CaptureFixture[str]) -> None:
    turns = make_turns()
    check(turns)
    print_table(turns)
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("prefill-1", "decode-0", "1.0 MB", "128"))


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (make_turns({"kv_bytes_moved": 0}), "not handed"),
        (make_turns({"prefill_worker": ""}), "not handed"),
        (make_turns({"prefill_worker": "decode-0"}), "not handed"),
        (make_turns(cached_tokens=0), "reused no KV"),
    ],
    ids=["nothing moved", "no prefill worker", "one worker", "nothing reused"],
)
def test_demo_fails_when_disaggregation_did_not_happen(turns: list[Turn], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        check(turns)


def test_wrong_answer_fails() -> None:
    turns = make_turns()
    turns[0].answer.text = "Lyon."
    with pytest.raises(CommandError, match=r"was answered 'Lyon\.'"):
        check(turns)


def test_demo_fleet_has_the_promised_parts(tmp_path) -> None:
    options = demo_options(tmp_path, 1)
    assert (options.num_prefill, options.num_decode, options.num_kv_nodes) == (2, 2, 1)
