"""Chat templates: the bundled ones for LLMs that come without, rendering, and where assistant turns lie in the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import InputError

Span = tuple[int, int]
Message = dict[str, Any]

_PLAIN = """{{ bos_token }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{ 'Assistant:' }}{% generation %}{{ ' ' + message.content }}{{ eos_token }}
{%- endgeneration %}{{ '\\n' }}
{%- elif message.role == 'system' %}{{ message.content + '\\n' }}
{%- else %}{{ message.role | capitalize + ': ' + message.content + '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

_CHATML = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

BUNDLED_TEMPLATES = {"plain": _PLAIN, "chatml": _CHATML}

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def load_template(template: str | Path) -> str:
    """A chat template's text.

    Args:
        template: name of a bundled one ("plain", "chatml"), a file, or the template itself.

    Raises:
        InputError: neither.
    """
    text = str(template)
    if text in BUNDLED_TEMPLATES:
        return BUNDLED_TEMPLATES[text]
    if "{{" in text or "{%" in text:
        return text
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(BUNDLED_TEMPLATES)
        raise InputError(f"chat template {text!r} is neither a bundled one ({names}) nor a readable file") from error


def template_of(tokenizer: PreTrainedTokenizerBase, template: Any = None) -> str:
    """The template to use: the one given, else the tokenizer's own.

    Raises:
        InputError: there is none.
    """
    template = template if template is not None else tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise InputError(
            "this LLM has no chat template: pass one with --chat-template FILE (chat_template=... in Python), "
            "or take the bundled one with --chat-template plain"
        )
    return load_template(template)


def render(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message], prompt: bool, **variables: Any
) -> tuple[str, list[Span]]:
    """Render messages whose contents are plain text.

    Args:
        tokenizer: its special tokens are variables of the template.
        template: text of the template.
        messages: role and content each.
        prompt: end with the header of an assistant turn.
        variables: of the template.

    Returns:
        The text, and where the template's generation blocks lie in it, if it marks them.

    Raises:
        InputError: the template refuses the messages, or cannot be read.
    """
    marks = _GENERATION_TAG.search(template) is not None
    try:
        texts, spans = render_jinja_template(
            conversations=[list(messages)],
            chat_template=template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=marks,
            **{**tokenizer.special_tokens_map, **variables},
        )
    except Exception as error:  # templates are programs: they fail in any way
        reason = " ".join(str(error).split())
        raise InputError(f"the chat template does not take these messages: {reason}") from error
    return texts[0], [tuple(span) for span in spans[0]] if marks else []


def assistant_spans(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message], text: str, **variables: Any
) -> list[Span] | None:
    """Where assistant turns lie in the rendered text of a conversation, for templates that do not mark them.

    A turn reaches from the end of the prompt before it to the end of the conversation up to it, which holds only if
    each of these renders to the beginning of the whole.

    Returns:
        Start and end per assistant turn; None where the template writes earlier turns anew.
    """
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, _ = render(tokenizer, template, messages[:index], True, **variables)
        with_turn, _ = render(tokenizer, template, messages[: index + 1], False, **variables)
        if not (text.startswith(with_turn) and with_turn.startswith(before)):
            return None
        spans.append((len(before), len(with_turn)))
    return spans


__all__ = ["BUNDLED_TEMPLATES", "assistant_spans", "load_template", "render", "template_of"]
