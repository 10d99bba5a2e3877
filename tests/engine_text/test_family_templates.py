"""Chats in the prompt formats of the supported families, and the tokens that end their answers.

The templates are written in the ways that the families' own files use: slices of messages,
namespaces, conditions on roles, filters, helpers for errors and dates.
"""

from pathlib import Path

import pytest
from kvasir_engine.text import Tokenizer
from kvasir_engine.text.chat import ChatTemplate
from kvasir_proto.errors import KvasirError
from text_builders import make_folder

TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hello? "},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]

LLAMA3 = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
QWEN = """
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == 'user' and message.content is string
           and not message.content.startswith('<tool_response>') %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and loop.index0 < ns.last %}
        {{- '<|im_start|>' + message.role + '\\n'
            + message.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
MISTRAL = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] + '\\n\\n' %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system is defined %}
            {{- ' [INST] ' + system + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PROMPTS = {
    "llama3": (
        LLAMA3,
        "<bos><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "qwen": (
        QWEN,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hello? <|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "mistral": (
        MISTRAL,
        "<bos> [INST] Be brief.\n\n Hello?  [/INST] Yes.<eos> [INST] Why? [/INST]",
    ),
    "gemma": (
        GEMMA,
        "<bos><start_of_turn>user\nBe brief.\n\nHello?<end_of_turn>\n"
        "<start_of_turn>model\nYes.<end_of_turn>\n<start_of_turn>user\nWhy?<end_of_turn>\n"
        "<start_of_turn>model\n",
    ),
    "phi3": (
        PHI3,
        "<|system|>\nBe brief.<|end|>\n<|user|>\n Hello? <|end|>\n<|assistant|>\nYes.<|end|>\n"
        "<|user|>\nWhy?<|end|>\n<|assistant|>\n",
    ),
}


@pytest.mark.parametrize("family", PROMPTS)
def test_chat_becomes_the_prompt_of_its_family(family: str) -> None:
    template, prompt = PROMPTS[family]
    assert ChatTemplate(template, TOKENS).render(CHAT) == prompt


def test_variables_of_a_request_reach_the_template() -> None:
    text = ChatTemplate(QWEN, TOKENS).render(CHAT[1:2], enable_thinking=False)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": " Hel"}, {"type": "text", "text": "lo "}]
    text = ChatTemplate(GEMMA, TOKENS).render([{"role": "user", "content": parts}])
    assert text == "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"


@pytest.mark.parametrize("template", [MISTRAL, GEMMA], ids=["mistral", "gemma"])
def test_roles_out_of_turn_are_the_clients_error(template: str) -> None:
    with pytest.raises(KvasirError, match="alternate") as refused:
        ChatTemplate(template, TOKENS).render(CHAT[1:2] * 2)
    assert refused.value.param == "messages"


def test_end_of_a_turn_ends_the_answer_though_config_names_another_token(tmp_path: Path) -> None:
    """As in models tuned for chat whose config.json is that of the base model."""
    folder = make_folder(
        tmp_path, config={"eos_token_id": 5}, tokenizer_config={"eos_token": "<|end|>"}
    )
    assert Tokenizer.load(folder).eos_token_ids == (5, 263)


def test_limits_of_a_model_with_images_are_those_of_its_text_part(tmp_path: Path) -> None:
    text_config = {"max_position_embeddings": 512, "vocab_size": 300}
    config = {"model_type": "gemma3", "text_config": text_config, "eos_token_id": [1, 106]}
    tokenizer = Tokenizer.load(make_folder(tmp_path, config=config))
    assert (tokenizer.context_length, tokenizer.vocab_size) == (512, 300)
    assert tokenizer.eos_token_ids == (1, 106)
