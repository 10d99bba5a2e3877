"""Tokenizers of model folders: text to ids and back, special tokens, chat templates, errors."""

from pathlib import Path

import pytest
from kvasir_engine.text import Tokenizer
from kvasir_proto.errors import KvasirError, Reason
from text_builders import CHAT_TEMPLATE, make_folder, make_tokenizer

MESSAGES = [{"role": "user", "content": " hello "}]


def test_text_survives_the_round_trip() -> None:
    tokenizer = make_tokenizer()
    text = "hello wörld 😀 中文\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [5, 6]}, "config": {"eos_token_id": 7}}, (5, 6)),
        ({"generation_config": {}, "config": {"eos_token_id": 7}}, (7,)),
        ({"config": {"eos_token_id": [8]}}, (8,)),
        ({"tokenizer_config": {"eos_token": "<|end|>"}}, (263,)),
        ({"tokenizer_config": {"eos_token": {"content": "<|end|>"}}}, (263,)),
        ({}, ()),
    ],
    ids=["generation_config", "config", "list", "text", "object", "nowhere"],
)
def test_the_end_of_sequence_is_found(
    tmp_path: Path, files: dict, expected: tuple[int, ...]
) -> None:
    assert Tokenizer.load(make_folder(tmp_path, **files)).eos_token_ids == expected


def test_text_that_cannot_fit_is_refused_before_it_is_tokenised(tmp_path: Path) -> None:
    config = {"max_position_embeddings": 4, "vocab_size": 300}
    tokenizer = Tokenizer.load(make_folder(tmp_path, config=config))
    longest = "<|begin|>"
    assert len(tokenizer.encode(4 * longest)) == 4
    assert len(tokenizer.encode("x" * 20)) == 20, "refused by its tokens, later, where it can fit"
    with pytest.raises(KvasirError, match="4 tokens") as refused:
        tokenizer.encode(5 * "added word")
    assert (refused.value.reason, refused.value.param) == (Reason.CONTEXT_LENGTH, "prompt")
    with pytest.raises(KvasirError) as refused:
        tokenizer.encode_chat([{"role": "user", "content": "x" * 50}])
    assert refused.value.param == "messages"


def test_limits_come_from_the_model(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, config={"max_position_embeddings": 8192, "vocab_size": 300})
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.context_length, tokenizer.vocab_size) == (8192, 300)


def test_a_chat_becomes_a_prompt() -> None:
    tokenizer = make_tokenizer()
    text = tokenizer.apply_chat_template(MESSAGES)
    assert text == "<|begin|><user>hello\n<assistant>"
    assert tokenizer.encode_chat(MESSAGES)[0] == 262
    assert tokenizer.decode(tokenizer.encode_chat(MESSAGES)) == "<user>hello\n<assistant>"


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": CHAT_TEMPLATE},
        {
            "chat_template": [
                {"name": "tool_use", "template": "no"},
                {"name": "default", "template": CHAT_TEMPLATE},
            ]
        },
    ],
    ids=["text", "list"],
)
def test_the_template_is_read_from_the_tokenizer_config(tmp_path: Path, config: dict) -> None:
    tokenizer = Tokenizer.load(make_folder(tmp_path, tokenizer_config=config))
    assert tokenizer.apply_chat_template(MESSAGES).endswith("<assistant>")


def test_a_template_file_comes_before_the_tokenizer_config(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, tokenizer_config={"chat_template": "old"})
    (folder / "chat_template.jinja").write_text("new")
    assert Tokenizer.load(folder).apply_chat_template(MESSAGES) == "new"


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (CHAT_TEMPLATE, [{"role": "tool", "content": "x"}]),
        ("{{ messages[0]['nothing'].upper() }}", MESSAGES),
        ("{{ messages[0].content + 1 }}", MESSAGES),
        ("{{ messages.append(1) }}", MESSAGES),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", MESSAGES),
        ("{{ 1 // 0 }}", MESSAGES),
    ],
    ids=["raise_exception", "missing field", "wrong type", "mutation", "escape", "division"],
)
def test_what_a_template_refuses_is_the_clients_error(template: str, messages: list) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    with pytest.raises(KvasirError) as refused:
        tokenizer.apply_chat_template(messages)
    assert (refused.value.reason, refused.value.param) == (Reason.INVALID_REQUEST, "messages")


def test_templates_know_what_transformers_gives_them() -> None:
    template = (
        "{{ strftime_now('%Y')|length }}{% for i in [1, 2] %}{% if i == 2 %}{% break %}{% endif %}"
        "{{ {'a': 'é'}|tojson }}{% endfor %}{{ eos_token }}{{ tools is none }}{{ extra }}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    text = tokenizer.apply_chat_template(MESSAGES, extra="x")
    assert text == '4{"a": "é"}<|end|>Truex'


def test_without_a_template_only_chat_is_refused() -> None:
    tokenizer = make_tokenizer(chat_template=None)
    assert not tokenizer.has_chat_template
    assert tokenizer.encode("hello") == [260]
    with pytest.raises(KvasirError) as refused:
        tokenizer.encode_chat(MESSAGES)
    assert refused.value.reason is Reason.UNSUPPORTED
    assert "chat template" in refused.value.message


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("config.json", "{"),
        ("config.json", "[]"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}'),
    ],
    ids=["tokenizer", "not JSON", "no object", "template"],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    folder = make_folder(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match="template" if "template" in content else name):
        Tokenizer.load(folder)
