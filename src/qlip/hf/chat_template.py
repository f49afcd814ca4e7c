"""Chat templates in Jinja for LLaVA's processor, whose turns are lists of images and texts."""

from __future__ import annotations

import json
import re

from qlip.vlm.conversations import IMAGE
from qlip.vlm.templates import BOS, EOS, Template

FLATTEN = """{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set turn = namespace(text='') -%}
{%- if message['content'] is string -%}
{%- set turn.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- set turn.text = turn.text + ('<image>\\n' if part['type'] == 'image' else part['text']) -%}
{%- endfor -%}
{%- endif -%}
{%- set flat.messages = flat.messages + [dict(message, content=turn.text)] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
"""Makes texts of the turns, as the templates of text decoders take them."""


GENERATION = re.compile(r"{%-?\s*(end)?generation\s*-?%}")
"""Marks of the assistant's text, which transformers alone knows."""


def template_fault(template: str) -> str | None:
    """Fault in the syntax of a chat template, in one line; None if it can be read."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION.sub("", template))
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    return None


def with_images(template: str | None) -> str | None:
    """A text decoder's template for turns with images; one that knows ``<image>`` stays as it is."""
    return template if template is None or IMAGE in template else FLATTEN + template


def jinja_of(template: Template, bos: str, eos: str) -> str:
    """Template of `qlip.vlm` in Jinja; images stand where a turn has them.

    Args:
        template: of the model.
        bos: name of the token that texts begin with; "" if there is none, or if the tokenizer adds it by itself.
        eos: name of the token that ends a text.
    """

    def said(string: str) -> str:
        string = string.replace(BOS, bos).replace(EOS, eos)
        return "{{ " + json.dumps(string, ensure_ascii=False) + " }}" if string else ""

    def around(string: str, value: str) -> str:
        before, _, after = string.partition("{}")
        return said(before) + "{{ " + value + " }}" + said(after)

    text = "turn['content'] | trim"
    question = text if template.questions else f"'{IMAGE}' * turn['content'].count('{IMAGE}')"
    system = "{{ raise_exception('this model has no system turn') }}"
    if template.system is not None:
        system = around(template.system, "messages[0]['content'] | trim")
    default = ""
    if template.system is not None and template.default_system and template.questions:
        default = template.system.replace("{}", template.default_system)
    return FLATTEN + "".join(
        [
            said(template.begin),
            "{%- if messages[0]['role'] == 'system' -%}" + system + "{%- set messages = messages[1:] -%}",
            "{%- else -%}" + said(default) + "{%- endif -%}",
            "{%- for turn in messages -%}{%- if turn['role'] == 'user' -%}" + around(template.user, question),
            "{%- else -%}" + said(template.assistant),
            "{%- if " + text + " -%}" + said(template.lead) + "{{ " + text + " }}{%- endif -%}",
            said(template.end) + said(template.after) + "{%- endif -%}{%- endfor -%}",
            "{%- if add_generation_prompt -%}" + said(template.assistant) + "{%- endif -%}",
        ]
    )
