"""Chat templates render what the models' own templates render."""

from __future__ import annotations

import json

import jinja2
import pytest

from qlip import QLIPError
from qlip.lm.tokenizer import CONTROL_TOKENS, LLMTokenizer
from qlip.vlm.conversations import IMAGE, Conversation, Turn
from qlip.vlm.templates import TEMPLATES, VICUNA_SYSTEM, check_tokens, template_of
from tests.lm.tokenizers import made

# The models' own templates, without the branches for tools.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
)
QWEN = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- endif %}{%- for message in messages %}{%- if (message.role == 'user') or (message.role == 'system' and not"
    " loop.first) or (message.role == 'assistant') %}{{- '<|im_start|>' + message.role + '\n' + message.content +"
    " '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' +"
    " message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] |"
    " trim + '<end_of_turn>\n' }}{% endfor %}"
)
LLAVA = "USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: and here?\n<image> ASSISTANT: Two dogs</s>"
"""How the documentation of LLaVA 1.5 writes several turns, behind Vicuna's system text."""

TURNS = (
    Turn("user", f"{IMAGE}\nWhat is it?"),
    Turn("assistant", "A cat."),
    Turn("user", f"and here?\n{IMAGE}"),
    Turn("assistant", "Two dogs"),
)
SYSTEM = Turn("system", "Answer in one word.")


def own(template: str, turns: tuple[Turn, ...], bos: str = "") -> str:
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    return jinja2.Environment().from_string(template).render(messages=messages, bos_token=bos)


@pytest.mark.parametrize(
    ("name", "jinja", "bos"),
    [
        ("chatml", SMOLLM2, ""),
        ("chatml", QWEN, ""),
        ("llama3", LLAMA3, "<|begin_of_text|>"),
        ("gemma", GEMMA, "<bos>"),
    ],
)
@pytest.mark.parametrize("system", [False, True])
def test_template__equals_the_models_own(name: str, jinja: str, bos: str, system: bool) -> None:
    if (name == "gemma" and system) or (jinja is SMOLLM2 and not system):
        pytest.skip("Gemma has no system turn; SmolLM2 adds one, which ChatML here does not")
    turns = (SYSTEM, *TURNS) if system else TURNS
    assert TEMPLATES[name].render(Conversation("one", (1, 2), turns), bos=bos) == own(jinja, turns, bos)


def test_template__vicuna_equals_the_documentation() -> None:
    conversation = Conversation("one", (1, 2), TURNS)
    assert TEMPLATES["v1"].render(conversation, "<s>", "</s>") == f"<s>{VICUNA_SYSTEM} {LLAVA}"
    own_system = Conversation("one", (1, 2), (SYSTEM, *TURNS))
    assert TEMPLATES["v1"].render(own_system, eos="</s>") == f"{SYSTEM.text} {LLAVA}"


def test_template__short_ones() -> None:
    conversation = Conversation("one", (1, 2), TURNS)
    assert TEMPLATES["plain"].render(conversation) == f"{IMAGE}A cat.\n{IMAGE}Two dogs\n"
    text = f"{IMAGE}\nWhat is it?\nA cat.$and here?\n{IMAGE}\nTwo dogs$"
    assert TEMPLATES["qa"].render(conversation, eos="$") == text


def test_template_of__recognises_the_models_own() -> None:
    vicuna = "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' }}"
    found = [template_of(one, "folder").name for one in (SMOLLM2, QWEN, LLAMA3, GEMMA, vicuna)]
    assert found == ["chatml", "chatml", "llama3", "gemma", "v1"]
    with pytest.raises(QLIPError, match="folder: its chat template does not say where answers begin.*set template: to"):
        template_of("{% for message in messages %}[INST] {{ message.content }} [/INST]{% endfor %}", "folder")
    with pytest.raises(QLIPError, match="folder: has no chat template.*one of plain, v1, chatml, llama3, gemma, qa"):
        template_of(None, "folder")


def test_check_tokens__names_the_token_that_a_template_needs() -> None:
    values = json.loads(made("smollm2")._json)
    values["added_tokens"] = [one for one in values["added_tokens"] if one["content"] != "<|eot_id|>"]
    del values["model"]["vocab"]["<|eot_id|>"]
    tokenizer = LLMTokenizer(json.dumps(values), {"eos_token": "<|im_end|>"}, "folder")
    check_tokens(TEMPLATES["chatml"], tokenizer)
    with pytest.raises(QLIPError, match=r"folder: its tokenizer has no token <\|eot_id\|>, which the template llama3"):
        check_tokens(TEMPLATES["llama3"], tokenizer)


def test_templates__control_tokens_are_no_text_to_any_tokenizer() -> None:
    assert {token for one in TEMPLATES.values() for token in one.tokens} == CONTROL_TOKENS
